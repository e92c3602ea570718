"""Adafactor: second moments of matrices kept as one number a row and one a column."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.training.optimizers.matrices import Axes, axes_of, map_params

DECAY_POWER = 0.8
SMALLEST_SQUARE = 1e-30
SMALLEST_SCALE = 1e-3
CLIPPING = 1.0
"""Largest root mean square of an update, before it is scaled."""


class AdafactorState(NamedTuple):
    """The state of `scale_by_adafactor`.

    Attributes:
      num_updates: so far, int32.
      rows: means of squared gradients over the columns of each matrix; of vectors, the squares.
      columns: means over rows; of vectors one number, which nothing reads.
    """

    num_updates: jax.Array
    rows: nnx.State
    columns: nnx.State


def scale_by_adafactor() -> optax.GradientTransformation:
    """Returns updates in proportion to the size of the weights, which need almost no memory.

    Means are over the rows and columns of one matrix: never over experts, which
    `optax.scale_by_factored_rms` would take for rows where there are many.

    Source: Shazeer and Stern 2018, algorithm 4 with relative step sizes, without momentum.
    """

    def init(params: nnx.State) -> AdafactorState:
        rows = map_params(lambda _, param: _zeros(param, _over_columns(param)), params)
        columns = map_params(lambda _, param: _zeros(param, _over_rows(param)), params)
        return AdafactorState(jnp.int32(0), rows, columns)

    def update(
        gradients: nnx.State, state: AdafactorState, params: nnx.State
    ) -> tuple[nnx.State, AdafactorState]:
        count = state.num_updates + 1
        decay = 1 - count.astype(jnp.float32) ** -DECAY_POWER

        def move_row(_: str, mean: nnx.Variable, gradient: nnx.Variable) -> jax.Array:
            squares = _mean_squares(gradient, _over_columns(gradient))
            return decay * mean[...] + (1 - decay) * squares

        def move_column(_: str, mean: nnx.Variable, gradient: nnx.Variable) -> jax.Array:
            squares = _mean_squares(gradient, _over_rows(gradient))
            return decay * mean[...] + (1 - decay) * squares

        rows = map_params(move_row, state.rows, gradients)
        columns = map_params(move_column, state.columns, gradients)
        updates = map_params(_update, gradients, rows, columns, params)
        return updates, AdafactorState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _over_columns(param: nnx.Variable) -> tuple[int, ...]:
    """Returns the axes over which there is one mean a row; none for vectors."""
    axes = axes_of(param.axes)
    return axes.columns if axes.rows else ()


def _over_rows(param: nnx.Variable) -> tuple[int, ...]:
    """Returns the axes over which there is one mean a column; all own ones for vectors."""
    axes = axes_of(param.axes)
    return axes.rows or axes.own


def _zeros(param: nnx.Variable, over: tuple[int, ...]) -> nnx.Variable:
    """Returns zeros for means over some axes."""
    sizes = [1 if n in over else size for n, size in enumerate(param.shape)]
    names = [None if n in over else name for n, name in enumerate(param.axes)]
    return param.replace(jnp.zeros(sizes, jnp.float32), axes=tuple(names))


def _mean_squares(gradient: nnx.Variable, over: tuple[int, ...]) -> jax.Array:
    squares = jnp.square(gradient[...]) + SMALLEST_SQUARE
    return squares.mean(axis=over, keepdims=True)


def _update(
    _: str,
    gradient: nnx.Variable,
    rows: nnx.Variable,
    columns: nnx.Variable,
    param: nnx.Variable,
) -> jax.Array:
    axes = axes_of(gradient.axes)
    squares = rows[...]
    if axes.rows:
        mean = squares.mean(axis=axes.rows, keepdims=True)
        squares = squares / mean * columns[...]
    step = gradient[...] / jnp.sqrt(squares)
    step /= jnp.maximum(1, _rms(step, axes) / CLIPPING)
    return step * jnp.maximum(SMALLEST_SCALE, _rms(param[...], axes))


def _rms(array: jax.Array, axes: Axes) -> jax.Array:
    """Returns the root mean square of each matrix or vector, with axes of size 1 for its own."""
    return jnp.sqrt(jnp.square(array).mean(axis=axes.own, keepdims=True))
