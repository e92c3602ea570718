"""Dispatch and combine on one device: tokens become rows grouped by expert, and back.

Both movements are permutations (up to repetition and dropping), so both directions are gathers, and
the transpose of each is a gather by the inverse indices: own VJPs avoid XLA's scatter-add. Combine
weights are float32 whatever the dtype of the rows, and so are products with them and sums over a
token's choices, which are rounded once, at the end.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy
from moejax.kernels.rows import add_rows
from moejax.kernels.vma import unify_vma, zeros_varying_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where each choice of each token goes.

    Attributes:
      row_TK: the row of a choice, int32; R where the choice has none (dropped, or the token
        is padding).
      choice_R: the choice t * K + k in a row, int32; T * K where the row is empty.
      group_sizes_E: rows of each expert, int32. Dropless rows are contiguous; with capacity each
        expert has R / E slots of which some are empty, and its group size is R / E.
      expert_R: the expert of a row, int32, in rising order; E or more where a dropless
        row is empty.
    """

    row_TK: jax.Array
    choice_R: jax.Array
    group_sizes_E: jax.Array
    expert_R: jax.Array


@takes_numpy
def plan_dropless(
    experts_TK: Int[Array, "T K"],
    num_experts: int,
    padding_rows: int = 0,
    max_rows: int | None = None,
) -> Plan:
    """Plans rows sorted by expert, one for each choice.

    Rows of masked tokens (expert id E) come last and are empty.

    Args:
      experts_TK: selected experts; E where the token is masked.
      num_experts: E.
      padding_rows: this many empty rows are appended; see `grouped_matmul`.
      max_rows: the caller guarantees that no more choices than these are of experts; None: all
        may be.
    """
    num_choices = experts_TK.size
    experts_S = experts_TK.reshape(num_choices)
    expert_S, choice_S = _sort_with_index(experts_S, num_experts)
    # `choice_S` says which choice is in a row; its inverse, in which row a choice is.
    row_S = _inverse(choice_S)
    num_rows = num_choices
    if max_rows is not None:
        num_rows = min(max_rows, num_choices)
    expert_R = expert_S[:num_rows]
    choice_R = choice_S[:num_rows]
    is_filled_R = expert_R < num_experts
    choice_R = jnp.where(is_filled_R, choice_R, num_choices)
    row_TK = row_S.reshape(experts_TK.shape)
    has_row_TK = experts_TK < num_experts
    no_row = num_rows + padding_rows
    no_expert = jnp.iinfo(jnp.int32).max
    return Plan(
        row_TK=jnp.where(has_row_TK, row_TK, no_row),
        choice_R=_pad_end(choice_R, padding_rows, num_choices),
        group_sizes_E=_group_sizes(expert_R, num_experts),
        expert_R=_pad_end(expert_R, padding_rows, no_expert),
    )


@takes_numpy
def plan_capacity(
    experts_BLK: Int[Array, "B L K"],
    num_experts: int,
    slots: int,
) -> Plan:
    """Plans rows in slots `[E, B, C]`.

    Each expert takes its first choices of each sequence and drops the rest.

    Order is by position, then by rank of the choice, so that no token's fate depends on a later
    token; counting is per sequence, so that it does not depend on the other sequences of the batch
    or on the mesh.

    Args:
      experts_BLK: selected experts; E where the token is masked.
      num_experts: E.
      slots: C, the slots of an expert for one sequence.

    Source: Fedus et al. 2021, section 2.2; GShard (Lepikhin et al. 2020) drops by rank of the
    choice first instead.
    """
    batch, length, top_k = experts_BLK.shape
    per_sequence = length * top_k
    num_choices = batch * per_sequence
    num_rows = num_experts * batch * slots

    experts_BS = experts_BLK.reshape(batch, per_sequence)
    find_places = functools.partial(_places_in_sequence, num_experts=num_experts)
    place_BS = jax.vmap(find_places)(experts_BS)
    sequence_B1 = jnp.arange(batch)[:, None]
    is_kept_BS = (experts_BS < num_experts) & (place_BS < slots)
    # Rows are expert by expert, within an expert sequence by sequence.
    first_slot_BS = (experts_BS * batch + sequence_B1) * slots
    slot_BS = first_slot_BS + place_BS
    row_BS = jnp.where(is_kept_BS, slot_BS, num_rows)
    row_S = row_BS.reshape(num_choices)
    row_S = row_S.astype(jnp.int32)
    choices_S = jnp.arange(num_choices, dtype=jnp.int32)
    empty_R = jnp.full(num_rows, num_choices, jnp.int32)
    return Plan(
        row_TK=row_S.reshape(batch * length, top_k),
        choice_R=empty_R.at[row_S].set(choices_S, mode="drop"),
        group_sizes_E=jnp.full(num_experts, batch * slots, jnp.int32),
        expert_R=experts_of_equal_groups(num_experts, batch * slots),
    )


