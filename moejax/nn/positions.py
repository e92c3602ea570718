"""Rotary position embedding."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.nn.attention.layer_options import ALL_ALIKE, LayerOptions
from moejax.nn.rope_scaling import rope_frequencies, rope_magnitude


def rotate(
    x_BLHA: Float[Array, "B L H A"],
    positions_BL: Int[Array, "B L"],
    frequency_a: Float[np.ndarray, "a"] | Float[Array, "a"],
    magnitude: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B L H A"]:
    """Rotates each pair of dimensions i and i + A/2 by the angle position * frequency i.

    Source: Su et al. 2021 (RoFormer, section 3.2); the pairing of halves is that of GPT-NeoX and
    Llama checkpoints.

    Args:
      x_BLHA: queries or keys.
      positions_BL: position of each token in its document.
      frequency_a: the angle of each pair at position 1, from `rope_frequencies`.
      magnitude: a factor on the result.
    """
    dtype = x_BLHA.dtype
    position_BL11 = positions_BL[..., None, None].astype(jnp.float32)
    angle_BL1a = position_BL11 * frequency_a[None, None, None]
    cos_BL1a = jnp.cos(angle_BL1a) * magnitude
    sin_BL1a = jnp.sin(angle_BL1a) * magnitude
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
    options: LayerOptions = ALL_ALIKE,
    factor: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B L H A"]:
    """Rotates queries or keys as a layer of the model does.

    Interleaved pairs, dimensions 2i and 2i + 1, are moved to i and i + A/2 first; queries and keys
    alike, so that their products are the same.

    Args:
      x_BLHA: queries or keys.
      positions_BL: position of each token in its document.
      config: of the model.
      options: what the layer does not share with others.
      factor: on what is rotated.
    """
    d_rotated = config.rope_dim or x_BLHA.shape[-1]
    turned_BLHA, plain_BLHA = jnp.split(x_BLHA, [d_rotated], axis=-1)
    if config.rope_interleaved:
        turned_BLHA = jnp.concatenate([turned_BLHA[..., ::2], turned_BLHA[..., 1::2]], axis=-1)
    frequency_a, magnitude = _turns(d_rotated // 2, config, options)
    rotated_BLHA = rotate(turned_BLHA, positions_BL, frequency_a, magnitude * factor)
    if options.has_rope is not None:
        rotated_BLHA = jnp.where(options.has_rope, rotated_BLHA, turned_BLHA)
    if d_rotated == x_BLHA.shape[-1]:
        return rotated_BLHA
    return jnp.concatenate([rotated_BLHA, plain_BLHA], axis=-1)


def _turns(num_pairs: int, config: AttentionConfig, options: LayerOptions) -> tuple[Any, Any]:
    """Returns the frequencies and the magnitude of a layer."""
    if options.frequency_a is not None:
        return options.frequency_a, options.magnitude
    return rope_frequencies(config, num_pairs), rope_magnitude(config)
