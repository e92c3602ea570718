"""Token-level routing of any router in one form, and what one sees in it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


def coactivation(experts_NTK: Int[Array, "N T K"], num_choices: int) -> Int[Array, "N E E"]:
    """How many tokens visit both experts of a pair, by layer: symmetric, with each expert's tokens on the diagonal.

    Args:
      experts_NTK: from `experts_by_token`.
      num_choices: width of the router, E.
    """

    def of_layer(experts_TK):
        visits_TE = jax.nn.one_hot(experts_TK, num_choices).sum(axis=1)
        return (visits_TE.T @ visits_TE).astype(jnp.int32)  # exact below 2^24 tokens

    return jax.lax.map(of_layer, experts_NTK)


def churn(before_NTK: Int[Array, "N T K"], after_NTK: Int[Array, "N T K"], num_choices: int) -> Float[Array, "N"]:
    """Routing churn by layer: of the experts that a token visited before, the fraction that it no longer visits.

    The mean is over tokens that visited any.

    Args:
      before_NTK: from `experts_by_token`, of one checkpoint.
      after_NTK: of a later one, on the same tokens.
      num_choices: width of the router, E.
    """
    is_visit_NTK = before_NTK < num_choices
    stays_NTK = (before_NTK[..., :, None] == after_NTK[..., None, :]).any(axis=-1)
    visits_NT = is_visit_NTK.sum(axis=-1)
    lost_NT = (is_visit_NTK & ~stays_NTK).sum(axis=-1) / jnp.maximum(visits_NT, 1)
    return jnp.where(visits_NT > 0, lost_NT, 0.0).sum(axis=-1) / jnp.maximum((visits_NT > 0).sum(axis=-1), 1)
