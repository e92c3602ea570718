"""Muon: the mean of gradients of each matrix, with all its singular values made about one.

`optax.contrib.scale_by_muon` computes the same, and is what the tests compare with. It joins the
axes of layers and experts before it multiplies; where experts are split over devices, that gathers
the moments of all of them on every device. Here stacked axes stay as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.training.optimizers.matrices import Axes, as_matrices, axes_of, map_params

NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan et al. 2024)."""

EPSILON = 1e-8

UPDATE_RMS = 0.2
"""Root mean square of an update, about that of Adam's (Liu et al. 2025)."""


class MuonState(NamedTuple):
    """The state of `scale_by_muon`.

    Attributes:
      num_updates: so far, int32.
      mean: of the gradients.
    """

    num_updates: jax.Array
    mean: nnx.State


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Returns updates whose matrices are orthogonal, in the size of Adam's updates.

    Args:
      momentum: decay of the mean of gradients, by which Nesterov looks ahead.

    Source: Jordan et al. 2024 (Muon); the size is that of Liu et al. 2025 (Muon is scalable for LLM
    training), section 2.2, so that Adam's learning rate and weight decay fit.
    """

    def init(params: nnx.State) -> MuonState:
        return MuonState(jnp.int32(0), optax.tree.zeros_like(params))

    def update(
        gradients: nnx.State, state: MuonState, params: nnx.State | None = None
    ) -> tuple[nnx.State, MuonState]:
        del params
        mean = optax.tree.update_moment(gradients, state.mean, momentum, 1)
        count = state.num_updates + 1
        # Nesterov: the mean as it will be after a further gradient like this one.
        means = optax.tree.bias_correction(mean, momentum, count + 1)
        current = optax.tree.bias_correction(gradients, momentum, count)

        def make_update(_: str, mean: nnx.Variable, gradient: nnx.Variable) -> jax.Array:
            ahead = momentum * mean[...] + (1 - momentum) * gradient[...]
            return _orthogonal(ahead, axes_of(mean.axes))

        return map_params(make_update, means, current), MuonState(count, mean)

    return optax.GradientTransformation(init, update)


def _orthogonal(array: jax.Array, axes: Axes) -> jax.Array:
    matrices, restore = as_matrices(array, axes)
    largest = max(matrices.shape[-2:])
    return restore(UPDATE_RMS * largest**0.5 * orthogonalize(matrices))


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Returns matrices `[..., M, N]` with their singular vectors, and singular values about 1."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x /= jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPSILON
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = b * gram + c * gram @ gram
        x = a * x + polynomial @ x
    return x.mT if is_tall else x


def keep_norm(weights: jax.Array, update: jax.Array, rate: jax.Array, axes: Axes) -> jax.Array:
    """Returns what is added to weights so that they turn by an update, and keep their norm.

    Args:
      weights: matrices, each of which keeps its Frobenius norm.
      update: descends against its direction; its size does not count.
      rate: length of the step, as a fraction of the norm.
      axes: of both.

    Source: Wen et al. 2025 (hyperball optimization).
    """
    radius = _norms(weights, axes)
    step = update * radius / (_norms(update, axes) + EPSILON)
    moved = weights - rate * step
    return moved * radius / (_norms(moved, axes) + EPSILON) - weights


def _norms(array: jax.Array, axes: Axes) -> jax.Array:
    """Returns the norm of each matrix, with axes of size 1 for its own."""
    return jnp.sqrt(jnp.sum(jnp.square(array), axis=axes.own, keepdims=True))
