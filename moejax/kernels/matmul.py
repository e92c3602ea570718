"""A dense product over the last axis, in the form that every platform computes fast."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def dense(
    x: jax.Array,
    weight: jax.Array,
    *,
    num_contracted: int = 1,
    out_dtype: DTypeLike | None = None,
    precision: str | None = None,
) -> jax.Array:
    """Contracts the last axes of `x` with the first axes of `weight`.

    Both are viewed as matrices: XLA:CPU computes the gradient of a product with several batch axes
    two to three times slower than that of a plain matrix product.

    Args:
      x: `[*tokens, *contracted]`.
      weight: `[*contracted, *features]`.
      num_contracted: how many axes are contracted.
      out_dtype: of the result, in which it is accumulated; the dtype of `x` by default.
      precision: of `jax.lax.Precision`; without "highest", accelerators round float32 before they
        multiply it.

    Returns:
      `[*tokens, *features]`.
    """
    num_tokens_axes = x.ndim - num_contracted
    tokens = x.shape[:num_tokens_axes]
    features = weight.shape[num_contracted:]
    num_products = math.prod(weight.shape[:num_contracted])
    x_TP = x.reshape(-1, num_products)
    weight_PQ = weight.reshape(num_products, -1)
    y_TQ = jnp.matmul(
        x_TP,
        weight_PQ,
        preferred_element_type=out_dtype,
        precision=precision,
    )
    return y_TQ.reshape(*tokens, *features)
