"""The grouped product as `jax.lax.ragged_dot`, for TPU.

Elsewhere XLA computes it as a dense product, with E times the arithmetic.

XLA:TPU has kernels for the product and for the gradient of the rows. That of the matrices it
computes as a dense product with E times the arithmetic if it is the libtpu of jax 0.10.2 (compiled
for v5p and v6e; that of 0.12 does not): there it is a kernel of Pallas.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers, ragged_dot_general
from jaxtyping import Array, Float, Int

from moejax.kernels.batching import Product, fold_arms, loop_over_arms
from moejax.kernels.device import platform
from moejax.kernels.grouped_matmul.dimensions import BY_MATRIX, BY_TRANSPOSE, OUTER
from moejax.kernels.grouped_matmul.megablox import outer_products_megablox
from moejax.kernels.grouped_matmul.products import Products, multiply
from moejax.kernels.zero_padding import zero_padding_rows


def grouped_matmul_ragged(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    padding_rows: int = 0,
) -> Float[Array, "R F"]:
    """See `grouped_matmul`."""
    return multiply(PRODUCTS, x_RD, w_EDF, group_sizes_E, padding_rows)


def _over_arms(
    product: Product,
    x_RP: jax.Array,
    other: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
) -> jax.Array:
    """Folds arms on TPU only: a dense product would multiply each arm's rows by all matrices."""
    over_arms = fold_arms if platform() == "tpu" else loop_over_arms
    return over_arms(product, x_RP, other, group_sizes_E, padding_rows)


def needs_megablox() -> bool:
    """Whether XLA has a kernel for the product and none for the gradient of the matrices."""
    return platform() == "tpu" and jax.__version_info__ < (0, 12)


def _outer_products(
    x_RD: jax.Array,
    dy_RF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
) -> jax.Array:
    """Returns for each group the sum of the outer products of its rows."""
    if needs_megablox():
        return outer_products_megablox(x_RD, dy_RF, group_sizes_E, x_RD.dtype)
    x_RD = zero_padding_rows(x_RD, group_sizes_E)
    dy_RF = zero_padding_rows(dy_RF, group_sizes_E)
    return ragged_dot_general(
        x_RD,
        dy_RF,
        group_sizes_E,
        OUTER,
        preferred_element_type=jnp.float32,
    )


def _rows_by_matrices(
    x_RP: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
    *,
    dimensions: RaggedDotDimensionNumbers,
) -> jax.Array:
    """Multiplies rows by matrices or by their transposes."""
    x_RP = zero_padding_rows(x_RP, group_sizes_E)
    # XLA:TPU's kernel adds up in float32 and rounds at the end: asked for float32, it would only
    # write twice the bytes.
    dtype = x_RP.dtype if platform() == "tpu" else jnp.float32
    y_RQ = ragged_dot_general(
        x_RP,
        w_EDF,
        group_sizes_E,
        dimensions,
        preferred_element_type=dtype,
    )
    y_RQ = zero_padding_rows(y_RQ, group_sizes_E)
    return y_RQ.astype(x_RP.dtype)


_BY_MATRIX = functools.partial(_rows_by_matrices, dimensions=BY_MATRIX)
_BY_TRANSPOSE = functools.partial(_rows_by_matrices, dimensions=BY_TRANSPOSE)
PRODUCTS = Products(_BY_MATRIX, _BY_TRANSPOSE, _outer_products, _over_arms)