def _places_in_sequence(experts_S: jax.Array, num_experts: int) -> jax.Array:
    """Returns the place of each choice of a sequence among the choices of its expert."""
    expert_S, choice_S = _sort_with_index(experts_S, num_experts)
    sizes_E = _group_sizes(expert_S, num_experts)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    # One more, for choices of no expert.
    starts = jnp.append(starts_E, 0)
    index_S = jnp.arange(experts_S.size)
    place_S = index_S - starts[expert_S]
    zeros_S = jnp.zeros(experts_S.size, jnp.int32)
    place_S = place_S.astype(jnp.int32)
    return zeros_S.at[choice_S].set(place_S)


def experts_of_equal_groups(num_experts: int, rows_per_expert: int) -> jax.Array:
    """Returns the expert of each row, where all have the same number of rows."""
    expert_E = jnp.arange(num_experts, dtype=jnp.int32)
    return jnp.repeat(expert_E, rows_per_expert)


def _inverse(choice_S: jax.Array) -> jax.Array:
    """Returns the inverse of a permutation: the place of each choice."""
    num_choices = choice_S.shape[0]
    zeros_S = jnp.zeros(num_choices, jnp.int32)
    place_S = jnp.arange(num_choices, dtype=jnp.int32)
    return zeros_S.at[choice_S].set(place_S)


def _pad_end(x_R: jax.Array, count: int, value: int) -> jax.Array:
    """Returns the array with `count` more entries of this value."""
    return jnp.pad(x_R, (0, count), constant_values=value)


@takes_numpy
def dispatch(x_TD: Float[Array, "T D"], plan: Plan) -> Float[Array, "R D"]:
    """Copies each token to the rows of its choices; empty rows are zeros."""
    x_TD, _ = unify_vma(x_TD, plan.choice_R)
    return _dispatch(x_TD, plan)


@takes_numpy
def add_up(y_RD: Float[Array, "R D"], plan: Plan) -> Float[Array, "T D"]:
    """Adds up each token's rows, without weights: the transpose of `dispatch`.

    It keeps no rows for a gradient.
    """
    y_RD, _ = unify_vma(y_RD, plan.row_TK)
    return _add_up(y_RD, plan)


@jax.custom_vjp
def _dispatch(x_TD, plan):
    top_k = plan.row_TK.shape[1]
    return _gather(x_TD, plan.choice_R // top_k)


@jax.custom_vjp
def _add_up(y_RD, plan):
    return add_rows(y_RD, plan.row_TK)


def _dispatch_forward(x_TD, plan):
    return _dispatch(x_TD, plan), plan


def _dispatch_backward(plan, dy_RD):
    return _add_up(dy_RD, plan), None


def _add_up_forward(y_RD, plan):
    return _add_up(y_RD, plan), plan


def _add_up_backward(plan, dy_TD):
    return _dispatch(dy_TD, plan), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)
_add_up.defvjp(_add_up_forward, _add_up_backward)


@takes_numpy
def dispatch_weights(weights_TK: Float[Array, "T K"], plan: Plan) -> Float[Array, "R"]:
    """Returns the weight of the choice in each row; 0 in empty rows."""
    # Each choice is a token of one choice: the same movement with K = 1.
    row_S1 = plan.row_TK.reshape(-1, 1)
    plan_of_choices = dataclasses.replace(plan, row_TK=row_S1)
    weights_S1 = weights_TK.reshape(-1, 1)
    weights_R1 = dispatch(weights_S1, plan_of_choices)
    return weights_R1[:, 0]


