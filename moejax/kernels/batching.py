"""Grouped products of several models at once: what `vmap` over the arms of a sweep makes of them.

Plain `vmap` would run a loop whose turns depend on data for as long as its slowest arm needs, and
throw away what it computes for the others; kernels cannot be `vmap`ped at all. But A arms of E
groups are one product of A * E groups. The rows of an arm that belong to no group join its last one
as zeros, so that the next arm's begin where groups end.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from moejax.kernels.zero_padding import zero_padding_rows

Product = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
"""A product of grouped rows, by matrices or of outer products.

`(rows, matrices, group_sizes, padding_rows) -> rows`, or
`(rows, rows, group_sizes, padding_rows) -> matrices`.
"""


def fold_arms(
    product: Product,
    x_RP: jax.Array,
    other: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
) -> jax.Array:
    """Returns `product(x_RP, other, group_sizes_E, padding_rows)`; `vmap` folds arms into groups.

    Args:
      product: of rows by matrices, or the outer products of rows.
      x_RP: rows of all groups.
      other: matrices `[E, P, Q]`, or rows `[R, Q]`.
      group_sizes_E: rows of each group.
      padding_rows: at least this many rows at the end belong to no group.

    Returns:
      Rows `[R, Q]`, or matrices `[E, P, Q]`.
    """
    gives_rows = other.ndim == 3

    @custom_vmap
    def one(x_RP, other, group_sizes_E):
        return product(x_RP, other, group_sizes_E, padding_rows)

    @one.def_vmap
    def all_arms(num_arms: int, is_batched: Any, *arrays: jax.Array):
        x_ARP, others, sizes_AE = each_arm(num_arms, is_batched, arrays)
        zero_padding = jax.vmap(zero_padding_rows)
        if not gives_rows:
            others = zero_padding(others, sizes_AE)
        x_ARP = zero_padding(x_ARP, sizes_AE)
        folded_rows = merge(x_ARP)
        folded_others = merge(others)
        num_rows = x_ARP.shape[1]
        folded_sizes = merge(_with_padding_group(sizes_AE, num_rows))
        folded_result = fold_arms(product, folded_rows, folded_others, folded_sizes, 0)
        result = split(folded_result, num_arms)
        if gives_rows:
            result = zero_padding(result, sizes_AE)
        return result, True

    return one(x_RP, other, group_sizes_E)


def loop_over_arms(
    product: Product,
    x_RP: jax.Array,
    other: jax.Array,
    group_sizes_E: jax.Array,
    padding_rows: int,
) -> jax.Array:
    """Returns `product(x_RP, other, group_sizes_E, padding_rows)`; `vmap` loops over the arms.

    For a product that multiplies all rows by all matrices; see `fold_arms`.
    """

    @custom_vmap
    def one(x_RP, other, group_sizes_E):
        return product(x_RP, other, group_sizes_E, padding_rows)

    @one.def_vmap
    def all_arms(num_arms: int, is_batched: Any, *arrays: jax.Array):
        def run_arm(arm: tuple[jax.Array, ...]) -> jax.Array:
            return one(*arm)

        each = each_arm(num_arms, is_batched, arrays)
        result = jax.lax.map(run_arm, tuple(each))
        return result, True

    return one(x_RP, other, group_sizes_E)


def each_arm(
    num_arms: int,
    is_batched: Any,
    arrays: tuple[jax.Array, ...],
) -> list[jax.Array]:
    """Returns the arrays with a leading axis of arms; what arms share is repeated."""
    each = []
    for array, has_arms in zip(arrays, is_batched, strict=True):
        if has_arms:
            each.append(array)
        else:
            each.append(_repeat(array, num_arms))
    return each


def _repeat(array: jax.Array, num_arms: int) -> jax.Array:
    """Returns the array once for every arm."""
    shape = (num_arms, *array.shape)
    return jnp.broadcast_to(array[None], shape)


def merge(array: jax.Array) -> jax.Array:
    """Joins the axes of arms and of what each has: `[A, X, ...]` becomes `[A * X, ...]`."""
    return array.reshape(-1, *array.shape[2:])


def split(array: jax.Array, num_arms: int) -> jax.Array:
    """Undoes `merge`."""
    return array.reshape(num_arms, -1, *array.shape[1:])


def _with_padding_group(sizes_AE: jax.Array, num_rows: int) -> jax.Array:
    """Returns the sizes with each arm's remaining rows added to its last group."""
    num_in_groups_A = sizes_AE.sum(axis=1)
    num_in_groups_A = num_in_groups_A.astype(sizes_AE.dtype)
    num_left_A = num_rows - num_in_groups_A
    return sizes_AE.at[:, -1].add(num_left_A)
