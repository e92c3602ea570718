"""Derivatives of a grouped product, of any order.

Three products of grouped rows are each other's derivatives: rows by matrices, rows by their
transposes, and the sums of outer products of rows. An implementation gives all three; none has to
be differentiated itself.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from moejax.kernels.batching import Product, fold_arms

OverArms = Callable[[Product, jax.Array, jax.Array, jax.Array, int], jax.Array]
"""What makes one call of a product with several models under `vmap`; see `batching.py`."""


@dataclasses.dataclass(frozen=True)
class Products:
    """An implementation.

    Attributes:
      by_matrix: rows `[R, D]` by `[E, D, F]`.
      by_transpose: rows `[R, F]` by the transposes of `[E, D, F]`.
      outer: sums over the rows of each group of outer products, `[E, D, F]`, in the dtype of the
        rows or in float32.
      over_arms: for several models.
    """

    by_matrix: Product
    by_transpose: Product
    outer: Product
    over_arms: OverArms = fold_arms


def multiply(
    products: Products,
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    padding_rows: int,
) -> Float[Array, "R F"]:
    """Multiplies each group's rows by its matrix; see `grouped_matmul`."""
    return _by_matrix(products, padding_rows, x_RD, w_EDF, group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_matrix(products, padding_rows, x_RD, w_EDF, group_sizes_E):
    return products.over_arms(products.by_matrix, x_RD, w_EDF, group_sizes_E, padding_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_transpose(products, padding_rows, dy_RF, w_EDF, group_sizes_E):
    return products.over_arms(products.by_transpose, dy_RF, w_EDF, group_sizes_E, padding_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _outer(products, padding_rows, x_RD, dy_RF, group_sizes_E):
    dw_EDF = products.over_arms(products.outer, x_RD, dy_RF, group_sizes_E, padding_rows)
    return dw_EDF.astype(x_RD.dtype)


def _by_matrix_backward(products, padding_rows, arrays, dy_RF):
    x_RD, w_EDF, sizes_E = arrays
    dx_RD = _by_transpose(products, padding_rows, dy_RF, w_EDF, sizes_E)
    dw_EDF = _outer(products, padding_rows, x_RD, dy_RF, sizes_E)
    return dx_RD, dw_EDF, None


def _by_transpose_backward(products, padding_rows, arrays, ddx_RD):
    dy_RF, w_EDF, sizes_E = arrays
    ddy_RF = _by_matrix(products, padding_rows, ddx_RD, w_EDF, sizes_E)
    dw_EDF = _outer(products, padding_rows, ddx_RD, dy_RF, sizes_E)
    return ddy_RF, dw_EDF, None


def _outer_backward(products, padding_rows, arrays, ddw_EDF):
    x_RD, dy_RF, sizes_E = arrays
    dx_RD = _by_transpose(products, padding_rows, dy_RF, ddw_EDF, sizes_E)
    ddy_RF = _by_matrix(products, padding_rows, x_RD, ddw_EDF, sizes_E)
    return dx_RD, ddy_RF, None


def _by_matrix_forward(products, padding_rows, *arrays):
    return _by_matrix(products, padding_rows, *arrays), arrays


def _by_transpose_forward(products, padding_rows, *arrays):
    return _by_transpose(products, padding_rows, *arrays), arrays


def _outer_forward(products, padding_rows, *arrays):
    return _outer(products, padding_rows, *arrays), arrays


_by_matrix.defvjp(_by_matrix_forward, _by_matrix_backward)
_by_transpose.defvjp(_by_transpose_forward, _by_transpose_backward)
_outer.defvjp(_outer_forward, _outer_backward)
