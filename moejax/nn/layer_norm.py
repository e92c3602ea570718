"""Layer normalisation, with or without a bias."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.nn.norm import along_last_axis


class LayerNorm(nnx.Module):
    """(x - mean(x)) / deviation(x) * scale, plus a bias, over the last axis, computed in float32.

    Args:
      width: of the last axis, D.
      epsilon: added to the variance.
      has_bias: whether there is a bias.

    Source: Ba et al. 2016, section 3.
    """

    def __init__(self, width: int, epsilon: float = 1e-6, *, has_bias: bool = True):
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        if has_bias:
            self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.epsilon = epsilon
        self.has_bias = has_bias

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; returns the dtype of `x`."""
        dtype = x.dtype
        x = x.astype(jnp.float32)
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centered**2, axis=-1, keepdims=True)
        inverse_deviation = jax.lax.rsqrt(variance + self.epsilon)
        normed = centered * inverse_deviation * along_last_axis(self.scale[...], x.ndim)
        if self.has_bias:
            normed += along_last_axis(self.bias[...], x.ndim)
        return normed.astype(dtype)
