"""Causal attention of packed rows in blocks.

Almost no score of a later key is computed, nor of a key of another document.

A block of up to `LEAST_SKIPPED` positions is halved again and again, down to `SMALLEST`: the second
half sees all of the first half, a square of scores, and the smallest parts see themselves,
triangles. A block also sees the one before it. What is further back is seen by blocks of this size,
of twice, of four times, ... the size: two blocks of one pair see those of the pair before which
they do not touch. All of one kind is one product or two, so that the program grows with the
logarithm of the length. Distant blocks are not computed where no document reaches from one to the
other anywhere in the batch. Each product gives a part of a query's softmax; the parts are added up
with respect to the largest score of all.

It serves XLA:CPU, where attention that computes all scores and masks half of them takes two to four
times as long.

Sources: the sum of parts is that of Milakov & Gimelshein 2018, section 3 (online softmax); long
rows keep no scores for the backward pass, as in Rabe & Staats 2021; the blocks are the interaction
lists of the fast multipole method, Greengard & Rokhlin 1987.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from moejax.nn.attention.blocks import (
    concatenate_queries,
    cut_axis,
    is_same,
    join_blocks,
    join_query_blocks,
    may_meet,
    query_blocks,
    some_blocks,
)

SMALLEST = 64
"""The most positions of a triangle: smaller ones cost more to add up than they save."""

LEAST_SKIPPED = 256
"""The fewest positions of blocks that are skipped where no documents meet.

