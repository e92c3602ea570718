"""Token-level routing of any router in one form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.moe.routers.routing import Routing, SlotRouting, SoftRouting


def experts_by_token(routings: Sequence[Routing | SlotRouting | SoftRouting], num_choices: int) -> Int[Array, "N T K"]:
    """Which experts each token visits, by MoE layer in the order of the model.

    Args:
      routings: traced token-level routing of each run of MoE layers, stacked by layer.
      num_choices: width of the router, E.

    Returns:
      Expert ids; E fills up where a token visits fewer experts than another, or mixes all of them (soft routing).
    """
    found = [_by_token(routing, num_choices) for routing in routings]
    widest = max(experts_NTK.shape[-1] for experts_NTK in found)
    return jnp.concatenate(
        [
            jnp.pad(experts_NTK, ((0, 0), (0, 0), (0, widest - experts_NTK.shape[-1])), constant_values=num_choices)
            for experts_NTK in found
        ]
    )


def _by_token(routing: Routing | SlotRouting | SoftRouting, num_choices: int) -> jax.Array:
    if isinstance(routing, Routing):
        return routing.experts_TK
    if isinstance(routing, SoftRouting):
        layers, batch, length, _ = routing.logits_BLS.shape
        return jnp.full((layers, batch * length, 1), num_choices, jnp.int32)
    layers, batch, num_experts, _ = routing.positions_BEC.shape
    tokens = routing.logits_TE.shape[1]
    layer = jnp.arange(layers)[:, None, None, None]
    row = jnp.arange(batch)[None, :, None, None]
    expert = jnp.arange(num_experts, dtype=jnp.int32)[None, None, :, None]
    experts_NBLE = jnp.full((layers, batch, tokens // batch, num_experts), num_choices, jnp.int32)
    experts_NBLE = experts_NBLE.at[layer, row, routing.positions_BEC, expert].set(expert, mode="drop")
    return experts_NBLE.reshape(layers, tokens, num_experts)
