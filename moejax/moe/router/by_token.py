"""Token-level routing of any router in one form, and measures of it."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.router.routing import Routing, SlotRouting, SoftRouting

AnyRouting: TypeAlias = Routing | SlotRouting | SoftRouting


def experts_by_token(routings: Sequence[AnyRouting], num_choices: int) -> Int[Array, "N T K"]:
    """Returns which experts each token visits; see `choices_by_token`."""
    experts_NTK, _ = choices_by_token(routings, num_choices)
    return experts_NTK


def choices_by_token(
    routings: Sequence[AnyRouting], num_choices: int
) -> tuple[Int[Array, "N T K"], Float[Array, "N T K"]]:
    """Returns which experts each token visits and how much each counts, by MoE layer.

    Args:
      routings: traced token-level routing of each group of MoE layers in the order of the model,
        stacked by layer.
      num_choices: width of the router, E.

    Returns:
      Expert ids, the best first, and combine weights, before any capacity. Expert E with weight 0
      fills up where a token visits fewer experts than another, or mixes all of them (soft routing).
    """
    choices = [_choices(routing, num_choices) for routing in routings]
    experts, weights = zip(*choices, strict=True)
    return _stack_layers(experts, num_choices), _stack_layers(weights, 0.0)


def _stack_layers(groups: Sequence[jax.Array], fill: int | float) -> jax.Array:
    """Joins layers whose tokens visit different numbers of experts, `[N, T, K]` each."""
    widest = max(x_NTK.shape[-1] for x_NTK in groups)
    padded = []
    for x_NTK in groups:
        missing = widest - x_NTK.shape[-1]
        padding = ((0, 0), (0, 0), (0, missing))
        padded.append(jnp.pad(x_NTK, padding, constant_values=fill))
    return jnp.concatenate(padded)


def scores_by_token(
    routings: Sequence[AnyRouting], num_choices: int
) -> tuple[Float[Array, "N T E"], Float[Array, "N T E"]]:
    """Returns raw logits and probabilities of all experts for each token, by MoE layer.

    Soft routing has logits of slots and weights of slots in a token: an expert's probability is the
    sum of its slots' weights, and its logit the logsumexp of its slots' logits, of which those
    probabilities are the softmax.

    Args:
      routings: traced token-level routing of each group of MoE layers in the order of the model,
        stacked by layer.
      num_choices: width of the router, E.
    """
    scores = [_scores(routing, num_choices) for routing in routings]
    logits, probs = zip(*scores, strict=True)
    return jnp.concatenate(logits), jnp.concatenate(probs)


def _choices(routing: AnyRouting, num_choices: int) -> tuple[jax.Array, jax.Array]:
    if isinstance(routing, Routing):
        return routing.experts_TK, routing.weights_TK
    if isinstance(routing, SoftRouting):
        layers, batch, length, _ = routing.logits_BLS.shape
        experts_NT1 = jnp.full((layers, batch * length, 1), num_choices, jnp.int32)
        return experts_NT1, jnp.zeros(experts_NT1.shape)
    return _choices_of_slots(routing, num_choices)


def _choices_of_slots(routing: SlotRouting, num_choices: int) -> tuple[jax.Array, jax.Array]:
    """Returns the experts that took each token, those with most weight first, and the weights."""
    experts_NBLE, weights_NBLE = _by_position(routing, num_choices)
    is_visit_NBLE = experts_NBLE < num_choices
    keys_NBLE = jnp.where(is_visit_NBLE, -weights_NBLE, jnp.inf)
    order_NBLE = jnp.argsort(keys_NBLE, axis=-1)
    experts_NBLE = jnp.take_along_axis(experts_NBLE, order_NBLE, axis=-1)
    weights_NBLE = jnp.take_along_axis(weights_NBLE, order_NBLE, axis=-1)
    layers, batch, length, width = experts_NBLE.shape
    by_token = (layers, batch * length, width)
    return experts_NBLE.reshape(by_token), weights_NBLE.reshape(by_token)


def _by_position(routing: SlotRouting, num_choices: int) -> tuple[jax.Array, jax.Array]:
    """Returns whether each expert took each token, as its id or `num_choices`, and the weights."""
    layers, batch, num_experts, _ = routing.positions_BEC.shape
    length = routing.logits_TE.shape[1] // batch
    layer = jnp.arange(layers)[:, None, None, None]
    row = jnp.arange(batch)[None, :, None, None]
    expert = jnp.arange(num_experts, dtype=jnp.int32)[None, None, :, None]
    place = (layer, row, routing.positions_BEC, expert)
    shape = (layers, batch, length, num_experts)
    # Positions of empty slots are out of range, and dropped.
    no_experts_NBLE = jnp.full(shape, num_choices, jnp.int32)
    experts_NBLE = no_experts_NBLE.at[place].set(expert, mode="drop")
    no_weights_NBLE = jnp.zeros(shape)
    weights_NBLE = no_weights_NBLE.at[place].set(routing.weights_BEC, mode="drop")
    return experts_NBLE, weights_NBLE


def _scores(routing: AnyRouting, num_choices: int) -> tuple[jax.Array, jax.Array]:
    if not isinstance(routing, SoftRouting):
        return routing.logits_TE, routing.probs_TE
    layers, batch, length, _ = routing.logits_BLS.shape
    by_expert = (layers, batch * length, num_choices, -1)
    logits_NTEP = routing.logits_BLS.reshape(by_expert)
    logits_NTE = jax.nn.logsumexp(logits_NTEP, axis=-1)
    combine_NTEP = routing.combine_BLS.reshape(by_expert)
    return logits_NTE, combine_NTEP.sum(axis=-1)


def coactivation(experts_NTK: Int[Array, "N T K"], num_choices: int) -> Int[Array, "N E E"]:
    """Counts the tokens that visit both experts of a pair, by layer.

    The counts are symmetric, with each expert's tokens on the diagonal.

    Args:
      experts_NTK: from `experts_by_token`.
      num_choices: width of the router, E.
    """

    def of_layer(experts_TK):
        visits_TE = jax.nn.one_hot(experts_TK, num_choices).sum(axis=1)
        counts_EE = visits_TE.T @ visits_TE  # exact below 2^24 tokens
        return counts_EE.astype(jnp.int32)

    return jax.lax.map(of_layer, experts_NTK)


def churn(
    before_NTK: Int[Array, "N T K"], after_NTK: Int[Array, "N T K"], num_choices: int
) -> Float[Array, "N"]:
    """Returns the routing churn by layer.

    It is the fraction of a token's experts that it no longer visits, averaged over tokens that
    visited any before.

    Args:
      before_NTK: from `experts_by_token`, of one checkpoint.
      after_NTK: of a later one, on the same tokens.
      num_choices: width of the router, E.
    """
    is_visit_NTK = before_NTK < num_choices
    is_same_NTKK = before_NTK[..., :, None] == after_NTK[..., None, :]
    stays_NTK = is_same_NTKK.any(axis=-1)
    visits_NT = is_visit_NTK.sum(axis=-1)
    num_lost_NT = (is_visit_NTK & ~stays_NTK).sum(axis=-1)
    lost_NT = num_lost_NT / jnp.maximum(visits_NT, 1)
    sum_N = jnp.where(visits_NT > 0, lost_NT, 0.0).sum(axis=-1)
    num_tokens_N = (visits_NT > 0).sum(axis=-1)
    return sum_N / jnp.maximum(num_tokens_N, 1)
