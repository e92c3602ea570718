"""Rows beyond the last group."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def zero_padding_rows(
    x_RD: Float[Array, "R D"], group_sizes_E: Int[Array, "E"]
) -> Float[Array, "R D"]:
    """Zeros in the rows that belong to no group, whatever they hold: `where`, not a product, for 0 * NaN is NaN.

    Applied to the input of a product it also zeroes the tail of the gradient.
    """
    is_row_R = jnp.arange(x_RD.shape[0]) < group_sizes_E.sum()
    return jnp.where(is_row_R[:, None], x_RD, 0)
