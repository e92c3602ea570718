"""Causal attention of packed rows in blocks: almost no score of a later key is computed, nor of another document.

A block of up to `LEAST_SKIPPED` positions is halved again and again, down to `SMALLEST`: the
second half sees the whole first half, a square of scores, and the smallest parts see themselves,
triangles. A block also sees the one before it. What lies further back is seen by blocks of this
size, of twice, of four times, ... the size: two blocks of one pair see those of the pair before
which they do not touch. All of one kind is one product or two, so that the program grows with the
logarithm of the length; where no documents of the batch meet far away, those are not computed.
Each product gives a part of a query's softmax; the parts are added up with respect to the largest
score of all.

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

SMALLEST = 64
"""Positions of a triangle at most: in smaller ones there is more to add up than to leave out."""

LEAST_SKIPPED = 256
"""Positions from which on blocks are left out where no documents meet: it takes longer to tell of smaller ones."""

LONGEST_AT_ONCE, BLOCK = 1024, 512
"""Queries of a row that attend at once; of longer rows, as many as a block has."""

PADDING = jnp.iinfo(jnp.int32).max
"""The document of padding, which lies behind all others."""

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


NOTHING = (MASKED, 0.0, 0.0)
"""What no key adds to a softmax: the values of a `Part`."""


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
      segments_BL: number of the document within its row; what can be skipped is found where numbers
        do not fall, and padding (0) is last.
    """
    length = q_BLHA.shape[1]
    halvings = max(0, (length - 1) // SMALLEST).bit_length()
    missing = (
        (0, 0),
        (0, -length % (1 << halvings)),
    )  # added positions are seen by each other alone
    q_BLHA, k_BLGA, v_BLGA = (
        jnp.pad(a, (*missing, (0, 0), (0, 0))) for a in (q_BLHA, k_BLGA, v_BLGA)
    )
    row = _Row.from_arrays(q_BLHA, k_BLGA, v_BLGA, jnp.pad(segments_BL, missing))
    num = 1 << halvings
    parts = [row.triangles(num)]
    while num > 1 and row.length // num < LEAST_SKIPPED:
        num //= 2
        parts.append(row.squares(num))
    if num > 1:
        parts.append(row.previous(num))
    while num > 2:
        parts.append(row.far(num))
        num //= 2
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
    def from_arrays(cls, q_BLHA, k_BLGA, v_BLGA, segments_BL) -> "_Row":
        batch, length, _, head = q_BLHA.shape
        q_BLGRA = q_BLHA.reshape(batch, length, k_BLGA.shape[2], -1, head)
        return cls(
            q_BLGRA.transpose(0, 2, 3, 1, 4),
            k_BLGA.transpose(0, 2, 1, 3),
            v_BLGA.transpose(0, 2, 1, 3),
            jnp.where(segments_BL == 0, PADDING, segments_BL),
        )

    @property
    def length(self) -> int:
        """Positions of the row."""
        return self.segments_BL.shape[1]

    def triangles(self, num: int) -> Part:
        """The row in `num` blocks, each of which sees itself."""
        q_BGRnlA, k_BGnlA, v_BGnlA = (
            _cut(a, num, -2) for a in (self.q_BGRLA, self.k_BGLA, self.v_BGLA)
        )
        segments_Bnl = _cut(self.segments_BL, num, -1)
        length = segments_Bnl.shape[-1]
        is_causal_ll = jnp.tril(jnp.ones((length, length), bool))
        mask_Bnll = _is_same(segments_Bnl, segments_Bnl) & is_causal_ll[None, None]
        return self._whole(self._attend(q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll))

    def squares(self, num: int) -> Part:
        """The row in `num` blocks, the second half of each of which sees the first one."""
        q_BGRnlA = _cut(self.q_BGRLA, 2 * num, -2)[..., 1::2, :, :]
        k_BGnlA, v_BGnlA = (
            _cut(a, 2 * num, -2)[..., ::2, :, :] for a in (self.k_BGLA, self.v_BGLA)
        )
        segments_Bnl = _cut(self.segments_BL, 2 * num, -1)
        part = self._attend(
            q_BGRnlA, k_BGnlA, v_BGnlA, _is_same(segments_Bnl[:, 1::2], segments_Bnl[:, ::2])
        )
        return self._whole(_behind_nothing(part, axis=4))

    def previous(self, num: int) -> Part:
        """The row in `num` blocks, each of which sees the one before it."""
        q_BGRnlA = _cut(self.q_BGRLA, num, -2)[..., 1:, :, :]
        k_BGnlA, v_BGnlA = (_cut(a, num, -2)[..., :-1, :, :] for a in (self.k_BGLA, self.v_BGLA))
        segments_Bnl = _cut(self.segments_BL, num, -1)
        part = self._attend(
            q_BGRnlA, k_BGnlA, v_BGnlA, _is_same(segments_Bnl[:, 1:], segments_Bnl[:, :-1])
        )
        return self._whole(_behind_nothing(part, axis=3, size=1))

    def far(self, num: int) -> Part:
        """The row in `num` blocks, which see, in the pair of blocks before their own pair, what they do not touch.

        The first block of a pair sees the first one of the pair before, and the second
        block sees both.
        """
        pairs, length = num // 2, self.length // num
        q_BGRplA = _cut(self.q_BGRLA, pairs, -2)[..., 1:, :, :]
        k_BGpsA, v_BGpsA = (_cut(a, pairs, -2)[..., :-1, :, :] for a in (self.k_BGLA, self.v_BGLA))
        segments_Bpl = _cut(self.segments_BL, pairs, -1)[:, 1:]
        segments_Bps = _cut(self.segments_BL, pairs, -1)[:, :-1]
        first_Bpl, second_Bpl = segments_Bpl[..., :length], segments_Bpl[..., length:]
        first_Bps = segments_Bps[..., :length]

        def attend() -> Part:
            first = self._attend(
                q_BGRplA[..., :length, :],
                k_BGpsA[..., :length, :],
                v_BGpsA[..., :length, :],
                _is_same(first_Bpl, first_Bps),
            )
            second = self._attend(
                q_BGRplA[..., length:, :], k_BGpsA, v_BGpsA, _is_same(second_Bpl, segments_Bps)
            )
            both = Part(
                *(
                    jnp.concatenate(halves, 4)
                    for halves in zip(_arrays(first), _arrays(second), strict=True)
                )
            )
            return self._whole(_behind_nothing(both, axis=3, size=1))

        def skip() -> Part:
            largest, total, weighted = NOTHING
            shape = self.q_BGRLA.shape
            return Part(
                jnp.full(shape[:-1], largest),
                jnp.full(shape[:-1], total),
                jnp.full(shape, weighted, jnp.float32),
            )

        do_meet = _can_meet(first_Bpl, first_Bps) | _can_meet(second_Bpl, segments_Bps)
        return jax.lax.cond(_of_any_arm(do_meet), attend, skip)

    def _attend(self, q_BGRnlA, k_BGnlA, v_BGnlA, mask_Bnll) -> Part:
        """Of long rows, a block of queries after the other, whose scores are computed again in the backward pass."""
        if self.length <= LONGEST_AT_ONCE:
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


def _can_meet(
    segments_Bnl: Int[Array, "B n l"], segments_Bns: Int[Array, "B n s"]
) -> Bool[Array, ""]:
    """Whether any block of queries may hold a document that its block of keys holds too."""
    is_after_Bn = segments_Bnl.min(-1) > segments_Bns.max(-1)
    is_before_Bn = segments_Bnl.max(-1) < segments_Bns.min(-1)
    return ~(is_after_Bn | is_before_Bn).all()


@custom_vmap
def _of_any_arm(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """The condition; for the arms of a sweep, which `vmap` trains together, whether it holds for any of them.

    Plain `vmap` would compute both branches for all arms, and choose.
    """
    return condition


@_of_any_arm.def_vmap
def _(
    num_arms: int, is_batched: list[bool], condition_A: Bool[Array, "A"]
) -> tuple[Bool[Array, ""], bool]:
    return condition_A.any(), False


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


def _behind_nothing(part: Part, axis: int, size: int | None = None) -> Part:
    """A part behind queries that see no key, `size` or as many as there are, along an axis of `[B, G, R, n, l]`."""
    before = (
        jnp.full_like(jax.lax.slice_in_dim(x, 0, size, axis=axis), fill)
        for x, fill in zip(_arrays(part), NOTHING, strict=True)
    )
    return Part(*(jnp.concatenate(both, axis) for both in zip(before, _arrays(part), strict=True)))
