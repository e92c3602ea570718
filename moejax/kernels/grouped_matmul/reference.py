"""The reference grouped product: every row by every matrix, E times the arithmetic."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.zero_padding import zero_padding_rows


def grouped_matmul_dense(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    padding_rows: int = 0,
) -> Float[Array, "R F"]:
    """See `grouped_matmul`; this one materialises `[E, R, F]`."""
    x_RD = zero_padding_rows(x_RD, group_sizes_E)
    num_rows = x_RD.shape[0]
    num_groups = w_EDF.shape[0]
    ends_E = jnp.cumsum(group_sizes_E)
    row_R = jnp.arange(num_rows)
    group_R = jnp.searchsorted(ends_E, row_R, side="right")
    y_ERF = jnp.einsum(
        "RD,EDF->ERF",
        x_RD,
        w_EDF,
        preferred_element_type=jnp.float32,
    )
    is_group_RE = jax.nn.one_hot(group_R, num_groups)
    y_RF = jnp.einsum("ERF,RE->RF", y_ERF, is_group_RE)
    y_RF = zero_padding_rows(y_RF, group_sizes_E)
    return y_RF.astype(x_RD.dtype)
