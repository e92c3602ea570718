"""LongRoPE: a factor on the wavelength of each pair of dimensions, and on scores by length."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from moejax.config import AttentionConfig


def long_rope_frequencies(config: AttentionConfig, num_pairs: int) -> Float32[np.ndarray, "a"]:
    """Returns the frequency of each pair of dimensions, in radians a position.

    Args:
      config: for `rope_theta` and `rope_wavelengths`.
      num_pairs: half of the dimensions that are rotated.

    Source: Ding et al. 2024 (LongRoPE), equation 2.
    """
    pair_a = np.arange(num_pairs, dtype=np.float64)
    plain_a = config.rope_theta ** (-pair_a / num_pairs)
    factor_a = np.array(config.wavelength_factors)
    return (plain_a / factor_a).astype(np.float32)


def long_rope_score_factor(
    config: AttentionConfig,
    positions_BL: Int[Array, "B L"],
    segments_BL: Int[Array, "B L"] | None,
) -> float | Float[Array, ""]:
    """Returns the factor on scores, the square of the magnitude of rotated queries and keys.

    As in the implementation of Phi-3.5-MoE, texts that are computed together have the same one: the
    second magnitude if the longest is longer than `rope_original_length`.

    Args:
      config: for the magnitudes and that length.
      positions_BL: position of each token in its document.
      segments_BL: 0 at padding, which has no length; None: there is none.
    """
    short, long = config.rope_magnitude or 1.0, config.rope_long_magnitude
    if not long or long == short:
        return short**2
    if segments_BL is not None:
        positions_BL = jnp.where(segments_BL > 0, positions_BL, 0)
    is_long = positions_BL.max() >= config.rope_original_length
    return jnp.where(is_long, long**2, short**2)
