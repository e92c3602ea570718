"""The experts' feed-forward networks from tokens to tokens in one pass over grouped rows, for CPU.

What a layer of separate steps writes and reads again (rows of tokens, hidden units, rows of
outputs) stays within a tile: it gathers its rows from the tokens, multiplies by gate and up
projections in one product, activates, multiplies by the combine weight, and by the down projection.
Between forward and backward only the projections of the rows are kept. The backward pass forms
every gradient in one loop of the same kind; that of a combine weight needs no output: for y = w *
act(h) @ down it is the sum of act(h) * (dy @ down^T).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy
from moejax.kernels.batching import each_arm, merge, split
from moejax.kernels.rows import add_rows
from moejax.kernels.tiles import Groups, dynamic_slice, dynamic_update
from moejax.kernels.vma import empty_varying_like, unify_vma


class SecondDerivativeError(ValueError):
    """A derivative that is of too high an order."""


Activate = Callable[[list[jax.Array]], jax.Array]


@takes_numpy
def feed_forward(
    x_TD: Float[Array, "T D"],
    weights_TK: Float[Array, "T K"],
    gate_up_EDPF: Float[Array, "E D P F"],
    down_EFD: Float[Array, "E F D"],
    row_TK: Int[Array, "T K"],
    choice_R: Int[Array, "R"],
    group_sizes_E: Int[Array, "E"],
    *,
    activate: Activate,
    sizes: tuple[int, ...],
    max_rows: int | None = None,
) -> Float[Array, "T D"]:
    """Adds up each token's outputs of its experts, times their combine weights.

    Computes `sum_k weights[t, k] * down(activate(gate_up(x[t])))`.

    Args:
      x_TD: tokens, float32 or bfloat16.
      weights_TK: combine weights.
      gate_up_EDPF: P projections of every expert.
      down_EFD: the projection out of every expert.
      row_TK: the row of a choice among the rows sorted by expert; R where it has none.
      choice_R: the choice t * K + k in a row; T * K where the row is empty. R is `max_rows` plus
        the largest of `sizes`, for the last tile may reach there.
      group_sizes_E: rows of each expert.
      activate: from P arrays `[rows, F]` to the hidden units `[rows, F]`.
      sizes: of tiles, rising; see `tile_sizes`.
      max_rows: no more rows are in groups; None: T * K.

    Returns:
      The outputs, in the dtype of `x_TD` with float32 accumulation; zeros for a token without rows.
      An expert without rows has exactly zero gradient.

    Raises:
      ValueError: too few padding rows.
      SecondDerivativeError: while its gradients are differentiated.
    """
    num_rows = choice_R.shape[0]
    num_needed = (max_rows or weights_TK.size) + sizes[-1]
    if num_rows < num_needed:
        # A slice that would pass the end is silently moved back, onto rows of other experts.
        raise ValueError(
            f"choice_R has {num_rows} rows and must have {num_needed}; "
            f"plan with padding_rows={sizes[-1]}"
        )
    gate_up_EDP = gate_up_EDPF.reshape(*gate_up_EDPF.shape[:2], -1)
    # Outside of the custom VJP: the transpose sums the gradient of replicated weights over devices.
    arrays = unify_vma(x_TD, weights_TK, gate_up_EDP, down_EFD, row_TK, choice_R, group_sizes_E)
    sizes_E = arrays[-1]
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    return _feed_forward(activate, sizes, *arrays, starts_E)


class _Inputs(NamedTuple):
    """What both passes read: the arguments of `feed_forward`, with the projections in one axis P.

    `starts_E` is the first row of each expert, which is not the sum of the sizes before it where
    several arms share one call.
    """

    x_TD: jax.Array
    weights_TK: jax.Array
    gate_up_EDP: jax.Array
    down_EFD: jax.Array
    row_TK: jax.Array
    choice_R: jax.Array
    sizes_E: jax.Array
    starts_E: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed_forward(activate, sizes, *arrays):
    forward_pass = functools.partial(_forward_pass, activate, sizes, keep=False)
    y_TD, _ = _over_arms(forward_pass, *arrays)
    return y_TD


def _forward(activate, sizes, *arrays):
    y_TD, projected_RP = _with_projections(activate, sizes, *arrays)
    return y_TD, (projected_RP, arrays)


def _backward(activate, sizes, residuals, dy_TD):
    projected_RP, arrays = residuals
    gradients = _gradients(activate, sizes, *arrays, projected_RP, dy_TD)
    # Rows, choices, sizes and starts are integers.
    return *gradients, None, None, None, None


_feed_forward.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_projections(activate, sizes, *arrays):
    forward_pass = functools.partial(_forward_pass, activate, sizes, keep=True)
    return _over_arms(forward_pass, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(activate, sizes, *arrays):
    backward_pass = functools.partial(_backward_pass, activate, sizes)
    return _over_arms(backward_pass, *arrays)


def _refuse(activate, sizes, *arrays):
    """Refuses second derivatives: neither pass of the first can be differentiated."""
    raise SecondDerivativeError(
        "moe.grouped_matmul=tiled: its pass from tokens to tokens has first derivatives only; "
        "for second ones use moe.grouped_matmul=padded"
    )


_with_projections.defvjp(_refuse, _refuse)
_gradients.defvjp(_refuse, _refuse)


def _over_arms(function, *arrays):
    """Returns `function(inputs, *others)`; `vmap` over A arms makes one call of A * E experts.

    Plain `vmap` would run each loop over tiles for as long as the fullest of an expert's arms
    needs, and throw away what it computes for the others. Here the arms follow each other, each
    with its padding rows at its end.

    Args:
      function: its results have tokens, rows or experts on their first axis.
      arrays: the fields of `_Inputs`, then `others`, which have such a first axis too.
    """
    num_inputs = len(_Inputs._fields)

    @custom_vmap
    def one(*arrays):
        inputs = _Inputs(*arrays[:num_inputs])
        return function(inputs, *arrays[num_inputs:])

    @one.def_vmap
    def all_arms(num_arms: int, is_batched, *arrays):
        each = each_arm(num_arms, is_batched, arrays)
        inputs = _Inputs(*each[:num_inputs])
        others = each[num_inputs:]
        inputs = _number_across_arms(inputs, num_arms)
        folded = map(merge, (*inputs, *others))
        results = _over_arms(function, *folded)
        by_arm = tuple(split(result, num_arms) for result in results)
        return by_arm, (True,) * len(by_arm)

    return one(*arrays)


def _number_across_arms(inputs: _Inputs, num_arms: int) -> _Inputs:
    """Counts the rows and choices of each arm on from those of the arm before.

    All arrays have a leading axis of arms. "No row" and "no choice" become the numbers of all rows
    and of all choices.
    """
    row_ATK, choice_AR, starts_AE = inputs.row_TK, inputs.choice_R, inputs.starts_E
    num_rows = choice_AR.shape[1]
    num_choices = inputs.weights_TK[0].size
    first_row_A = jnp.arange(num_arms) * num_rows
    first_choice_A = jnp.arange(num_arms) * num_choices
    is_row_ATK = row_ATK < num_rows
    row_in_all_ATK = row_ATK + first_row_A[:, None, None]
    row_ATK = jnp.where(is_row_ATK, row_in_all_ATK, num_arms * num_rows)
    is_choice_AR = choice_AR < num_choices
    choice_in_all_AR = choice_AR + first_choice_A[:, None]
    choice_AR = jnp.where(is_choice_AR, choice_in_all_AR, num_arms * num_choices)
    first_row_A1 = first_row_A[:, None]
    starts_AE = starts_AE + first_row_A1.astype(starts_AE.dtype)
    return inputs._replace(row_TK=row_ATK, choice_R=choice_AR, starts_E=starts_AE)


def _forward_pass(activate, sizes, inputs: _Inputs, *, keep: bool):
    """Returns the outputs of tokens, and the projections of rows (none, unless `keep`)."""
    groups = Groups.from_sizes(inputs.sizes_E, inputs.starts_E, sizes)
    y_RD, projected_RP = _forward_rows(activate, groups, inputs, keep=keep)
    y_TD = add_rows(y_RD, inputs.row_TK)
    return y_TD.astype(inputs.x_TD.dtype), projected_RP


def _backward_pass(activate, sizes, inputs: _Inputs, projected_RP, dy_TD):
    """Returns the gradients of tokens, of combine weights and of all matrices."""
    groups = Groups.from_sizes(inputs.sizes_E, inputs.starts_E, sizes)
    dx_RD, dweight_R, dgate_up_EDP, ddown_EFD = _backward_rows(
        activate, groups, inputs, projected_RP, dy_TD
    )
    dweights_TK = dweight_R.at[inputs.row_TK].get(mode="fill", fill_value=0)
    dweights_TK = dweights_TK.astype(inputs.weights_TK.dtype)
    dgate_up_EDP = dgate_up_EDP.astype(inputs.gate_up_EDP.dtype)
    ddown_EFD = ddown_EFD.astype(inputs.down_EFD.dtype)
    dx_TD = add_rows(dx_RD, inputs.row_TK).astype(dy_TD.dtype)
    return dx_TD, dweights_TK, dgate_up_EDP, ddown_EFD


def _forward_rows(activate, groups: Groups, inputs: _Inputs, *, keep: bool):
    """Returns weighted outputs of the rows and, with `keep`, their projections.

    Rows that belong to no expert are left undefined.
    """
    token_R, weight_R = _of_rows(inputs.weights_TK, inputs.choice_R)
    num_rows = inputs.choice_R.shape[0]
    d_model = inputs.x_TD.shape[1]
    num_projected = inputs.gate_up_EDP.shape[2]
    x_TD = _to_float32(inputs.x_TD)

    def one_expert(e, carry):
        gate_up_DP = _matrix(inputs.gate_up_EDP, e)
        down_FD = _matrix(inputs.down_EFD, e)

        def one_tile(size, row, carry):
            y_RD, projected_RP = carry
            x_bD = _gather(x_TD, dynamic_slice(token_R, row, size))
            projected_bP = _dot(x_bD, gate_up_DP, 1, 0)
            hidden_bF = activate(_split(projected_bP, down_FD.shape[0]))
            hidden_bF = hidden_bF * dynamic_slice(weight_R, row, size)[:, None]
            y_RD = dynamic_update(y_RD, _dot(hidden_bF, down_FD, 1, 0), row)
            if keep:
                projected_RP = dynamic_update(projected_RP, projected_bP, row)
            return y_RD, projected_RP

        return groups.for_each_tile(e, one_tile, one_tile, carry)

    num_kept = num_rows if keep else 0
    y_RD = empty_varying_like(x_TD, (num_rows, d_model), jnp.float32)
    projected_RP = empty_varying_like(x_TD, (num_kept, num_projected), jnp.float32)
    return groups.for_each_active(one_expert, (y_RD, projected_RP))


def _backward_rows(activate, groups: Groups, inputs: _Inputs, projected_RP, dy_TD):
    """Returns the gradients of rows, of their weights and of all matrices, in float32.

    Rows that belong to no expert are left undefined.
    """
    token_R, weight_R = _of_rows(inputs.weights_TK, inputs.choice_R)
    x_TD = _to_float32(inputs.x_TD)
    dy_TD = _to_float32(dy_TD)

    def one_expert(e, carry):
        gate_up_DP = _matrix(inputs.gate_up_EDP, e)
        down_FD = _matrix(inputs.down_EFD, e)

        def one_tile(size, row, row_gradients):
            """Writes the gradients of a tile's rows; returns its part of those of the matrices."""
            dx_RD, dweight_R = row_gradients
            token_b = dynamic_slice(token_R, row, size)
            # Rows past the group's end are of other experts, or undefined: they must not reach
            # the matrices.
            is_row_b = row + jnp.arange(size) < groups.ends_E[e]
            is_row_b1 = is_row_b[:, None]
            x_bD = jnp.where(is_row_b1, _gather(x_TD, token_b), 0)
            dy_bD = jnp.where(is_row_b1, _gather(dy_TD, token_b), 0)
            weight_b1 = dynamic_slice(weight_R, row, size)[:, None]
            projected_bP = jnp.where(is_row_b1, dynamic_slice(projected_RP, row, size), 0)
            hidden_bF, pull = jax.vjp(activate, _split(projected_bP, down_FD.shape[0]))
            dhidden_bF = _dot(dy_bD, down_FD, 1, 1)
            (dprojections,) = pull(dhidden_bF * weight_b1)
            dprojected_bP = jnp.concatenate(dprojections, axis=1)
            dx_RD = dynamic_update(dx_RD, _dot(dprojected_bP, gate_up_DP, 1, 1), row)
            dweight_b = (hidden_bF * dhidden_bF).sum(axis=1)
            dweight_R = dynamic_update(dweight_R, dweight_b, row)
            dgate_up_DP = _outer_products(x_bD, dprojected_bP)
            ddown_FD = _outer_products(hidden_bF * weight_b1, dy_bD)
            return (dx_RD, dweight_R), (dgate_up_DP, ddown_FD)

        # The rest comes first: it sets the expert's gradients, to which the full tiles add.
        def rest(size, row, carry):
            row_gradients, matrix_gradients = carry
            row_gradients, parts = one_tile(size, row, row_gradients)
            return row_gradients, _set_expert(matrix_gradients, parts, e)

        def full(size, row, carry):
            row_gradients, matrix_gradients = carry
            row_gradients, parts = one_tile(size, row, row_gradients)
            return row_gradients, _add_to_expert(matrix_gradients, parts, e)

        return groups.for_each_tile(e, rest, full, carry)

    num_rows = inputs.choice_R.shape[0]
    row_gradients = (
        empty_varying_like(x_TD, (num_rows, x_TD.shape[1]), jnp.float32),
        empty_varying_like(x_TD, (num_rows,), jnp.float32),
    )
    matrix_gradients = (
        empty_varying_like(x_TD, inputs.gate_up_EDP.shape, jnp.float32),
        empty_varying_like(x_TD, inputs.down_EFD.shape, jnp.float32),
    )
    carry = groups.for_each_active(one_expert, (row_gradients, matrix_gradients))
    row_gradients, matrix_gradients = carry
    return *row_gradients, *groups.for_each_empty(_clear_expert, matrix_gradients)


