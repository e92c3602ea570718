"""What the tests of MoE layers and routers hand to them."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.config import Config, Knobs, MoeConfig
from moejax.moe.overrides import AS_TRAINED
from moejax.moe.token_info import TokenInfo


def knobs_of(config: MoeConfig, **changes: jax.Array) -> Knobs:
    """The knobs as a layer's config sets them, with some changed."""
    return dataclasses.replace(Knobs.from_config(Config(moe=config)), **changes)


def info_of(
    config: MoeConfig, mask_BL, factor=None, keys_B=None, trace=False, overrides=AS_TRAINED
) -> TokenInfo:
    """Of training with a capacity factor; of evaluation where it is None."""
    batch, length = mask_BL.shape
    return TokenInfo(
        is_token_BL=jnp.asarray(mask_BL),
        tokens_BL=jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length) % 7,
        positions_BL=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)),
        knobs=None if factor is None else knobs_of(config, capacity_factor=jnp.float32(factor)),
        keys_B=keys_B,
        trace=trace,
        overrides=overrides,
    )
