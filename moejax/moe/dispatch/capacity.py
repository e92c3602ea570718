"""Capacity: which choices keep a slot when more want an expert than it has slots.

This comes between the router and dispatch: `apply_capacity` decides which choices have a slot
(`slots.py` does so for one group of tokens), and `plan.py` where their rows are. Tokens come in
groups (a sequence, a device's batch, the global batch), each with its own slots, so that no group
sees another; here L is the number of tokens of a group.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.config import MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.dispatch.slots import SlotRule, assign_group
from moejax.moe.router.routing import Routing
from moejax.moe.router.scores import combine_weights, spread_over_survivors
from moejax.moe.router.selection import save_for_remat

WEIGHTS = "routing_weights"
"""The name of combine weights, for remat to save."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CapacityAssignment:
    """What became of each choice.

    Attributes:
      experts_TK: final experts, int32; E where a choice was dropped, unchanged where it needs no
        slot (masked tokens).
      is_dropped_TK: the choice found no slot.
      is_moved_TK: the choice went to another expert than the router's; never for a dropped one.
    """

    experts_TK: jax.Array
    is_dropped_TK: jax.Array
    is_moved_TK: jax.Array


@dataclasses.dataclass(frozen=True)
class CombineWeights:
    """The choices of a layer after capacity, and how much each counts.

    Attributes:
      experts_TK: final experts, see `CapacityAssignment`.
      weights_TK: combine weights, 0 where a choice was dropped; before expert dropout.
      is_dropped_TK: choices that found no slot.
      is_moved_TK: choices that went to another expert.
      dropout_TK: factors on the experts' outputs by expert dropout, 0 where it drops one;
        None without it.
    """

    experts_TK: jax.Array
    weights_TK: jax.Array
    is_dropped_TK: jax.Array
    is_moved_TK: jax.Array
    dropout_TK: Any = None

    @property
    def output_weights_TK(self) -> jax.Array:
        """Returns the combine weights after expert dropout."""
        if self.dropout_TK is None:
            return self.weights_TK
        return self.weights_TK * self.dropout_TK


@takes_numpy
def combine_within_capacity(
    routing: Routing,
    config: MoeConfig,
    capacity_factor: jax.Array | float | None,
    *,
    length: int,
    num_devices: int,
    max_slots_factor: float | None = None,
) -> CombineWeights:
    """Gives slots to choices as far as there are any, and weights to those that have one.

    Args:
      routing: the router's decisions.
      config: of the layer.
      capacity_factor: slots over their mean number; may be traced. None: every choice has a slot.
      length: tokens of a sequence.
      num_devices: into how many equal parts the mesh splits the tokens.
      max_slots_factor: the factor that buffers have room for; None where there are no buffers.
    """
    if capacity_factor is None:
        return _keep_all(routing)
    num_tokens = routing.experts_TK.shape[0]
    num_groups_by_kind = {
        "sequence": num_tokens // length,
        "device": num_devices,
        "global": 1,
    }
    num_groups = num_groups_by_kind[config.capacity_group]
    tokens_per_group = num_tokens // num_groups
    size = (config.top_k, tokens_per_group, config.num_experts)
    factor = jnp.float32(capacity_factor)
    limit = capacity_limit(factor, *size)
    if max_slots_factor is not None:
        max_slots = capacity_slots(max_slots_factor, *size)
        limit = jnp.minimum(limit, max_slots)
    assignment = apply_capacity(
        routing.experts_TK,
        routing.ranking_TE,
        routing.weights_TK,
        limit,
        num_experts=config.num_experts,
        num_groups=num_groups,
        order=config.capacity_order,
        overflow=config.overflow,
    )
    weights_TK = _weights_after_capacity(routing, assignment, config)
    return CombineWeights(
        experts_TK=save_for_remat(assignment.experts_TK),
        weights_TK=checkpoint_name(weights_TK, WEIGHTS),
        is_dropped_TK=assignment.is_dropped_TK,
        is_moved_TK=assignment.is_moved_TK,
    )


def _keep_all(routing: Routing) -> CombineWeights:
    """Returns the router's choices as they are."""
    none_TK = jnp.zeros(routing.experts_TK.shape, bool)
    return CombineWeights(
        experts_TK=routing.experts_TK,
        weights_TK=checkpoint_name(routing.weights_TK, WEIGHTS),
        is_dropped_TK=none_TK,
        is_moved_TK=none_TK,
    )


def _weights_after_capacity(
    routing: Routing,
    assignment: CapacityAssignment,
    config: MoeConfig,
) -> jax.Array:
    """Returns combine weights, 0 where a choice was dropped."""
    weights_TK = routing.weights_TK
    is_dropped_TK = assignment.is_dropped_TK
    if config.overflow == "next":
        # A choice that stays without a slot keeps its part in the normalisation.
        held_TK = jnp.where(is_dropped_TK, routing.experts_TK, assignment.experts_TK)
        weights_TK = combine_weights(routing.log_scores_TE, held_TK, config)
    if config.overflow == "renormalize":
        has_slot_TK = ~is_dropped_TK
        is_choice_TK = routing.experts_TK < config.num_choices
        is_kept_TK = has_slot_TK & is_choice_TK
        return spread_over_survivors(weights_TK, routing.log_weights_TK, is_kept_TK)
    return jnp.where(is_dropped_TK, 0.0, weights_TK)