def _set_expert(totals, parts, e):
    """Sets the gradients of one expert's matrices."""
    pairs = zip(totals, parts, strict=True)
    return tuple(_replace(total_EPQ, part_PQ, e) for total_EPQ, part_PQ in pairs)


def _add_to_expert(totals, parts, e):
    """Adds to the gradients of one expert's matrices."""
    pairs = zip(totals, parts, strict=True)
    return tuple(_replace(total_EPQ, total_EPQ[e] + part_PQ, e) for total_EPQ, part_PQ in pairs)


def _clear_expert(e, totals):
    """Sets the gradients of one expert's matrices to zero."""
    cleared = []
    for total_EPQ in totals:
        zeros_PQ = jnp.zeros_like(total_EPQ, shape=total_EPQ.shape[1:])
        cleared.append(_replace(total_EPQ, zeros_PQ, e))
    return tuple(cleared)


def _of_rows(weights_TK, choice_R):
    """Returns the token and the weight of each row."""
    weight_R = weights_TK.reshape(-1).at[choice_R].get(mode="fill", fill_value=0)
    token_R = choice_R // weights_TK.shape[1]
    return token_R, _to_float32(weight_R)


def _gather(x_TD, token_b):
    """Returns rows of tokens; those of tokens out of range are not used."""
    return x_TD.at[token_b].get(mode="clip")


