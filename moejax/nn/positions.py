"""Rotary position embedding."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.nn.long_rope import long_rope_frequencies
from moejax.nn.rope_scaling import yarn_frequencies, yarn_magnitude


def rotate(
    x_BLHA: Float[Array, "B L H A"],
    positions_BL: Int[Array, "B L"],
    theta: float,
    frequency_a: Float[np.ndarray, "a"] | Float[Array, "a"] | None = None,
    magnitude: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B L H A"]:
    """Rotates each pair of dimensions i and i + A/2 by the angle position * theta^(-2i/A).

    Source: Su et al. 2021 (RoFormer, section 3.2); the pairing of halves is that of GPT-NeoX and
    Llama checkpoints.

    Args:
      x_BLHA: queries or keys.
      positions_BL: position of each token in its document.
      theta: base of the angles' geometric sequence.
      frequency_a: the angle of each pair at position 1, in place of those of `theta`.
      magnitude: a factor on the result.
    """
    dtype = x_BLHA.dtype
    num_pairs = x_BLHA.shape[-1] // 2
    if frequency_a is None:
        frequency_a = _frequencies(num_pairs, theta)
    position_BL11 = positions_BL[..., None, None].astype(jnp.float32)
    angle_BL1a = position_BL11 * frequency_a[None, None, None]
    cos_BL1a = jnp.cos(angle_BL1a)
    sin_BL1a = jnp.sin(angle_BL1a)
    if isinstance(magnitude, jax.Array) or magnitude != 1:
        cos_BL1a *= magnitude
        sin_BL1a *= magnitude
    x_BLHA = x_BLHA.astype(jnp.float32)
    first_BLHa, second_BLHa = jnp.split(x_BLHA, 2, axis=-1)
    rotated_first_BLHa = first_BLHa * cos_BL1a - second_BLHa * sin_BL1a
    rotated_second_BLHa = second_BLHa * cos_BL1a + first_BLHa * sin_BL1a
    rotated_halves = [rotated_first_BLHa, rotated_second_BLHa]
    rotated_BLHA = jnp.concatenate(rotated_halves, axis=-1)
    return rotated_BLHA.astype(dtype)


def rotate_by_config(
    x_BLHA: Float[Array, "B L H A"],
    positions_BL: Int[Array, "B L"],
    config: AttentionConfig,
    factor: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B L H A"]:
    """Rotates queries or keys as the model does.

    Interleaved pairs, dimensions 2i and 2i + 1, are moved to i and i + A/2 first; queries and keys
    alike, so that their products are the same.

    Args:
      x_BLHA: queries or keys.
      positions_BL: position of each token in its document.
      config: of the model.
      factor: on the result.
    """
    if config.rope_interleaved:
        x_BLHA = jnp.concatenate([x_BLHA[..., ::2], x_BLHA[..., 1::2]], axis=-1)
    if config.rope_scaling == "none":
        return rotate(x_BLHA, positions_BL, config.rope_theta, magnitude=factor)
    if config.rope_scaling == "longrope":
        frequency_a = long_rope_frequencies(config, x_BLHA.shape[-1] // 2)
        return rotate(x_BLHA, positions_BL, config.rope_theta, frequency_a, factor)
    frequency_a = yarn_frequencies(config, x_BLHA.shape[-1] // 2)
    magnitude = yarn_magnitude(config) * factor
    return rotate(x_BLHA, positions_BL, config.rope_theta, frequency_a, magnitude)


def _frequencies(num_pairs: int, theta: float) -> jax.Array:
    """Returns the angle of each pair of dimensions at position 1, `[a]`."""
    pair_a = jnp.arange(num_pairs, dtype=jnp.float32)
    exponent_a = -pair_a / num_pairs
    return theta**exponent_a
