"""Root-mean-square normalisation whose stored scale is a difference from 1."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.nn.norm import normalize_rms


class ZeroCenteredRMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale) over the last axis, computed in float32.

    Weight decay pulls the factor towards 1 instead of 0.

    Args:
      width: of the last axis, D.
      epsilon: added to the mean square.

    Source: Gemma Team 2024, and Qwen3-Next; the norm is that of Zhang & Sennrich 2019, equation 4.
    """

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; returns the dtype of `x`."""
        return normalize_rms(x, 1 + self.scale[...], self.epsilon)
