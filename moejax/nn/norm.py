"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32.

    Args:
      width: of the last axis, D.
      epsilon: added to the mean square.

    Source: Zhang & Sennrich 2019, equation 4.
    """

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; returns the dtype of `x`."""
        return normalize_rms(x, self.scale[...], self.epsilon)


def normalize_rms(
    x: Float[Array, "*batch D"], scale_D: Float[Array, "D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """Returns x / rms(x) * scale, in the dtype of `x`."""
    dtype = x.dtype
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    inverse_rms = jax.lax.rsqrt(mean_square + epsilon)
    normed = x * inverse_rms * along_last_axis(scale_D, x.ndim)
    return normed.astype(dtype)


def along_last_axis(vector_D: Float[Array, "D"], ndim: int) -> jax.Array:
    """Returns a vector with leading axes of size 1, as many as an array of `ndim` axes has."""
    leading_axes = tuple(range(ndim - 1))
    return jnp.expand_dims(vector_D, leading_axes)