@takes_numpy
def combine(
    y_RD: Float[Array, "R D"],
    weights_TK: Float[Array, "T K"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """Adds up each token's rows with their weights; a choice without a row adds nothing."""
    y_RD, weights_TK, _ = unify_vma(y_RD, weights_TK, plan.row_TK)
    return _combine(y_RD, weights_TK, plan)


@jax.custom_vjp
def _combine(y_RD, weights_TK, plan):
    return add_rows(y_RD, plan.row_TK, weights_TK)


def _combine_forward(y_RD, weights_TK, plan):
    return _combine(y_RD, weights_TK, plan), (y_RD, weights_TK, plan)


def _combine_backward(residuals, dy_TD):
    y_RD, weights_TK, plan = residuals
    top_k = weights_TK.shape[1]
    weights_S = weights_TK.reshape(-1)
    weight_R = _gather(weights_S, plan.choice_R)
    weight_R1 = weight_R[:, None].astype(jnp.float32)
    token_R = plan.choice_R // top_k
    dy_of_token_RD = _gather(dy_TD, token_R)
    dy_RD = weight_R1 * dy_of_token_RD.astype(jnp.float32)
    y_TKD = _gather(y_RD, plan.row_TK)
    dweights_TK = jnp.einsum(
        "TD,TKD->TK",
        dy_TD,
        y_TKD,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    dy_RD = dy_RD.astype(y_RD.dtype)
    dweights_TK = dweights_TK.astype(weights_TK.dtype)
    return dy_RD, dweights_TK, None


_combine.defvjp(_combine_forward, _combine_backward)


@takes_numpy
def take_slots(
    x_BLD: Float[Array, "B L D"],
    positions_BEC: Int[Array, "B E C"],
) -> Float[Array, "B E C D"]:
    """Returns the token of each slot, where experts choose; zeros in empty ones (position L)."""
    x_BLD, positions_BEC = unify_vma(x_BLD, positions_BEC)
    return _take_slots(x_BLD, positions_BEC, x_BLD.shape[1])


@takes_numpy
def add_slots(
    y_BECD: Float[Array, "B E C D"],
    positions_BEC: Int[Array, "B E C"],
    length: int,
) -> Float[Array, "B L D"]:
    """Adds up the slots of each token: the transpose of `take_slots`.

    Sums are float32, and the result has the dtype of the slots.
    """
    y_BECD, positions_BEC = unify_vma(y_BECD, positions_BEC)
    return _add_slots(y_BECD, positions_BEC, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_slots(x_BLD, positions_BEC, length):
    return jax.vmap(_gather)(x_BLD, positions_BEC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_slots(y_BECD, positions_BEC, length):
    d_model = y_BECD.shape[-1]

    def add_sequence(y_ECD, positions_EC):
        zeros_LD = zeros_varying_like(y_ECD, (length, d_model), jnp.float32)
        y_ECD = y_ECD.astype(jnp.float32)
        return zeros_LD.at[positions_EC].add(y_ECD, mode="drop")

    y_BLD = jax.vmap(add_sequence)(y_BECD, positions_BEC)
    return y_BLD.astype(y_BECD.dtype)


def _take_slots_forward(x_BLD, positions_BEC, length):
    return _take_slots(x_BLD, positions_BEC, length), positions_BEC


def _take_slots_backward(length, positions_BEC, dx_BECD):
    return _add_slots(dx_BECD, positions_BEC, length), None


def _add_slots_forward(y_BECD, positions_BEC, length):
    return _add_slots(y_BECD, positions_BEC, length), positions_BEC


def _add_slots_backward(length, positions_BEC, dy_BLD):
    return _take_slots(dy_BLD, positions_BEC, length), None


_take_slots.defvjp(_take_slots_forward, _take_slots_backward)
_add_slots.defvjp(_add_slots_forward, _add_slots_backward)


def _gather(x, index):
    """Returns rows of `x`; zeros where the index is out of range, which is how plans say "none"."""
    return x.at[index].get(mode="fill", fill_value=0)


def _sort_with_index(keys_S, num_experts):
    """Returns the sorted keys and the stable permutation that sorts them.

    Keys above `num_experts` count as `num_experts`. Key and index share one integer where it is
    wide enough: XLA:CPU sorts one array 4 to 6 times as fast as a pair.
    """
    length = keys_S.shape[0]
    index_S = jnp.arange(length, dtype=jnp.int32)
    keys_S = jnp.minimum(keys_S, num_experts)
    keys_S = keys_S.astype(jnp.int32)
    keys_S, index_S = unify_vma(keys_S, index_S)
    num_joint_keys = (num_experts + 1) * length
    if num_joint_keys >= 2**31:
        return jax.lax.sort(
            (keys_S, index_S),
            num_keys=1,
            is_stable=True,
        )
    # Joint keys differ, so that an unstable sort gives the stable permutation.
    joint_S = keys_S * length + index_S
    joint_S = jax.lax.sort(joint_S, is_stable=False)
    return joint_S // length, joint_S % length


def _group_sizes(sorted_experts_S, num_experts):
    """Returns how many of the sorted ids are of each expert."""
    expert_E = jnp.arange(num_experts)
    ends_E = jnp.searchsorted(sorted_experts_S, expert_E, side="right")
    ends_E = ends_E.astype(jnp.int32)
    return jnp.diff(ends_E, prepend=0)
