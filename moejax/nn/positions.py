"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x_BLHA: Float[Array, "B L H A"], positions_BL: Int[Array, "B L"], theta: float
) -> Float[Array, "B L H A"]:
    """Rotates each pair of dimensions i and i + A/2 by the angle position * theta^(-2i/A).

    Source: Su et al. 2021 (RoFormer, section 3.2); the pairing of halves is that of GPT-NeoX and
    Llama checkpoints.

    Args:
      x_BLHA: queries or keys.
      positions_BL: position of each token in its document.
      theta: base of the angles' geometric sequence.
    """
    half = x_BLHA.shape[-1] // 2
    exponent_a = -jnp.arange(half, dtype=jnp.float32) / half
    frequency_a = theta**exponent_a
    position_BL11 = positions_BL[..., None, None].astype(jnp.float32)
    angle_BL1a = position_BL11 * frequency_a[None, None, None]
    cos_BL1a = jnp.cos(angle_BL1a)
    sin_BL1a = jnp.sin(angle_BL1a)
    first_BLHa, second_BLHa = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    rotated_first_BLHa = first_BLHa * cos_BL1a - second_BLHa * sin_BL1a
    rotated_second_BLHa = second_BLHa * cos_BL1a + first_BLHa * sin_BL1a
    rotated_BLHA = jnp.concatenate([rotated_first_BLHa, rotated_second_BLHa], axis=-1)
    return rotated_BLHA.astype(x_BLHA.dtype)