@takes_numpy
def apply_capacity(
    experts_TK: Int[Array, "T K"],
    ranking_TE: Float[Array, "T E"] | None,
    weights_TK: Float[Array, "T K"],
    limit: Int[Array, ""] | int,
    *,
    num_experts: int,
    num_groups: int,
    order: Literal["position", "choice", "weight"],
    overflow: Literal["drop", "next", "renormalize"],
) -> CapacityAssignment:
    """Gives the slots of each expert to the choices that come first.

    The others are dropped or move to another expert. The order is one of:

    - "position": token by token, each with all its choices. No token's fate depends on a later
      one (causal).
    - "choice": all first choices by position, then all second choices (GShard). A later token's
      first choice takes room from an earlier token's second: this leaks the future.
    - "weight": as "choice", with tokens in falling order of the weight of their first choice, ties
      to the lower position (V-MoE's batch-priority routing). Leaks the future, too.

    What happens to a choice whose expert is full:

    - "drop", "renormalize": it is dropped. They differ in the weights of the survivors, which are
      the caller's.
    - "next": it moves to the best-ranked expert that has room and is not among the token's own
      choices, earlier or later; it is dropped if there is none. So no token visits an expert twice.

    "next" is sequential: it takes L * K dependent steps for each group, and "drop" one sort.

    Args:
      experts_TK: the router's choices, without repetition in a token. Ids from `num_experts` on
        need no slot and are left as they are: masked tokens (E), and experts without weights (zero,
        identity, constant), which are the router's columns after those with slots.
      ranking_TE: what the router selected by; ties to the lowest index, and -inf is never moved to.
        Columns from `num_experts` on have room without limit. Needed by "next" only. E is its
        width, or `num_experts` without it: where there are experts without weights pass it always,
        or a dropped choice has the id of the first of them.
      weights_TK: combine weights before capacity; needed by "weight" only.
      limit: slots per expert and group, 0 or more; may be traced.
      num_experts: experts that have slots.
      num_groups: the tokens are that many contiguous groups of equal length.
      order: which choices come first.
      overflow: what happens to a choice whose expert is full.

    Returns:
      The `CapacityAssignment`. No gradient flows through it.

    Raises:
      ValueError: `num_groups` does not divide the tokens, or "next" has no ranking of at least
        `num_experts` columns.

    Source: Fedus et al. 2021, section 2.2 ("position", "drop"); Lepikhin et al. 2020 (GShard),
    algorithm 1 ("choice"); Riquelme et al. 2021 (V-MoE), section 4.1 ("weight", there by the
    largest weight of a token, which is its first choice's where choices are in order of weight).
    """
    no_expert = num_experts
    if ranking_TE is not None:
        no_expert = ranking_TE.shape[1]
    rule = SlotRule(limit, num_experts, no_expert, order, overflow)
    _check_groups(experts_TK.shape[0], num_groups)
    _check_ranking(ranking_TE, rule)

    def assign(experts_LK, ranking_LE, weights_LK):
        return assign_group(experts_LK, ranking_LE, weights_LK, rule)

    experts_TK = experts_TK.astype(jnp.int32)
    arrays = jax.lax.stop_gradient((experts_TK, ranking_TE, weights_TK))
    groups = jax.tree.map(lambda a_TX: a_TX.reshape(num_groups, -1, a_TX.shape[1]), arrays)
    final_GLK = jax.vmap(assign)(*groups)
    final_TK = final_GLK.reshape(experts_TK.shape)
    is_changed_TK = final_TK != experts_TK
    has_none_TK = final_TK == no_expert
    is_dropped_TK = is_changed_TK & has_none_TK
    is_moved_TK = is_changed_TK & ~is_dropped_TK
    return CapacityAssignment(final_TK, is_dropped_TK, is_moved_TK)


def _check_groups(num_tokens: int, num_groups: int) -> None:
    """Raises if the tokens do not divide into groups."""
    if num_groups < 1 or num_tokens % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {num_tokens} tokens")


def _check_ranking(ranking_TE: jax.Array | None, rule: SlotRule) -> None:
    """Raises if there is no ranking where it is needed, or it has too few columns."""
    if rule.overflow == "next" and ranking_TE is None:
        raise ValueError('overflow="next" needs ranking_TE, the values that the router selected by')
    if rule.no_expert < rule.num_experts:
        raise ValueError(
            f"ranking_TE has {rule.no_expert} columns, fewer than num_experts={rule.num_experts}"
        )


def capacity_slots(
    capacity_factor: float,
    top_k: int,
    tokens_per_group: int,
    num_experts: int,
) -> int:
    """Returns the slots of an expert for one group of tokens.

    They are ceil(capacity_factor * K * tokens / E), between 1 and the number of tokens.
    """
    num_choices = capacity_factor * top_k * tokens_per_group
    num_slots = -(-num_choices // num_experts)
    num_slots = max(1, num_slots)
    return int(min(tokens_per_group, num_slots))


@takes_numpy
def capacity_limit(
    capacity_factor: Float[Array, ""],
    top_k: int,
    tokens_per_group: int,
    num_experts: int,
) -> Int[Array, ""]:
    """Returns `capacity_slots` of a traced factor."""
    mean_choices = top_k * tokens_per_group / num_experts
    # The small term absorbs float32 rounding: 1.1 * 2 * 80 / 8 is 22, not 22.000002.
    limit = jnp.ceil(capacity_factor * mean_choices - 1e-4)
    limit = jnp.clip(limit, 1, tokens_per_group)
    return limit.astype(jnp.int32)
