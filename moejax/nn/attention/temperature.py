"""Queries that grow with their position, so that attention over long texts stays sharp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import AttentionConfig


def grow_with_position(
    q_BLHA: Float[Array, "B L H A"],
    positions_BL: Int[Array, "B L"],
    segments_BL: Int[Array, "B L"] | None,
    config: AttentionConfig,
    has_rope: Bool[Array, ""],
) -> Float[Array, "B L H A"]:
    """Returns queries times 1 + t ln(1 + floor((position + 1) / length)).

    Padding before a document counts as positions of it here, as it does in the reference
    implementation; packed rows have none.

    Args:
      q_BLHA: queries.
      positions_BL: position of each token in its document.
      segments_BL: number of the document within its row, 0 at padding; None: no padding.
      config: for t, `temperature`, and `temperature_length`.
      has_rope: whether the layer has rotary positions, which leave its queries as they are.

    Source: Nakanishi 2025 (Scalable-Softmax), in the form of Llama 4.
    """
    if segments_BL is not None:
        positions_BL += _padding_before(segments_BL)
    num_lengths_BL = jnp.floor((positions_BL + 1) / config.temperature_length)
    factor_BL = 1 + config.temperature * jnp.log1p(num_lengths_BL)
    factor_BL = jnp.where(has_rope, 1.0, factor_BL)
    grown_BLHA = q_BLHA.astype(jnp.float32) * factor_BL[:, :, None, None]
    return grown_BLHA.astype(q_BLHA.dtype)


def _padding_before(segments_BL: jax.Array) -> jax.Array:
    """Returns how many positions of padding are before each token of its row."""
    is_padding_BL = segments_BL == 0
    return jnp.cumsum(is_padding_BL.astype(jnp.int32), axis=1)
