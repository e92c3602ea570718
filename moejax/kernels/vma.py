"""Varying axes of arrays that meet in a loop or a custom VJP.

`shard_map` with `check_vma=True` must know them.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Returns the mesh axes over which `x` may differ between devices; none outside `shard_map`."""
    return jax.typeof(x).mat.varying


def unify_vma(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Gives the arrays the union of their varying axes.

    The transpose of this cast is a `psum`: it is what sums the gradient of replicated weights over
    devices. Outside `shard_map` it does nothing.
    """
    union = frozenset().union(*map(varying_axes, arrays))
    return tuple(_vary(x, union) for x in arrays)


def zeros_varying_like(
    like: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """Returns zeros that vary over the axes of `like`, as the initial carry of a loop must."""
    zeros = jnp.zeros(shape, dtype)
    return _vary(zeros, varying_axes(like))


def empty_varying_like(
    like: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """Returns an array without values that varies over the axes of `like`.

    It saves the time to write zeros; the caller writes all that is read.
    """
    empty = jax.lax.empty(shape, dtype)
    return _vary(empty, varying_axes(like))


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - varying_axes(x)))
    if not missing:
        return x
    return jax.lax.pcast(x, missing, to="varying")
