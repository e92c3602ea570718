"""Token-level routing of any router in one form, and what one sees in it."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.router.routing import Routing, SlotRouting, SoftRouting

AnyRouting: TypeAlias = Routing | SlotRouting | SoftRouting


def experts_by_token(routings: Sequence[AnyRouting], num_choices: int) -> Int[Array, "N T K"]:
    """Which experts each token visits; see `choices_by_token`."""
    return choices_by_token(routings, num_choices)[0]


def choices_by_token(
    routings: Sequence[AnyRouting], num_choices: int
) -> tuple[Int[Array, "N T K"], Float[Array, "N T K"]]:
    """Which experts each token visits and how much each counts, by MoE layer in the order of the model.

    Args:
      routings: traced token-level routing of each run of MoE layers, stacked by layer.
      num_choices: width of the router, E.

    Returns:
      Expert ids, the best first, and combine weights, before any capacity. Expert E with weight 0
      fills up where a token visits fewer experts than another, or mixes all of them (soft routing).
    """
    found = [_choices(routing, num_choices) for routing in routings]
    widest = max(experts_NTK.shape[-1] for experts_NTK, _ in found)

    def widen(x_NTK, fill):
        missing = widest - x_NTK.shape[-1]
        return jnp.pad(x_NTK, ((0, 0), (0, 0), (0, missing)), constant_values=fill)

    experts_NTK = jnp.concatenate([widen(experts_NTK, num_choices) for experts_NTK, _ in found])
    return experts_NTK, jnp.concatenate([widen(weights_NTK, 0.0) for _, weights_NTK in found])


def scores_by_token(
    routings: Sequence[AnyRouting], num_choices: int
) -> tuple[Float[Array, "N T E"], Float[Array, "N T E"]]:
    """Raw logits and probabilities of all experts for each token, by MoE layer in the order of the model.

    Soft routing has logits of slots and weights of slots in a token: an expert's probability is the
    sum of its slots' weights, and its logit the logsumexp of its slots' logits, of which those
    probabilities are the softmax.

    Args:
      routings: traced token-level routing of each run of MoE layers, stacked by layer.
      num_choices: width of the router, E.
    """
    found = [_scores(routing, num_choices) for routing in routings]
    logits, probs = zip(*found, strict=True)
    return jnp.concatenate(logits), jnp.concatenate(probs)


def _choices(routing: AnyRouting, num_choices: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(routing, Routing):
        return routing.experts_TK, routing.weights_TK
    if isinstance(routing, SoftRouting):
        layers, batch, length, _ = routing.logits_BLS.shape
        experts_NT1 = jnp.full((layers, batch * length, 1), num_choices, jnp.int32)
        return experts_NT1, jnp.zeros(experts_NT1.shape)
    layers, batch, num_experts, _ = routing.positions_BEC.shape
    tokens = routing.logits_TE.shape[1]
    layer = jnp.arange(layers)[:, None, None, None]
    row = jnp.arange(batch)[None, :, None, None]
    expert = jnp.arange(num_experts, dtype=jnp.int32)[None, None, :, None]
    place = (layer, row, routing.positions_BEC, expert)
    shape = (layers, batch, tokens // batch, num_experts)
    experts_NBLE = jnp.full(shape, num_choices, jnp.int32).at[place].set(expert, mode="drop")
    weights_NBLE = jnp.zeros(shape).at[place].set(routing.weights_BEC, mode="drop")
    order_NBLE = jnp.argsort(jnp.where(experts_NBLE < num_choices, -weights_NBLE, jnp.inf), axis=-1)
    experts_NBLE, weights_NBLE = (
        jnp.take_along_axis(x, order_NBLE, axis=-1) for x in (experts_NBLE, weights_NBLE)
    )
    return experts_NBLE.reshape(layers, tokens, -1), weights_NBLE.reshape(layers, tokens, -1)


def _scores(routing: AnyRouting, num_choices: int) -> tuple[jax.Array, jax.Array]:
    if not isinstance(routing, SoftRouting):
        return routing.logits_TE, routing.probs_TE
    layers, batch, length, _ = routing.logits_BLS.shape
    by_expert = (layers, batch * length, num_choices, -1)
    logits_NTE = jax.nn.logsumexp(routing.logits_BLS.reshape(by_expert), axis=-1)
    return logits_NTE, routing.combine_BLS.reshape(by_expert).sum(axis=-1)


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


def churn(
    before_NTK: Int[Array, "N T K"], after_NTK: Int[Array, "N T K"], num_choices: int
) -> Float[Array, "N"]:
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
    return jnp.where(visits_NT > 0, lost_NT, 0.0).sum(axis=-1) / jnp.maximum(
        (visits_NT > 0).sum(axis=-1), 1
    )
