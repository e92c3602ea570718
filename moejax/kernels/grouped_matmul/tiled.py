"""The grouped product in tiles, for CPU: each expert's rows in as many blocks as they fill.

The outer loop runs over experts and takes their matrix once; the inner loop has a data-dependent
trip count, so an expert without rows costs nothing and the arithmetic is that of the rows alone,
plus half a block per expert. A block may reach past the end of its group: what it writes there is
overwritten by the groups that follow, which come later in the same loop. Both loops are
`lax.fori_loop`s, so the program has the same size for any number of experts.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul.products import Products, multiply
from moejax.kernels.vma import zeros_varying_like


def grouped_matmul_tiled(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    padding_rows: int = 0,
) -> Float[Array, "R F"]:
    """See `grouped_matmul`."""
    return multiply(PRODUCTS, x_RD, w_EDF, group_sizes_E, padding_rows)


def block_rows(num_rows: int, num_groups: int) -> int:
    """Returns the rows of a tile: about half the mean group, between 32 and 256.

    Smaller tiles waste less of a group's last one, larger ones use the matrix unit better.
    """
    half_group = max(1, num_rows // (2 * num_groups))
    exponent = half_group.bit_length() - 1
    size = max(32, 1 << exponent)
    return min(256, size)


def _rows_by_matrices(
    x_RP: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
    *,
    contract: int,
) -> jax.Array:
    """Multiplies rows by `w` (`contract=1`) or by its transpose (`contract=2`)."""
    num_rows = x_RP.shape[0]
    num_groups = w_EDF.shape[0]
    block = block_rows(num_rows - padding_rows, num_groups)
    ends_E = jnp.cumsum(group_sizes_E)
    x_RP = _append_rows(x_RP, block - padding_rows)

    def one_group(e, y_RQ):
        w_DF = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
        w_DF = _to_float32(w_DF)
        start = ends_E[e] - group_sizes_E[e]

        def one_tile(i, y_RQ):
            row = start + i * block
            # Rows past the last group may hold anything, and the last tile may reach them.
            x_bP = _rows(x_RP, row, block, ends_E[-1])
            y_bQ = _contract(x_bP, w_DF, 1, contract - 1)
            y_bQ = y_bQ.astype(y_RQ.dtype)
            return lax.dynamic_update_slice_in_dim(y_RQ, y_bQ, row, axis=0)

        num_tiles = -(-group_sizes_E[e] // block)
        return lax.fori_loop(0, num_tiles, one_tile, y_RQ)

    shape = (x_RP.shape[0], w_EDF.shape[3 - contract])
    zeros_RQ = zeros_varying_like(x_RP, shape, x_RP.dtype)
    y_RQ = lax.fori_loop(0, num_groups, one_group, zeros_RQ)
    return y_RQ[:num_rows]


_BY_MATRIX = functools.partial(_rows_by_matrices, contract=1)
_BY_TRANSPOSE = functools.partial(_rows_by_matrices, contract=2)


def _outer_products(
    x_RD: jax.Array,
    dy_RF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
) -> jax.Array:
    """Returns for each group the sum of the outer products of its rows, in float32."""
    num_rows, width_D = x_RD.shape
    width_F = dy_RF.shape[1]
    num_groups = group_sizes_E.shape[0]
    block = block_rows(num_rows - padding_rows, num_groups)
    ends_E = jnp.cumsum(group_sizes_E)
    num_missing = block - padding_rows
    x_RD = _append_rows(x_RD, num_missing)
    dy_RF = _append_rows(dy_RF, num_missing)
    zeros_DF = zeros_varying_like(dy_RF, (width_D, width_F), jnp.float32)

    def one_group(e, dw_EDF):
        start = ends_E[e] - group_sizes_E[e]

        def one_tile(i, dw_DF):
            row = start + i * block
            x_bD = _rows(x_RD, row, block, ends_E[e])
            dy_bF = _rows(dy_RF, row, block, ends_E[e])
            return dw_DF + _contract(x_bD, dy_bF, 0, 0)

        num_tiles = -(-group_sizes_E[e] // block)
        dw_DF = lax.fori_loop(0, num_tiles, one_tile, zeros_DF)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, e, axis=0)

    shape = (num_groups, width_D, width_F)
    zeros_EDF = zeros_varying_like(dy_RF, shape, jnp.float32)
    return lax.fori_loop(0, num_groups, one_group, zeros_EDF)


def _append_rows(x_RP, count: int):
    """Appends rows that the last tile may reach into.

    A slice that would pass the end is moved back, not cut.
    """
    if count <= 0:
        return x_RP
    return jnp.pad(x_RP, ((0, count), (0, 0)))


def _rows(x_RP, start, count: int, end):
    """Returns `count` rows in float32, zeros from row `end` on."""
    row_b = start + jnp.arange(count)
    is_row_b = row_b < end
    is_row_b1 = is_row_b[:, None]
    x_bP = lax.dynamic_slice_in_dim(x_RP, start, count)
    x_bP = _to_float32(x_bP)
    return jnp.where(is_row_b1, x_bP, 0)


def _contract(a, b, a_axis: int, b_axis: int):
    """Contracts one axis of each of two matrices."""
    contracted = ((a_axis,), (b_axis,))
    no_batch = ((), ())
    return lax.dot_general(a, b, (contracted, no_batch))


def _to_float32(x):
    """Converts to float32, which CPUs multiply faster than bfloat16, and accumulate exactly."""
    return x.astype(jnp.float32)


PRODUCTS = Products(_BY_MATRIX, _BY_TRANSPOSE, _outer_products)
