"""The kinds of norms by name."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from moejax.nn.layer_norm import LayerNorm
from moejax.nn.norm import RMSNorm
from moejax.nn.zero_centered_norm import ZeroCenteredRMSNorm

Norm = RMSNorm | ZeroCenteredRMSNorm | LayerNorm

MakeNorm = Callable[[int], Norm]
"""Makes a norm from the width of what it normalises."""

NORMS: dict[str, Callable[[int, float], Norm]] = {
    "rms": RMSNorm,
    "zero_centered_rms": ZeroCenteredRMSNorm,
    "layer": LayerNorm,
    "layer_without_bias": functools.partial(LayerNorm, has_bias=False),
}
"""What makes a norm from its width and its epsilon, by the name in `model.norm`."""


def make_norm(kind: str, width: int, epsilon: float) -> Norm:
    """Returns a norm of one of the kinds of `NORMS`."""
    return NORMS[kind](width, epsilon)


class Identity(nnx.Module):
    """Stands where a layer has no norm."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x`."""
        return x
