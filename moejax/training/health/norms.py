"""Norms of gradients, updates and weights: by kind of parameters, and of each expert.

They say which part of a model a spike comes from, and which experts learn. All of them are sums of
squares over arrays that the step has at hand; nothing is gathered but a number for each expert.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import kind_of

EXPERTS = "experts"
"""The axis of experts; with that of layers before it."""


class Norms(NamedTuple):
    """Norms of one step.

    Attributes:
      by_kind: scalars, see `norms_by_kind`.
      by_expert: `[N, E]` each, see `norms_by_expert`; empty for a dense model.
    """

    by_kind: dict[str, jax.Array]
    by_expert: dict[str, jax.Array]


def norms_if(
    is_wanted: jax.Array | bool, trees: Mapping[str, nnx.State], num_experts: int
) -> Norms:
    """Returns the norms of trees if they are wanted, and NaN otherwise.

    To read gradients, updates and weights once more takes 3 to 5 % of a small step on CPU, so that
    a run wants them once in each logging interval.
    """

    def measure() -> Norms:
        return Norms(norms_by_kind(trees), norms_by_expert(trees, num_experts))

    if isinstance(is_wanted, bool) and is_wanted:
        return measure()
    shapes = jax.eval_shape(measure)

    def leave_out() -> Norms:
        return jax.tree.map(lambda each: jnp.full(each.shape, jnp.nan, each.dtype), shapes)

    return jax.lax.cond(is_wanted, measure, leave_out)


def norms_by_kind(trees: Mapping[str, nnx.State]) -> dict[str, jax.Array]:
    """Returns the norm of each kind of parameters in each tree, such as `norm/gradient/router`.

    Args:
      trees: of parameters, or of what belongs to them, by name. Kinds that a tree lacks, for they
        are frozen, have no norm there.
    """
    norms = {}
    for name, tree in trees.items():
        squares: dict[str, jax.Array] = {}
        for path, variable in nnx.to_flat_state(tree):
            kind = kind_of("/".join(map(str, path)))
            squares[kind] = squares.get(kind, jnp.float32(0)) + jnp.square(variable[...]).sum()
        for kind, total in squares.items():
            norms[f"norm/{name}/{kind}"] = jnp.sqrt(total)
    return norms


def norms_by_expert(trees: Mapping[str, nnx.State], num_experts: int) -> dict[str, jax.Array]:
    """Returns the norm of each expert of each MoE layer in each tree, `[N, E]`.

    Args:
      trees: as `norms_by_kind` takes them.
      num_experts: E; experts that a layer lacks, as it has fewer or they have no weights, are NaN.

    Returns:
      Norms by `NAME_norms`; those of a tree without experts are left out.
    """
    norms = {}
    for name, tree in trees.items():
        by_layers = [jnp.sqrt(squares_NE) for squares_NE in _squares_of_experts(tree).values()]
        if by_layers:
            padded = [_pad(norms_NE, num_experts) for norms_NE in by_layers]
            norms[f"{name}_norms"] = jnp.concatenate(padded)
    return norms


def _squares_of_experts(tree: nnx.State) -> dict[str, jax.Array]:
    """Returns sums of squares `[layers, experts]` by the place of the experts in the model."""
    squares: dict[str, jax.Array] = {}
    for path, variable in nnx.to_flat_state(tree):
        if tuple(variable.axes[:2]) != ("layers", EXPERTS):
            continue
        place = "/".join(map(str, path[:-1]))
        array = variable[...]
        own = jnp.square(array).sum(axis=tuple(range(2, array.ndim)))
        squares[place] = squares[place] + own if place in squares else own
    return squares


def _pad(norms_NE: jax.Array, num_experts: int) -> jax.Array:
    missing = num_experts - norms_NE.shape[1]
    return jnp.pad(norms_NE, ((0, 0), (0, missing)), constant_values=jnp.nan)
