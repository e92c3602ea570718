"""The factor on the scores of queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def scale_queries(q_BLHA: Float[Array, "B L H A"], factor: float) -> Float[Array, "B L H A"]:
    """Returns queries times `attention.score_factor`, which is then a factor on their scores."""
    if factor == 1:
        return q_BLHA
    dtype = q_BLHA.dtype
    return (q_BLHA.astype(jnp.float32) * factor).astype(dtype)
