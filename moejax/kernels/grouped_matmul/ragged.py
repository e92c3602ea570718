"""The grouped product as `jax.lax.ragged_dot`: native on TPU, dense (E times the arithmetic) elsewhere."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul.tail import zero_tail


def grouped_matmul_ragged(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, "E"], spare_rows: int = 0
) -> Float[Array, "R F"]:
    """See `grouped_matmul`."""
    x_RD = zero_tail(x_RD, group_sizes_E)
    y_RF = jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=jnp.float32)
    return zero_tail(y_RF, group_sizes_E).astype(x_RD.dtype)
