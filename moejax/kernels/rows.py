"""Sums of the rows that belong to each token."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.kernels.vma import zeros_varying_like


def add_rows(
    x_RD: Float[Array, "R D"],
    row_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"] | None = None,
) -> Float[Array, "T D"]:
    """Adds up the rows of each token, times their weights if there are any.

    Rows out of range add nothing. Products and sums are float32, and the result has the dtype of
    the rows. There is one gather for each of the K: XLA:CPU does not fuse a gather of all with the
    sum, which takes three times as long.
    """

    def add(k, sum_TD):
        row_T = lax.dynamic_index_in_dim(row_TK, k, axis=1, keepdims=False)
        rows_TD = x_RD.at[row_T].get(mode="fill", fill_value=0)
        rows_TD = rows_TD.astype(jnp.float32)
        if weights_TK is not None:
            weight_T1 = lax.dynamic_slice_in_dim(weights_TK, k, 1, axis=1)
            rows_TD *= weight_T1.astype(jnp.float32)
        return sum_TD + rows_TD

    num_tokens, top_k = row_TK.shape
    d_model = x_RD.shape[1]
    zeros_TD = zeros_varying_like(x_RD, (num_tokens, d_model), jnp.float32)
    num_unrolled = min(8, top_k)
    y_TD = lax.fori_loop(0, top_k, add, zeros_TD, unroll=num_unrolled)
    return y_TD.astype(x_RD.dtype)
