"""Axes of positions cut into blocks and joined again, and the documents that blocks share."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Tree = TypeVar("Tree")


def cut_axis(x: jax.Array, num: int, axis: int) -> jax.Array:
    """Cuts an axis into `num` equal parts, which are a new axis before it."""
    axis %= x.ndim
    before = x.shape[:axis]
    after = x.shape[axis + 1 :]
    return x.reshape(*before, num, -1, *after)


def some_blocks(x_LA: jax.Array, num: int, chosen: slice) -> jax.Array:
    """Cuts the last axis but one into `num` equal blocks, and returns some of them."""
    x_nlA = cut_axis(x_LA, num, -2)
    return x_nlA[..., chosen, :, :]


def join_axis(x: jax.Array, axis: int) -> jax.Array:
    """Joins an axis and the next one."""
    before = x.shape[:axis]
    after = x.shape[axis + 2 :]
    return x.reshape(*before, -1, *after)


def join_blocks(part: Tree) -> Tree:
    """Joins the blocks of a row, which are on axis 3."""
    return jax.tree.map(lambda x_BGRnl: join_axis(x_BGRnl, 3), part)


def query_blocks(x: jax.Array, num_blocks: int) -> jax.Array:
    """Returns blocks of queries, which are on the last axis but one, along a new first axis."""
    blocks = cut_axis(x, num_blocks, -2)
    return jnp.moveaxis(blocks, -3, 0)


def join_query_blocks(x: jax.Array) -> jax.Array:
    """Joins blocks of queries, which are on axis 0, to the queries on axis 4."""
    blocks = jnp.moveaxis(x, 0, 4)
    return join_axis(blocks, 4)


def concatenate_queries(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns the queries of both, which are on axis 4."""
    return jnp.concatenate((first, second), 4)


def is_same(segments_Bnl: jax.Array, segments_Bns: jax.Array) -> jax.Array:
    """Whether each query's document is the key's, `[B, n, l, s]`."""
    query_Bnl1 = segments_Bnl[..., :, None]
    key_Bn1s = segments_Bns[..., None, :]
    return query_Bnl1 == key_Bn1s


def may_meet(
    segments_Bnl: Int[Array, "B n l"],
    segments_Bns: Int[Array, "B n s"],
) -> Bool[Array, ""]:
    """Whether any block of queries may hold a document that its block of keys holds too."""
    first_query_Bn = segments_Bnl.min(-1)
    last_key_Bn = segments_Bns.max(-1)
    is_after_Bn = first_query_Bn > last_key_Bn
    last_query_Bn = segments_Bnl.max(-1)
    first_key_Bn = segments_Bns.min(-1)
    is_before_Bn = last_query_Bn < first_key_Bn
    is_apart_Bn = is_after_Bn | is_before_Bn
    return ~is_apart_Bn.all()
