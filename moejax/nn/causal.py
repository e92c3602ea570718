"""Causal attention of packed rows in squares and triangles: almost no score of a later key is computed.

A row is halved again and again, down to `SMALLEST` positions. Every query of a second half sees its whole first half, a
square of scores, and every smallest part sees itself, a triangle. All squares of one size are one product, so that the
program grows with the logarithm of the length. Each gives a part of a query's softmax; the parts are added up with
respect to the largest score of all.

It serves XLA:CPU, where attention that computes all scores and masks half of them takes two to four times as long.

Sources: the sum of parts is that of Milakov & Gimelshein 2018, section 3 (online softmax); long rows keep no scores for
the backward pass, as in Rabe & Staats 2021.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SMALLEST = 64
"""Positions of a triangle at most: in smaller ones there is more to add up than to skip."""

LONGEST_AT_ONCE, BLOCK = 1024, 512
"""Queries of a row that attend at once; of longer rows, as many as a block has."""

MASKED = -1e30
"""The score of a key that a query may not see; its exponential is 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """What some keys add to the softmax of each query, float32.

    Attributes:
      largest: the largest score; a constant for gradients, which do not depend on it.
      total: the sum of the exponentials of all scores minus `largest`.
      weighted: the sum of the values, weighted by these, with an axis more.
    """

    largest: jax.Array
    total: jax.Array
    weighted: jax.Array


def attend_causally(
    q_BLHA: Float[Array, "B L H A"],
    k_BLGA: Float[Array, "B L G A"],
    v_BLGA: Float[Array, "B L G A"],
    segments_BL: Int[Array, "B L"],
) -> Float[Array, "B L H A"]:
    """Softmax attention of each position to those of its segment up to itself, with H heads that share G.

    Args:
      q_BLHA: queries.
      k_BLGA: keys.
      v_BLGA: values.
      segments_BL: number of the document within its row.
    """
    length = q_BLHA.shape[1]
    halvings = max(0, (length - 1) // SMALLEST).bit_length()
    missing = ((0, 0), (0, -length % (1 << halvings)))  # added positions are seen by each other alone
    q_BLHA, k_BLGA, v_BLGA = (jnp.pad(a, (*missing, (0, 0), (0, 0))) for a in (q_BLHA, k_BLGA, v_BLGA))
    row = _Row.of(q_BLHA, k_BLGA, v_BLGA, jnp.pad(segments_BL, missing))
    parts = [row.triangles(1 << halvings)]
    for level in range(halvings):
        parts.append(row.squares(1 << level))
    y_BGRLA = _add_up(parts).astype(q_BLHA.dtype)
    return y_BGRLA.transpose(0, 3, 1, 2, 4).reshape(q_BLHA.shape)[:, :length]


@dataclasses.dataclass(frozen=True)
class _Row:
    """Queries, keys and values with positions last but one; R = H / G query heads share those of a key head."""

    q_BGRLA: jax.Array
    k_BGLA: jax.Array
    v_BGLA: jax.Array
    segments_BL: jax.Array

    @classmethod
    def of(cls, q_BLHA, k_BLGA, v_BLGA, segments_BL) -> "_Row":
        batch, length, _, head = q_BLHA.shape
        q_BLGRA = q_BLHA.reshape(batch, length, k_BLGA.shape[2], -1, head)
        return cls(
            q_BLGRA.transpose(0, 2, 3, 1, 4), k_BLGA.transpose(0, 2, 1, 3), v_BLGA.transpose(0, 2, 1, 3), segments_BL
        )

    def triangles(self, num: int) -> Part:
        """The row in `num` parts, each of which sees itself."""
        q_BGRnlA, k_BGnlA, v_BGnlA = (_cut(a, num, -2) for a in (self.q_BGRLA, self.k_BGLA, self.v_BGLA))
        segments_Bnl = _cut(self.segments_BL, num, -1)
        length = segments_Bnl.shape[-1]
        is_causal_ll = jnp.tril(jnp.ones((length, length), bool))
        mask_Bnll = _is_same(segments_Bnl, segments_Bnl) & is_causal_ll[None, None]
        return self._whole(self._attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll))

    def squares(self, num: int) -> Part:
        """The row in `num` parts, the second half of each of which sees the first one."""
        q_BGRnlA = _cut(self.q_BGRLA, 2 * num, -2)[..., 1::2, :, :]
        k_BGnlA, v_BGnlA = (_cut(a, 2 * num, -2)[..., ::2, :, :] for a in (self.k_BGLA, self.v_BGLA))
        segments_Bnl = _cut(self.segments_BL, 2 * num, -1)
        mask_Bnll = _is_same(segments_Bnl[:, 1::2], segments_Bnl[:, ::2])
        part = self._attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll)
        return self._whole(Part(*(_behind(x, x_0) for x, x_0 in zip(_arrays(part), (MASKED, 0.0, 0.0), strict=True))))

    def _attend(self, q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll) -> Part:
        """Of long rows, a block of queries after the other, whose scores are computed again in the backward pass."""
        if self.segments_BL.shape[1] <= LONGEST_AT_ONCE:
            return _attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll)
        length = q_BGRnlA.shape[-2]
        num_blocks = 1
        while length % (2 * num_blocks) == 0 and length // num_blocks > BLOCK:
            num_blocks *= 2

        @jax.checkpoint
        def one_block(block):
            q_BGRnbA, mask_Bnbl = block
            return _attend(q_BGRnbA, k_BGnlA, v_BGnlA, mask_Bnbl)

        queries = jnp.moveaxis(_cut(q_BGRnlA, num_blocks, -2), -3, 0)
        masks = jnp.moveaxis(_cut(mask_Bnll, num_blocks, -2), -3, 0)
        blocks = jax.lax.map(one_block, (queries, masks))
        return Part(*(_join(jnp.moveaxis(x, 0, 4), 4) for x in _arrays(blocks)))

    def _whole(self, part: Part) -> Part:
        """Parts of a row, one after the other."""
        return Part(*(_join(x, 3) for x in _arrays(part)))