def _matrix(w_EPQ, e):
    """Returns the matrix of one expert in float32.

    XLA:CPU slices bfloat16 by way of float32 and would convert all matrices before the loop, as
    they do not change in it: after a barrier with `e` they might.
    """
    w_EPQ, e = lax.optimization_barrier((w_EPQ, e))
    return _to_float32(lax.dynamic_index_in_dim(w_EPQ, e, keepdims=False))


def _replace(w_EPQ, w_PQ, e):
    """Replaces the matrix of one expert."""
    return lax.dynamic_update_index_in_dim(w_EPQ, w_PQ, e, axis=0)


def _split(projected_bP, width: int) -> list[jax.Array]:
    """Returns the projections, each of this width."""
    starts = range(0, projected_bP.shape[1], width)
    return [projected_bP[:, start : start + width] for start in starts]


def _dot(a, b, a_axis: int, b_axis: int):
    """Contracts one axis of each of two matrices, in float32."""
    contracted = ((a_axis,), (b_axis,))
    no_batch = ((), ())
    return lax.dot_general(a, b, (contracted, no_batch), preferred_element_type=jnp.float32)


def _outer_products(a_bP, b_bQ):
    """Returns the sum of the outer products of rows.

    XLA:CPU is up to twice as fast if the left side is transposed first.
    """
    return _dot(lax.optimization_barrier(a_bP.T), b_bQ, 1, 0)


def _to_float32(x):
    """Converts to float32, which CPUs multiply and move faster than bfloat16."""
    return x.astype(jnp.float32)
