"""Parameters as matrices: which axes of an array are stacked, and which are rows and columns.

An array of the model holds many matrices: one of each layer and expert, gate and up apart. What an
optimizer computes of a matrix, such as its norm, it computes of each of them. Axes of stacks are
never joined: they may be split over devices, and joining them would gather what is split.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from optax import MaskedNode

STACKED = ("layers", "experts", "query_experts", "gate_up", "key_value", "slots")
"""Axes along which matrices or vectors lie beside each other."""

HEADS = ("heads", "kv_heads")
"""Axes that belong to the rows or columns of a matrix, and to a vector's elements."""


class Axes(NamedTuple):
    """The axes of an array by what they are for its matrices.

    Attributes:
      stacked: along which matrices lie beside each other.
      rows: that make the rows of a matrix; none for vectors.
      columns: that make the columns, or the elements of vectors.
    """

    stacked: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def own(self) -> tuple[int, ...]:
        """The axes of one matrix or vector."""
        return self.rows + self.columns


def axes_of(names: Sequence[str]) -> Axes:
    """Returns the axes of an array whose logical axes have these names."""
    stacked = tuple(n for n, name in enumerate(names) if name in STACKED)
    own = tuple(n for n, name in enumerate(names) if name not in STACKED)
    if not is_matrix(names):
        return Axes(stacked, (), own)
    # Several axes, such as heads and their widths, are next to the one that they project.
    if names[own[-1]] == "embed":
        return Axes(stacked, own[:-1], own[-1:])
    return Axes(stacked, own[:1], own[1:])


def is_matrix(names: Sequence[str]) -> bool:
    """Whether an array holds matrices; norm scales and biases are vectors, however many."""
    own = [name for name in names if name not in (*STACKED, *HEADS)]
    return len(own) > 1


def own_axes(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the axes of one matrix or vector, the input side of a matrix first."""
    axes = axes_of(names)
    return tuple(names[n] for n in axes.own)


def as_matrices(array: jax.Array, axes: Axes) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns an array as matrices, `[..., rows, columns]`, and the function that undoes it."""
    order = axes.stacked + axes.rows + axes.columns
    shapes = [tuple(array.shape[n] for n in part) for part in axes]
    stacked, rows, columns = shapes

    def restore(matrices: jax.Array) -> jax.Array:
        inverse = [order.index(n) for n in range(array.ndim)]
        return matrices.reshape(stacked + rows + columns).transpose(inverse)

    shape = (*stacked, math.prod(rows), math.prod(columns))
    return array.transpose(order).reshape(shape), restore


def map_params(function: Callable[..., Any], params: nnx.State, *others: nnx.State) -> nnx.State:
    """Returns the tree of what a function makes of each parameter.

    Args:
      function: of the path such as `stacks/0/block/ffn/router/kernel`, the parameter, and those
        of the other trees. It returns an array, or a variable where axes change, too.
      params: with their logical axes; those that are masked stay as they are.
      others: of the same structure.
    """

    def apply(path: Any, variable: nnx.Variable, *more: nnx.Variable) -> nnx.Variable:
        if isinstance(variable.get_raw_value(), MaskedNode):
            return variable
        result = function(path_text(path), variable, *more)
        return result if isinstance(result, nnx.Variable) else variable.replace(result)

    return jax.tree_util.tree_map_with_path(
        apply, params, *others, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


def path_text(path: Any) -> str:
    """Returns the path of a parameter as configurations write it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
