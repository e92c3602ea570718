"""Which choices of one group of tokens have a slot, and where those without one go.

The choices of a group are in an order, and slots go to those that come first. Here L is the number
of tokens of a group. `capacity.py` calls this for each group.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moejax.kernels.vma import unify_vma, zeros_varying_like


@dataclasses.dataclass(frozen=True)
class SlotRule:
    """Who has a slot.

    Attributes:
      limit: slots per expert and group; may be traced.
      num_experts: experts that have slots; those after them have room without limit.
      no_expert: the id of a choice that is dropped.
      order: which choices come first; see `capacity.apply_capacity`.
      overflow: what happens to a choice whose expert is full; see there.
    """

    limit: Any
    num_experts: int
    no_expert: int
    order: Literal["position", "choice", "weight"]
    overflow: Literal["drop", "next", "renormalize"]

    @property
    def is_choice_major(self) -> bool:
        """Whether all first choices come before all second ones."""
        return self.order != "position"


def assign_group(
    experts_LK: jax.Array,
    ranking_LE: Any,
    weights_LK: jax.Array,
    rule: SlotRule,
) -> jax.Array:
    """Returns the final experts of one group's choices; a ranking is needed by "next" only."""
    if rule.order == "weight":
        return _assign_by_weight(experts_LK, ranking_LE, weights_LK, rule)
    return _assign_in_order(experts_LK, ranking_LE, rule)


def _assign_by_weight(
    experts_LK: jax.Array,
    ranking_LE: Any,
    weights_LK: jax.Array,
    rule: SlotRule,
) -> jax.Array:
    """Assigns tokens in falling order of the weight of their first choice."""
    first_weight_L = weights_LK[:, 0]
    token_L = _argsort(-first_weight_L)
    sorted_experts_LK = experts_LK[token_L]
    sorted_ranking_LE = None
    if ranking_LE is not None:
        sorted_ranking_LE = ranking_LE[token_L]
    sorted_final_LK = _assign_in_order(sorted_experts_LK, sorted_ranking_LE, rule)
    place_L = _argsort(token_L)
    return sorted_final_LK[place_L]


def _assign_in_order(
    experts_LK: jax.Array,
    ranking_LE: Any,
    rule: SlotRule,
) -> jax.Array:
    """Assigns tokens in the order in which they are."""
    if rule.overflow == "next":
        return _reroute(experts_LK, ranking_LE, rule)
    is_late_LK = _is_late(experts_LK, rule)
    return jnp.where(is_late_LK, rule.no_expert, experts_LK)


def _is_late(experts_LK: jax.Array, rule: SlotRule) -> jax.Array:
    """Whether `limit` choices of the same expert come before a choice."""
    wanted_S = _in_order(experts_LK, rule)
    choice_S = _argsort(wanted_S)
    expert_S = wanted_S[choice_S]
    index_S = jnp.arange(wanted_S.shape[0])
    # In the order of experts, `limit` choices of the same expert come before a choice exactly if
    # the choice `limit` places before it has the same expert.
    has_limit_before_S = index_S >= rule.limit
    expert_before_S = expert_S[index_S - rule.limit]
    is_same_S = expert_S == expert_before_S
    is_full_S = has_limit_before_S & is_same_S
    has_slots_S = expert_S < rule.num_experts
    sorted_is_late_S = is_full_S & has_slots_S
    # Back to the order in which the choices come.
    none_S = jnp.zeros_like(sorted_is_late_S)
    is_late_S = none_S.at[choice_S].set(sorted_is_late_S)
    if rule.is_choice_major:
        top_first = experts_LK.shape[::-1]
        return is_late_S.reshape(top_first).T
    return is_late_S.reshape(experts_LK.shape)


def _in_order(x_LK: jax.Array, rule: SlotRule) -> jax.Array:
    """Returns the choices of a group as one axis: token by token, or choice by choice."""
    if rule.is_choice_major:
        return x_LK.T.reshape(-1)
    return x_LK.reshape(-1)


def _reroute(experts_LK: jax.Array, ranking_LE: jax.Array, rule: SlotRule) -> jax.Array:
    """Returns the final experts of one group, found choice by choice; E where one is dropped.

    This must be sequential. Where a choice moves depends on the slots taken by all choices before
    it, moved ones included. In rounds (the first choice of every token, then the second choice of
    those that were refused) a later token's first choice would take the room that an earlier
    refused token moves to, and "position" would leak the future. It costs L * K dependent steps of
    O(K * E) work for each group, in parallel over groups.
    """
    top_k = experts_LK.shape[1]
    width = ranking_LE.shape[1]
    choices_S = jnp.arange(experts_LK.size)
    choice_LK = choices_S.reshape(experts_LK.shape)
    expert_E = jnp.arange(width, dtype=jnp.int32)

    def assign(carry, choice):
        """Assigns one choice, given the slots that those before it have taken."""
        taken_E, final_LK = carry
        token = choice // top_k
        rank = choice % top_k
        # What the token holds by earlier choices, and what its later choices will ask for.
        own_K = final_LK[token]
        ranking_E = ranking_LE[token]
        wanted = own_K[rank]
        has_slot_E = taken_E < limit
        needs_no_slot_E = expert_E >= rule.num_experts
        has_room_E = has_slot_E | needs_no_slot_E
        is_own_E = _is_among(expert_E, own_K)
        is_open_E = has_room_E & ~is_own_E & (ranking_E > -jnp.inf)
        open_ranking_E = jnp.where(is_open_E, ranking_E, -jnp.inf)
        best = jnp.argmax(open_ranking_E)
        best = best.astype(jnp.int32)
        is_full = jnp.any(~has_room_E & (expert_E == wanted))
        is_any_open = jnp.any(is_open_E)
        best_or_none = jnp.where(is_any_open, best, width)
        final = jnp.where(is_full, best_or_none, wanted)
        final_LK = jax.lax.dynamic_update_slice(final_LK, final[None, None], (token, rank))
        taken_E += expert_E == final
        return (taken_E, final_LK), None

    limit = jnp.asarray(rule.limit)
    experts_LK, ranking_LE, limit = unify_vma(experts_LK, ranking_LE, limit)
    none_taken_E = zeros_varying_like(experts_LK, (width,), jnp.int32)
    choice_S = _in_order(choice_LK, rule)
    # Choices that are still to come stand in the carry as the router made them.
    start = (none_taken_E, experts_LK)
    end, _ = jax.lax.scan(assign, start, choice_S)
    _, final_LK = end
    return final_LK


def _is_among(expert_E: jax.Array, own_K: jax.Array) -> jax.Array:
    """Whether each expert is one of the token's own."""
    is_own_KE = own_K[:, None] == expert_E[None, :]
    return jnp.any(is_own_KE, axis=0)


def _argsort(keys_S: jax.Array) -> jax.Array:
    """Returns the stable permutation that sorts the keys."""
    index_S = jnp.arange(keys_S.shape[0], dtype=jnp.int32)
    keys_S, index_S = unify_vma(keys_S, index_S)
    _, order_S = jax.lax.sort(
        (keys_S, index_S),
        num_keys=1,
        is_stable=True,
    )
    return order_S
