"""Capacity: which choices keep a slot when more want an expert than it has slots.

This comes between the router and dispatch: `apply_capacity` decides which choices have a slot, and
`plan.py` where their rows are. Tokens come in groups (a sequence, a device's batch, the global
batch), each with its own slots, so that no group sees another; here L is the number of tokens of a
group.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.config import MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.kernels.vma import unify_vma, zeros_varying_like
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
        none_TK = jnp.zeros(routing.experts_TK.shape, bool)
        weights_TK = checkpoint_name(routing.weights_TK, WEIGHTS)
        return CombineWeights(routing.experts_TK, weights_TK, none_TK, none_TK)
    num_tokens = routing.experts_TK.shape[0]
    num_groups_by_kind = {"sequence": num_tokens // length, "device": num_devices, "global": 1}
    num_groups = num_groups_by_kind[config.capacity_group]
    size = (config.top_k, num_tokens // num_groups, config.num_experts)
    limit = capacity_limit(jnp.float32(capacity_factor), *size)
    if max_slots_factor is not None:
        limit = jnp.minimum(limit, capacity_slots(max_slots_factor, *size))
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
        save_for_remat(assignment.experts_TK),
        checkpoint_name(weights_TK, WEIGHTS),
        assignment.is_dropped_TK,
        assignment.is_moved_TK,
    )


def _weights_after_capacity(
    routing: Routing, assignment: CapacityAssignment, config: MoeConfig
) -> jax.Array:
    """Returns combine weights, 0 where a choice was dropped."""
    weights_TK, is_dropped_TK = routing.weights_TK, assignment.is_dropped_TK
    if config.overflow == "next":
        # A choice that stays without a slot keeps its part in the normalisation.
        held_TK = jnp.where(is_dropped_TK, routing.experts_TK, assignment.experts_TK)
        weights_TK = combine_weights(routing.log_scores_TE, held_TK, config)
    if config.overflow == "renormalize":
        is_kept_TK = ~is_dropped_TK & (routing.experts_TK < config.num_choices)
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

    "next" must be sequential. Where a choice moves depends on the slots taken by all choices before
    it, moved ones included. In rounds (the first choice of every token, then the second choice of
    those that were refused) a later token's first choice would take the room that an earlier
    refused token moves to, and "position" would leak the future. It costs L * K dependent steps of
    O(K * E) work for each group, in parallel over groups; "drop" costs one sort.

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
    num_tokens = experts_TK.shape[0]
    if num_groups < 1 or num_tokens % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {num_tokens} tokens")
    if overflow == "next" and ranking_TE is None:
        raise ValueError('overflow="next" needs ranking_TE, the values that the router selected by')
    no_expert = num_experts if ranking_TE is None else ranking_TE.shape[1]
    if no_expert < num_experts:
        raise ValueError(
            f"ranking_TE has {no_expert} columns, fewer than num_experts={num_experts}"
        )

    choice_major = order != "position"

    def assign_in_order(experts_LK, ranking_LE):
        """Assigns the choices of one group, whose tokens are in the order in which they come."""
        if overflow == "next":
            return _reroute(experts_LK, ranking_LE, limit, num_experts, choice_major)
        is_late_LK = _is_late(experts_LK, limit, num_experts, choice_major)
        return jnp.where(is_late_LK, no_expert, experts_LK)

    def assign_by_weight(experts_LK, ranking_LE, weights_LK):
        token_L = _argsort(-weights_LK[:, 0])
        sorted_experts_LK = experts_LK[token_L]
        sorted_ranking_LE = None if ranking_LE is None else ranking_LE[token_L]
        sorted_final_LK = assign_in_order(sorted_experts_LK, sorted_ranking_LE)
        return sorted_final_LK[_argsort(token_L)]

    def assign_group(experts_LK, ranking_LE, weights_LK):
        if order == "weight":
            return assign_by_weight(experts_LK, ranking_LE, weights_LK)
        return assign_in_order(experts_LK, ranking_LE)

    experts_TK = experts_TK.astype(jnp.int32)
    arrays = jax.lax.stop_gradient((experts_TK, ranking_TE, weights_TK))
    groups = jax.tree.map(lambda x: x.reshape(num_groups, -1, x.shape[1]), arrays)
    final_TK = jax.vmap(assign_group)(*groups).reshape(experts_TK.shape)
    is_changed_TK = final_TK != experts_TK
    is_dropped_TK = is_changed_TK & (final_TK == no_expert)
    is_moved_TK = is_changed_TK & ~is_dropped_TK
    return CapacityAssignment(final_TK, is_dropped_TK, is_moved_TK)


def capacity_slots(
    capacity_factor: float, top_k: int, tokens_per_group: int, num_experts: int
) -> int:
    """Returns the slots of an expert for one group of tokens.

    They are ceil(capacity_factor * K * tokens / E), between 1 and the number of tokens.
    """
    num_choices = capacity_factor * top_k * tokens_per_group
    num_slots = -(-num_choices // num_experts)
    return int(min(tokens_per_group, max(1, num_slots)))


@takes_numpy
def capacity_limit(
    capacity_factor: Float[Array, ""], top_k: int, tokens_per_group: int, num_experts: int
) -> Int[Array, ""]:
    """Returns `capacity_slots` of a traced factor."""
    mean_choices = top_k * tokens_per_group / num_experts
    # The small term absorbs float32 rounding: 1.1 * 2 * 80 / 8 is 22, not 22.000002.
    limit = jnp.ceil(capacity_factor * mean_choices - 1e-4)
    limit = jnp.clip(limit, 1, tokens_per_group)
    return limit.astype(jnp.int32)


def _is_late(experts_LK, limit, num_experts, choice_major):
    """Whether `limit` choices of the same expert come before a choice."""
    wanted_S = _in_order(experts_LK, choice_major)
    choice_S = _argsort(wanted_S)
    expert_S = wanted_S[choice_S]
    index_S = jnp.arange(wanted_S.shape[0])
    # In the order of experts, `limit` choices of the same expert come before a choice exactly if
    # the choice `limit` places before it has the same expert.
    has_limit_before_S = index_S >= limit
    is_same_S = expert_S == expert_S[index_S - limit]
    is_full_S = has_limit_before_S & is_same_S
    sorted_is_late_S = is_full_S & (expert_S < num_experts)
    is_late_S = jnp.zeros_like(sorted_is_late_S).at[choice_S].set(sorted_is_late_S)
    if choice_major:
        return is_late_S.reshape(experts_LK.shape[::-1]).T
    return is_late_S.reshape(experts_LK.shape)


def _in_order(x_LK, choice_major):
    """Returns the choices of a group as one axis: token by token, or choice by choice."""
    if choice_major:
        return x_LK.T.reshape(-1)
    return x_LK.reshape(-1)


def _reroute(experts_LK, ranking_LE, limit, num_experts, choice_major):
    """Returns the final experts of one group, found choice by choice; E where one is dropped."""
    top_k = experts_LK.shape[1]
    width = ranking_LE.shape[1]
    choice_LK = jnp.arange(experts_LK.size).reshape(experts_LK.shape)
    expert_E = jnp.arange(width, dtype=jnp.int32)

    def assign(carry, choice):
        taken_E, final_LK = carry
        token = choice // top_k
        rank = choice % top_k
        # What the token holds by earlier choices, and what its later choices will ask for.
        own_K = final_LK[token]
        ranking_E = ranking_LE[token]
        wanted = own_K[rank]
        has_room_E = (taken_E < limit) | (expert_E >= num_experts)
        is_own_KE = own_K[:, None] == expert_E[None, :]
        is_own_E = jnp.any(is_own_KE, axis=0)
        is_open_E = has_room_E & ~is_own_E & (ranking_E > -jnp.inf)
        open_ranking_E = jnp.where(is_open_E, ranking_E, -jnp.inf)
        best = jnp.argmax(open_ranking_E).astype(jnp.int32)
        is_full = jnp.any(~has_room_E & (expert_E == wanted))
        best_or_none = jnp.where(jnp.any(is_open_E), best, width)
        final = jnp.where(is_full, best_or_none, wanted)
        final_LK = jax.lax.dynamic_update_slice(final_LK, final[None, None], (token, rank))
        taken_E += expert_E == final
        return (taken_E, final_LK), None

    experts_LK, ranking_LE, limit = unify_vma(experts_LK, ranking_LE, jnp.asarray(limit))
    none_taken_E = zeros_varying_like(experts_LK, (width,), jnp.int32)
    choice_S = _in_order(choice_LK, choice_major)
    (_, final_LK), _ = jax.lax.scan(assign, (none_taken_E, experts_LK), choice_S)
    return final_LK


def _argsort(keys):
    """Returns the stable permutation that sorts the keys."""
    index = jnp.arange(keys.shape[0], dtype=jnp.int32)
    keys, index = unify_vma(keys, index)
    _, order = jax.lax.sort((keys, index), num_keys=1, is_stable=True)
    return order
