"""The two passes over grouped rows of the experts' feed-forward networks, without their gradients.

`fused_feed_forward.py` joins them to a function with a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.rows import add_rows
from moejax.kernels.tiles import Groups, dynamic_slice, dynamic_update
from moejax.kernels.vma import empty_varying_like

Activate = Callable[[list[jax.Array]], jax.Array]
"""From P projections `[rows, F]` to the hidden units `[rows, F]`."""


class Inputs(NamedTuple):
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


def forward_pass(
    activate: Activate,
    sizes: tuple[int, ...],
    inputs: Inputs,
    *,
    keep: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs of tokens, and the projections of rows (none, unless `keep`)."""
    groups = Groups.from_sizes(inputs.sizes_E, inputs.starts_E, sizes)
    y_RD, projected_RP = _forward_rows(activate, groups, inputs, keep=keep)
    y_TD = add_rows(y_RD, inputs.row_TK)
    y_TD = y_TD.astype(inputs.x_TD.dtype)
    return y_TD, projected_RP


def backward_pass(
    activate: Activate,
    sizes: tuple[int, ...],
    inputs: Inputs,
    projected_RP: jax.Array,
    dy_TD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of tokens, of combine weights and of all matrices."""
    groups = Groups.from_sizes(inputs.sizes_E, inputs.starts_E, sizes)
    gradients = _backward_rows(activate, groups, inputs, projected_RP, dy_TD)
    dx_RD, dweight_R, dgate_up_EDP, ddown_EFD = gradients
    dweights_TK = dweight_R.at[inputs.row_TK].get(mode="fill", fill_value=0)
    dweights_TK = dweights_TK.astype(inputs.weights_TK.dtype)
    dgate_up_EDP = dgate_up_EDP.astype(inputs.gate_up_EDP.dtype)
    ddown_EFD = ddown_EFD.astype(inputs.down_EFD.dtype)
    dx_TD = add_rows(dx_RD, inputs.row_TK)
    dx_TD = dx_TD.astype(dy_TD.dtype)
    return dx_TD, dweights_TK, dgate_up_EDP, ddown_EFD


def _forward_rows(activate, groups: Groups, inputs: Inputs, *, keep: bool):
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
            token_b = dynamic_slice(token_R, row, size)
            x_bD = _gather(x_TD, token_b)
            projected_bP = _dot(x_bD, gate_up_DP, 1, 0)
            projections = _split(projected_bP, down_FD.shape[0])
            hidden_bF = activate(projections)
            # The product is linear, so that weighting its input weighs the output.
            weight_b = dynamic_slice(weight_R, row, size)
            weighted_bF = hidden_bF * weight_b[:, None]
            y_bD = _dot(weighted_bF, down_FD, 1, 0)
            y_RD = dynamic_update(y_RD, y_bD, row)
            if keep:
                projected_RP = dynamic_update(projected_RP, projected_bP, row)
            return y_RD, projected_RP

        return groups.for_each_tile(e, one_tile, one_tile, carry)

    num_kept = num_rows if keep else 0
    y_RD = _empty(x_TD, num_rows, d_model)
    projected_RP = _empty(x_TD, num_kept, num_projected)
    return groups.for_each_active(one_expert, (y_RD, projected_RP))


class _BackwardRows(NamedTuple):
    """What the backward pass reads, in float32: by token and by row."""

    x_TD: jax.Array
    dy_TD: jax.Array
    token_R: jax.Array
    weight_R: jax.Array
    projected_RP: jax.Array


class _Tile(NamedTuple):
    """What the backward pass reads for the b rows of a tile."""

    x_bD: jax.Array
    dy_bD: jax.Array
    weight_b1: jax.Array
    projected_bP: jax.Array


class _Hidden(NamedTuple):
    """The hidden units of a tile, their gradients without the combine weight, and those before."""

    hidden_bF: jax.Array
    dhidden_bF: jax.Array
    dprojected_bP: jax.Array


def _backward_rows(activate, groups: Groups, inputs: Inputs, projected_RP, dy_TD):
    """Returns the gradients of rows, of their weights and of all matrices, in float32.

    Rows that belong to no expert are left undefined.
    """
    token_R, weight_R = _of_rows(inputs.weights_TK, inputs.choice_R)
    x_TD = _to_float32(inputs.x_TD)
    dy_TD = _to_float32(dy_TD)
    rows = _BackwardRows(x_TD, dy_TD, token_R, weight_R, projected_RP)

    def one_expert(e, carry):
        gate_up_DP = _matrix(inputs.gate_up_EDP, e)
        down_FD = _matrix(inputs.down_EFD, e)

        def one_tile(size, row, row_gradients):
            """Writes the gradients of a tile's rows; returns its part of those of the matrices."""
            dx_RD, dweight_R = row_gradients
            token_b = dynamic_slice(token_R, row, size)
            is_row_b1 = _is_in_group(groups, e, row, size)
            tile = _read_tile(rows, token_b, is_row_b1, row)
            hidden = _differentiate_hidden(activate, tile, down_FD)
            dx_bD = _dot(hidden.dprojected_bP, gate_up_DP, 1, 1)
            dx_RD = dynamic_update(dx_RD, dx_bD, row)
            product_bF = hidden.hidden_bF * hidden.dhidden_bF
            dweight_b = product_bF.sum(axis=1)
            dweight_R = dynamic_update(dweight_R, dweight_b, row)
            dgate_up_DP = _outer_products(tile.x_bD, hidden.dprojected_bP)
            weighted_bF = hidden.hidden_bF * tile.weight_b1
            ddown_FD = _outer_products(weighted_bF, tile.dy_bD)
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
    d_model = x_TD.shape[1]
    row_gradients = (
        _empty(x_TD, num_rows, d_model),
        _empty(x_TD, num_rows),
    )
    matrix_gradients = (
        _empty(x_TD, *inputs.gate_up_EDP.shape),
        _empty(x_TD, *inputs.down_EFD.shape),
    )
    carry = (row_gradients, matrix_gradients)
    row_gradients, matrix_gradients = groups.for_each_active(one_expert, carry)
    matrix_gradients = groups.for_each_empty(_clear_expert, matrix_gradients)
    return *row_gradients, *matrix_gradients


def _is_in_group(groups: Groups, e, row, size: int):
    """Whether each row of a tile is of the tile's expert, as `[b, 1]`.

    Rows past the group's end are of other experts, or undefined: they must not reach the matrices.
    """
    row_b = row + jnp.arange(size)
    is_row_b = row_b < groups.ends_E[e]
    return is_row_b[:, None]


def _read_tile(rows: _BackwardRows, token_b, is_row_b1, row) -> _Tile:
    """Returns what stands in the rows of a tile; zeros in those of other experts."""
    size = token_b.shape[0]
    x_bD = _gather(rows.x_TD, token_b)
    x_bD = jnp.where(is_row_b1, x_bD, 0)
    dy_bD = _gather(rows.dy_TD, token_b)
    dy_bD = jnp.where(is_row_b1, dy_bD, 0)
    weight_b = dynamic_slice(rows.weight_R, row, size)
    weight_b1 = weight_b[:, None]
    projected_bP = dynamic_slice(rows.projected_RP, row, size)
    projected_bP = jnp.where(is_row_b1, projected_bP, 0)
    return _Tile(x_bD, dy_bD, weight_b1, projected_bP)


def _differentiate_hidden(activate, tile: _Tile, down_FD) -> _Hidden:
    """Activates the projections of a tile again, and takes the gradients back to them."""
    projections = _split(tile.projected_bP, down_FD.shape[0])
    hidden_bF, pull = jax.vjp(activate, projections)
    dhidden_bF = _dot(tile.dy_bD, down_FD, 1, 1)
    weighted_bF = dhidden_bF * tile.weight_b1
    (dprojections,) = pull(weighted_bF)
    dprojected_bP = jnp.concatenate(dprojections, axis=1)
    return _Hidden(hidden_bF, dhidden_bF, dprojected_bP)


def _empty(like_TD, *shape: int):
    """Returns a float32 array whose values the loops over tiles write."""
    return empty_varying_like(like_TD, shape, jnp.float32)


def _set_expert(totals, parts, e):
    """Sets the gradients of one expert's matrices."""
    replaced = []
    for total_EPQ, part_PQ in zip(totals, parts, strict=True):
        replaced.append(_replace(total_EPQ, part_PQ, e))
    return tuple(replaced)


def _add_to_expert(totals, parts, e):
    """Adds to the gradients of one expert's matrices."""
    added = []
    for total_EPQ, part_PQ in zip(totals, parts, strict=True):
        sum_PQ = total_EPQ[e] + part_PQ
        added.append(_replace(total_EPQ, sum_PQ, e))
    return tuple(added)


def _clear_expert(e, totals):
    """Sets the gradients of one expert's matrices to zero."""
    cleared = []
    for total_EPQ in totals:
        zeros_PQ = jnp.zeros_like(total_EPQ, shape=total_EPQ.shape[1:])
        cleared.append(_replace(total_EPQ, zeros_PQ, e))
    return tuple(cleared)


def _of_rows(weights_TK, choice_R):
    """Returns the token and the weight of each row."""
    top_k = weights_TK.shape[1]
    weights_S = weights_TK.reshape(-1)
    weight_R = weights_S.at[choice_R].get(mode="fill", fill_value=0)
    token_R = choice_R // top_k
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
    w_PQ = lax.dynamic_index_in_dim(w_EPQ, e, keepdims=False)
    return _to_float32(w_PQ)


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
    return lax.dot_general(
        a,
        b,
        (contracted, no_batch),
        preferred_element_type=jnp.float32,
    )


def _outer_products(a_bP, b_bQ):
    """Returns the sum of the outer products of rows.

    XLA:CPU is up to twice as fast if the left side is transposed first.
    """
    a_Pb = lax.optimization_barrier(a_bP.T)
    return _dot(a_Pb, b_bQ, 1, 0)


def _to_float32(x):
    """Converts to float32, which CPUs multiply and move faster than bfloat16."""
    return x.astype(jnp.float32)
