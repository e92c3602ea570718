"""What a layer draws at random outside its router: jitter of the input, and expert dropout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import MoeConfig
from moejax.moe.router.routing import Stream, draw
from moejax.moe.token_info import TokenInfo


def jitter(
    x_BLD: Float[Array, "B L D"], config: MoeConfig, info: TokenInfo
) -> Float[Array, "B L D"]:
    """Returns the router's input, in training multiplied by uniform noise.

    Source: Fedus et al. 2021, section 2.4.
    """
    knobs = info.knobs
    if config.jitter == 0 or knobs is None or info.keys_B is None:
        return x_BLD
    _, length, width = x_BLD.shape
    uniform_BLD = draw(info.keys_B, Stream.JITTER, jax.random.uniform, length, width)
    symmetric_BLD = 2 * uniform_BLD - 1
    return x_BLD * (1 + knobs.jitter * symmetric_BLD)


def draw_expert_dropout(config: MoeConfig, info: TokenInfo) -> Float[Array, "T K"] | None:
    """Draws factors on the choices' outputs: 0 for some, above 1 for the others.

    Not dropout within an expert: a token loses the whole output of an expert. None without it.
    """
    knobs = info.knobs
    if config.expert_dropout == 0 or knobs is None or info.keys_B is None:
        return None
    _, length = info.is_token_BL.shape
    uniform_BLK = draw(info.keys_B, Stream.DROPOUT, jax.random.uniform, length, config.top_k)
    is_dropped_TK = uniform_BLK.reshape(-1, config.top_k) < knobs.expert_dropout
    kept_factor = 1 / (1 - knobs.expert_dropout)
    return jnp.where(is_dropped_TK, 0.0, kept_factor)
