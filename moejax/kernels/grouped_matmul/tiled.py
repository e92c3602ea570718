"""The grouped product in tiles, for CPU: each expert's rows in blocks, as many blocks as it has rows for.

The outer loop runs over experts and takes their matrix once; the inner loop has a data-dependent
trip count, so an expert without rows costs nothing and the arithmetic is that of the rows alone,
plus half a block per expert. A block may reach past the end of its group: what it writes there is
overwritten by the groups that follow, which come later in the same loop. Both loops are
`lax.fori_loop`s, so the program has the same size for any number of experts.
"""

import functools

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
    """Rows of a tile: about half the mean group, between 32 and 256.

    Smaller tiles waste less of a group's last one, larger ones use the matrix unit better.
    """
    target = max(1, num_rows // (2 * num_groups))
    return min(256, max(32, 1 << (target.bit_length() - 1)))


def _rows_by_matrices(x_RP, w_EDF, group_sizes_E, padding_rows: int, *, contract: int):
    """Rows times `w` (`contract=1`) or times its transpose (`contract=2`)."""
    num_rows, num_groups = x_RP.shape[0], w_EDF.shape[0]
    block = block_rows(num_rows - padding_rows, num_groups)
    ends_E = jnp.cumsum(group_sizes_E)
    x_RP = _append_rows(x_RP, block - padding_rows)

    def one_group(e, y_RQ):
        w_DF = _to_float32(lax.dynamic_index_in_dim(w_EDF, e, keepdims=False))
        start = ends_E[e] - group_sizes_E[e]

        def one_tile(i, y_RQ):
            row = start + i * block
            # Rows past the last group may hold anything, and the last tile may reach them.
            x_bP = _rows(x_RP, row, block, ends_E[-1])
            y_bQ = lax.dot_general(x_bP, w_DF, (((1,), (contract - 1,)), ((), ())))
            return lax.dynamic_update_slice_in_dim(y_RQ, y_bQ.astype(y_RQ.dtype), row, axis=0)

        return lax.fori_loop(0, -(-group_sizes_E[e] // block), one_tile, y_RQ)

    y_RQ = zeros_varying_like(x_RP, (x_RP.shape[0], w_EDF.shape[3 - contract]), x_RP.dtype)
    return lax.fori_loop(0, num_groups, one_group, y_RQ)[:num_rows]


_BY_MATRIX = functools.partial(_rows_by_matrices, contract=1)
_BY_TRANSPOSE = functools.partial(_rows_by_matrices, contract=2)


def _outer_products(x_RD, dy_RF, group_sizes_E, padding_rows: int):
    """For each group, the sum over its rows of the outer products of `x` and `dy`, in float32."""
    num_rows, num_groups = x_RD.shape[0], group_sizes_E.shape[0]
    block = block_rows(num_rows - padding_rows, num_groups)
    ends_E = jnp.cumsum(group_sizes_E)
    x_RD, dy_RF = (_append_rows(rows, block - padding_rows) for rows in (x_RD, dy_RF))
    zeros_DF = zeros_varying_like(dy_RF, (x_RD.shape[1], dy_RF.shape[1]), jnp.float32)

    def one_group(e, dw_EDF):
        start = ends_E[e] - group_sizes_E[e]

        def one_tile(i, dw_DF):
            row = start + i * block
            x_bD, dy_bF = (_rows(rows, row, block, ends_E[e]) for rows in (x_RD, dy_RF))
            return dw_DF + lax.dot_general(x_bD, dy_bF, (((0,), (0,)), ((), ())))

        dw_DF = lax.fori_loop(0, -(-group_sizes_E[e] // block), one_tile, zeros_DF)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, e, axis=0)

    dw_EDF = zeros_varying_like(dy_RF, (num_groups, *zeros_DF.shape), jnp.float32)
    return lax.fori_loop(0, num_groups, one_group, dw_EDF)


def _append_rows(x_RP, count: int):
    """Rows that the last tile may reach into: a slice that would pass the end is moved back, not cut."""
    return jnp.pad(x_RP, ((0, count), (0, 0))) if count > 0 else x_RP


def _rows(x_RP, start, count: int, end):
    """`count` rows in float32, zeros from row `end` on."""
    is_row_b = start + jnp.arange(count) < end
    return jnp.where(
        is_row_b[:, None], _to_float32(lax.dynamic_slice_in_dim(x_RP, start, count)), 0
    )


def _to_float32(x):
    """float32, in which CPUs multiply bfloat16 faster and accumulate exactly."""
    return x.astype(jnp.float32)


PRODUCTS = Products(_BY_MATRIX, _BY_TRANSPOSE, _outer_products)
