"""Factors on the scores of queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.nn.long_rope import long_rope_score_factor


def scale_queries(q_BLHA: Float[Array, "B L H A"], factor: float) -> Float[Array, "B L H A"]:
    """Returns queries times `attention.score_factor`, which is then a factor on their scores."""
    if factor == 1:
        return q_BLHA
    dtype = q_BLHA.dtype
    return (q_BLHA.astype(jnp.float32) * factor).astype(dtype)


def rotary_score_factor(
    config: AttentionConfig,
    positions_BL: Int[Array, "B L"],
    segments_BL: Int[Array, "B L"] | None,
) -> float | Float[Array, ""]:
    """Returns the factor on the products of what is rotated, which only LongRoPE has.

    It multiplies queries alone, so that keys in a cache stay what they are when a text grows.
    """
    if config.rope_scaling != "longrope":
        return 1.0
    return long_rope_score_factor(config, positions_BL, segments_BL)