Checking smaller blocks takes longer than computing them.
"""

LONGEST_AT_ONCE = 1024
"""The most queries of a row that attend at once."""

BLOCK = 512
"""Queries of a longer row that attend at once."""

PADDING = jnp.iinfo(jnp.int32).max
"""The document of padding, which comes after all others."""

MASKED = -1e30
"""The score of a key that a query may not see; its exponential is 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What some keys add to the softmax of each query, float32.

    Attributes:
      largest: the largest score; a constant for gradients, which do not depend on it.
      total: the sum of the exponentials of all scores minus `largest`.
      weighted: the sum of the values, weighted by these, with one more axis.
    """

    largest: jax.Array
    total: jax.Array
    weighted: jax.Array


NOTHING = (MASKED, 0.0, 0.0)
"""The values of a `Part` without keys."""


def attend_causally(
    q_BLHA: Float[Array, "B L H A"],
    k_BLGA: Float[Array, "B L G A"],
    v_BLGA: Float[Array, "B L G A"],
    segments_BL: Int[Array, "B L"],
) -> Float[Array, "B L H A"]:
    """Computes softmax attention of each position to those of its segment up to itself.

    H query heads share G key and value heads.

    Args:
      q_BLHA: queries.
      k_BLGA: keys.
      v_BLGA: values.
      segments_BL: number of the document within its row. Results are right for any numbers; blocks
        are skipped where numbers never fall along the row, with padding (0) last.
    """
    length = q_BLHA.shape[1]
    num = _num_smallest(length)
    # Added positions are seen by each other alone.
    missing = ((0, 0), (0, -length % num))
    missing_with_heads = (*missing, (0, 0), (0, 0))
    q_BLHA = jnp.pad(q_BLHA, missing_with_heads)
    k_BLGA = jnp.pad(k_BLGA, missing_with_heads)
    v_BLGA = jnp.pad(v_BLGA, missing_with_heads)
    segments_BL = jnp.pad(segments_BL, missing)
    row = _Row.from_arrays(q_BLHA, k_BLGA, v_BLGA, segments_BL)
    parts = row.all_parts(num)
    y_BGRLA = _add_up(parts)
    y_BGRLA = y_BGRLA.astype(q_BLHA.dtype)
    y_BLGRA = y_BGRLA.transpose(0, 3, 1, 2, 4)
    y_BLHA = y_BLGRA.reshape(q_BLHA.shape)
    return y_BLHA[:, :length]


def _num_smallest(length: int) -> int:
    """Returns into how many of the smallest blocks a row is cut: a power of two."""
    num_needed = (length - 1) // SMALLEST
    halvings = max(0, num_needed).bit_length()
    return 1 << halvings


@dataclasses.dataclass(frozen=True)
class _Row:
    """Queries, keys and values with positions on the last axis but one.

    R = H / G query heads share the keys and values of one head.
    """

    q_BGRLA: jax.Array
    k_BGLA: jax.Array
    v_BGLA: jax.Array
    segments_BL: jax.Array

    @classmethod
    def from_arrays(
        cls,
        q_BLHA: jax.Array,
        k_BLGA: jax.Array,
        v_BLGA: jax.Array,
        segments_BL: jax.Array,
    ) -> "_Row":
        """Returns the row of arrays whose positions are on axis 1."""
        batch, length, _, head = q_BLHA.shape
        groups = k_BLGA.shape[2]
        q_BLGRA = q_BLHA.reshape(batch, length, groups, -1, head)
        return cls(
            q_BGRLA=q_BLGRA.transpose(0, 2, 3, 1, 4),
            k_BGLA=k_BLGA.transpose(0, 2, 1, 3),
            v_BGLA=v_BLGA.transpose(0, 2, 1, 3),
            segments_BL=jnp.where(segments_BL == 0, PADDING, segments_BL),
        )

    @property
    def length(self) -> int:
        """Returns how many positions the row has."""
        return self.segments_BL.shape[1]

    def all_parts(self, num: int) -> list[Part]:
        """Returns the parts of all keys that queries see; `num` blocks are the smallest."""
        parts = [self.triangles(num)]
        while num > 1 and self.length // num < LEAST_SKIPPED:
            num //= 2
            parts.append(self.squares(num))
        if num > 1:
            parts.append(self.previous(num))
        while num > 2:
            parts.append(self.far(num))
            num //= 2
        return parts

    def triangles(self, num: int) -> Part:
        """Returns the part of `num` blocks, each of which sees itself."""
        q_BGRnlA = cut_axis(self.q_BGRLA, num, -2)
        k_BGnlA = cut_axis(self.k_BGLA, num, -2)
        v_BGnlA = cut_axis(self.v_BGLA, num, -2)
        segments_Bnl = cut_axis(self.segments_BL, num, -1)
        length = segments_Bnl.shape[-1]
        ones_ll = jnp.ones((length, length), bool)
        is_causal_ll = jnp.tril(ones_ll)
        is_same_Bnll = is_same(segments_Bnl, segments_Bnl)
        mask_Bnll = is_same_Bnll & is_causal_ll[None, None]
        part = self._attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll)
        return join_blocks(part)

    def squares(self, num: int) -> Part:
        """Returns the part of `num` blocks, the second half of each of which sees the first one."""
        halves = 2 * num
        first = slice(None, None, 2)
        second = slice(1, None, 2)
        q_BGRnlA = some_blocks(self.q_BGRLA, halves, second)
        k_BGnlA = some_blocks(self.k_BGLA, halves, first)
        v_BGnlA = some_blocks(self.v_BGLA, halves, first)
        segments_Bhl = cut_axis(self.segments_BL, halves, -1)
        mask_Bnll = is_same(segments_Bhl[:, second], segments_Bhl[:, first])
        part = self._attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll)
        whole = _put_empty_before(part, axis=4)
        return join_blocks(whole)

    def previous(self, num: int) -> Part:
        """Returns the part of `num` blocks, each of which sees the one before it."""
        later = slice(1, None)
        earlier = slice(None, -1)
        q_BGRnlA = some_blocks(self.q_BGRLA, num, later)
        k_BGnlA = some_blocks(self.k_BGLA, num, earlier)
        v_BGnlA = some_blocks(self.v_BGLA, num, earlier)
        segments_Bnl = cut_axis(self.segments_BL, num, -1)
        mask_Bnll = is_same(segments_Bnl[:, later], segments_Bnl[:, earlier])
        part = self._attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll)
        whole = _put_empty_before(part, axis=3, size=1)
        return join_blocks(whole)

    def far(self, num: int) -> Part:
        """Returns the part of `num` blocks, which see the blocks before that are not adjacent.

        These are of the pair of blocks before a block's own pair. The first block of a pair sees
        the first one of the pair before, and the second block sees both.
        """
        pairs = num // 2
        length = self.length // num
        later = slice(1, None)
        earlier = slice(None, -1)
        q_BGRplA = some_blocks(self.q_BGRLA, pairs, later)
        k_BGpsA = some_blocks(self.k_BGLA, pairs, earlier)
        v_BGpsA = some_blocks(self.v_BGLA, pairs, earlier)
        segments_Bpl = cut_axis(self.segments_BL, pairs, -1)[:, later]
        segments_Bps = cut_axis(self.segments_BL, pairs, -1)[:, earlier]
        first_Bpl = segments_Bpl[..., :length]
        second_Bpl = segments_Bpl[..., length:]
        first_Bps = segments_Bps[..., :length]

        def attend() -> Part:
            first_part = self._attend(
                q_BGRplA[..., :length, :],
                k_BGpsA[..., :length, :],
                v_BGpsA[..., :length, :],
                is_same(first_Bpl, first_Bps),
            )
            second_part = self._attend(
                q_BGRplA[..., length:, :],
                k_BGpsA,
                v_BGpsA,
                is_same(second_Bpl, segments_Bps),
            )
            part = jax.tree.map(concatenate_queries, first_part, second_part)
            whole = _put_empty_before(part, axis=3, size=1)
            return join_blocks(whole)

        first_may_meet = may_meet(first_Bpl, first_Bps)
        second_may_meet = may_meet(second_Bpl, segments_Bps)
        any_may_meet = first_may_meet | second_may_meet
        return jax.lax.cond(_in_any_arm(any_may_meet), attend, self._no_part)

    def _no_part(self) -> Part:
        """Returns the part of a row whose queries see no key."""
        largest, total, weighted = NOTHING
        shape = self.q_BGRLA.shape
        return Part(
            largest=jnp.full(shape[:-1], largest),
            total=jnp.full(shape[:-1], total),
            weighted=jnp.full(shape, weighted, jnp.float32),
        )

    def _attend(
        self,
        q_BGRnlA: jax.Array,
        k_BGnlA: jax.Array,
        v_BGnlA: jax.Array,
        mask_Bnll: jax.Array,
    ) -> Part:
        """Returns the part of these keys; in long rows, one block of queries after the other.

        The scores of such a block are computed again in the backward pass.
        """
        if self.length <= LONGEST_AT_ONCE:
            return _attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll)
        length = q_BGRnlA.shape[-2]
        num_blocks = _num_query_blocks(length)

        @jax.checkpoint
        def one_block(block):
            q_BGRnbA, mask_Bnbl = block
            return _attend(q_BGRnbA, k_BGnlA, v_BGnlA, mask_Bnbl)

        queries = query_blocks(q_BGRnlA, num_blocks)
        masks = query_blocks(mask_Bnll, num_blocks)
        blocks = jax.lax.map(one_block, (queries, masks))
        return jax.tree.map(join_query_blocks, blocks)


def _num_query_blocks(length: int) -> int:
    """Returns into how many blocks queries are cut: as few as have at most `BLOCK`, if they can."""
    num_blocks = 1
    while length % (2 * num_blocks) == 0 and length // num_blocks > BLOCK:
        num_blocks *= 2
    return num_blocks


def _attend(
    q_BGRnlA: Float[Array, "B G R n l A"],
    k_BGnsA: Float[Array, "B G n s A"],
    v_BGnsA: Float[Array, "B G n s A"],
    mask_Bnls: Bool[Array, "B n l s"],
) -> Part:
    """Returns the part of these keys.

    The queries of all heads that share them are rows of one product.
    """
    batch, groups, shared, num, length, head = q_BGRnlA.shape
    rows = (batch, groups, num, shared * length)
    queries = (batch, groups, num, shared, length)
    q_BGnRlA = q_BGRnlA.swapaxes(2, 3)
    q_BGnrA = q_BGnRlA.reshape(*rows, head)
    scores_BGnrs = _matmul(q_BGnrA, k_BGnsA.mT)
    scores_BGnRls = scores_BGnrs.reshape(*queries, -1)
    scores_BGnRls = scores_BGnRls * head**-0.5
    mask_B1n1ls = mask_Bnls[:, None, :, None]
    scores_BGnRls = jnp.where(mask_B1n1ls, scores_BGnRls, MASKED)
    largest_BGnRl = scores_BGnRls.max(-1)
    largest_BGnRl = jax.lax.stop_gradient(largest_BGnRl)
    exponentials_BGnRls = jnp.exp(scores_BGnRls - largest_BGnRl[..., None])
    weights_BGnRls = exponentials_BGnRls.astype(v_BGnsA.dtype)
    weights_BGnrs = weights_BGnRls.reshape(*rows, -1)
    weighted_BGnrA = _matmul(weights_BGnrs, v_BGnsA)
    weighted_BGnRlA = weighted_BGnrA.reshape(*queries, head)
    total_BGnRl = exponentials_BGnRls.sum(-1)
    return Part(
        largest=largest_BGnRl.swapaxes(2, 3),
        total=total_BGnRl.swapaxes(2, 3),
        weighted=weighted_BGnRlA.swapaxes(2, 3),
    )


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the product in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _add_up(parts: list[Part]) -> jax.Array:
    """Returns the mean of the values, weighted by the softmax over the keys of all parts."""
    largest = functools.reduce(jnp.maximum, [part.largest for part in parts])
    total = jnp.zeros_like(parts[0].total)
    weighted = jnp.zeros_like(parts[0].weighted)
    for part in parts:
        scale = jnp.exp(part.largest - largest)
        total += scale * part.total
        weighted += scale[..., None] * part.weighted
    return weighted / total[..., None]


@custom_vmap
def _in_any_arm(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """Returns the condition, or under `vmap` whether it holds for any arm of the sweep.

    Plain `vmap` would compute both branches for all arms, and choose.
    """
    return condition


@_in_any_arm.def_vmap
def _(
    num_arms: int, is_batched: list[bool], condition_A: Bool[Array, "A"]
) -> tuple[Bool[Array, ""], bool]:
    return condition_A.any(), False


def _put_empty_before(part: Part, axis: int, size: int | None = None) -> Part:
    """Puts queries that see no key before those of a part, along an axis of `[B, G, R, n, l]`.

    There are `size` of them, or as many as the part has.
    """

    def extend(x, fill):
        first = jax.lax.slice_in_dim(x, 0, size, axis=axis)
        empty = jnp.full_like(first, fill)
        return jnp.concatenate((empty, x), axis)

    largest, total, weighted = NOTHING
    return Part(
        largest=extend(part.largest, largest),
        total=extend(part.total, total),
        weighted=extend(part.weighted, weighted),
    )