def _attend(
    q_BGRnlA: Float[Array, "B G R n l A"],
    k_BGnsA: Float[Array, "B G n s A"],
    v_BGnsA: Float[Array, "B G n s A"],
    mask_Bnls: Bool[Array, "B n l s"],
) -> Part:
    """The part of these keys; the queries of all heads that share them are rows of one product."""
    batch, groups, shared, num, length, head = q_BGRnlA.shape
    rows = (batch, groups, num, shared * length)
    q_BGnrA = q_BGRnlA.swapaxes(2, 3).reshape(*rows, head)
    scores_BGnrs = jnp.matmul(q_BGnrA, k_BGnsA.mT, preferred_element_type=jnp.float32)
    scores_BGnRls = scores_BGnrs.reshape(batch, groups, num, shared, length, -1) * head**-0.5
    scores_BGnRls = jnp.where(mask_Bnls[:, None, :, None], scores_BGnRls, MASKED)
    largest_BGnRl = jax.lax.stop_gradient(scores_BGnRls.max(-1))
    exponentials_BGnRls = jnp.exp(scores_BGnRls - largest_BGnRl[..., None])
    weights_BGnrs = exponentials_BGnRls.astype(v_BGnsA.dtype).reshape(*rows, -1)
    weighted_BGnrA = jnp.matmul(weights_BGnrs, v_BGnsA, preferred_element_type=jnp.float32)
    weighted_BGnRlA = weighted_BGnrA.reshape(batch, groups, num, shared, length, head)
    arrays = (largest_BGnRl, exponentials_BGnRls.sum(-1), weighted_BGnRlA)
    return Part(*(x.swapaxes(2, 3) for x in arrays))


def _add_up(parts: list[Part]) -> jax.Array:
    """The mean of the values, weighted by the softmax over the keys of all parts."""
    largest = functools.reduce(jnp.maximum, [part.largest for part in parts])
    total, weighted = jnp.zeros_like(parts[0].total), jnp.zeros_like(parts[0].weighted)
    for part in parts:
        scale = jnp.exp(part.largest - largest)
        total += scale * part.total
        weighted += scale[..., None] * part.weighted
    return weighted / total[..., None]


def _is_same(segments_Bnl: jax.Array, segments_Bns: jax.Array) -> jax.Array:
    return segments_Bnl[..., :, None] == segments_Bns[..., None, :]


def _arrays(part: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
    return part.largest, part.total, part.weighted


def _cut(x: jax.Array, num: int, axis: int) -> jax.Array:
    """An axis in `num` equal parts: a new axis before it."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], num, -1, *x.shape[axis + 1 :])


def _join(x: jax.Array, axis: int) -> jax.Array:
    """An axis and the next one as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _behind(x_BGRnl: jax.Array, fill: float) -> jax.Array:
    """Each of the n parts behind as much of `fill`, along l."""
    return jnp.concatenate([jnp.full_like(x_BGRnl, fill), x_BGRnl], axis=4)
