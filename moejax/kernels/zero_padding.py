"""Rows beyond the last group."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def zero_padding_rows(
    x_RD: Float[Array, "R D"],
    group_sizes_E: Int[Array, "E"],
) -> Float[Array, "R D"]:
    """Sets the rows that belong to no group to zero, whatever they hold.

    Applied to the input of a product it also zeroes the padding rows of the gradient.
    """
    num_rows = x_RD.shape[0]
    row_R = jnp.arange(num_rows)
    num_in_groups = group_sizes_E.sum()
    is_row_R = row_R < num_in_groups
    # Not a product with 0 or 1: 0 * NaN is NaN.
    return jnp.where(is_row_R[:, None], x_RD, 0)
