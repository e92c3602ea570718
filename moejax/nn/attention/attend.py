"""Softmax attention: the kernel that suits the platform and the mask."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.kernels.device import platform
from moejax.nn.attention.causal_blocks import (
    BLOCK,
    LONGEST_AT_ONCE,
    MASKED,
    attend_causally,
)
from moejax.nn.mask import AttentionMask
from moejax.sharding import BATCH_AXES, TOKENS, has_context


def attend(
    q_BLHA: Float[Array, "B L H A"],
    k_BSGA: Float[Array, "B S G A"],
    v_BSGA: Float[Array, "B S G A"],
    mask: AttentionMask,
    sinks_H: Float[Array, "H"] | None = None,
    score_cap: float = 0.0,
) -> Float[Array, "B L H A"]:
    """Computes softmax attention of H query heads, which share G key and value heads.

    Where a mesh in context splits sequences, the queries of each device see keys and values of all.

    Args:
      q_BLHA: queries.
      k_BSGA: keys.
      v_BSGA: values.
      mask: which keys each query may see.
      sinks_H: a score of each head that takes part in its softmax and has no value.
      score_cap: the limit of scores, see `attention.score_cap`; 0: none.
    """
    if mask.has_rows and has_context():
        return _attend_across_devices(q_BLHA, k_BSGA, v_BSGA, mask, sinks_H, score_cap)
    is_plain = sinks_H is None and not score_cap
    if mask.is_of_rows and is_plain and platform() == "cpu":
        return attend_causally(q_BLHA, k_BSGA, v_BSGA, mask.query_segments_BL)
    return attend_plainly(q_BLHA, k_BSGA, v_BSGA, mask, sinks_H, score_cap)


def attend_plainly(
    q_BLHA: Float[Array, "B L H A"],
    k_BSGA: Float[Array, "B S G A"],
    v_BSGA: Float[Array, "B S G A"],
    mask: AttentionMask,
    sinks_H: Float[Array, "H"] | None = None,
    score_cap: float = 0.0,
) -> Float[Array, "B L H A"]:
    """Computes all scores, for any mask; queries of long rows take turns, in blocks.

    Scores `[B, H, L, S]` in float32 of all queries at once would need more memory than the rest of
    the model. Those of a block are computed again in the backward pass.
    """
    batch, length = q_BLHA.shape[:2]
    if length <= LONGEST_AT_ONCE:
        return _attend_at_once(q_BLHA, k_BSGA, v_BSGA, mask, sinks_H, score_cap)
    # Queries that fill up the last block may see no key. Their softmax is then that of equal
    # scores, which is finite; their outputs are cut off.
    missing = -length % BLOCK
    mask = mask.by_query(batch, length)
    queries = (q_BLHA, mask.query_positions_BL, mask.query_segments_BL, mask.window)
    padded = jax.tree.map(lambda x_BLX: _pad_positions(x_BLX, missing), queries)
    blocks = jax.tree.map(_split_into_blocks, padded)

    @jax.checkpoint
    def one_block(block: Any) -> jax.Array:
        q_BlHA, positions_Bl, segments_Bl, window_Bl = block
        block_mask = dataclasses.replace(
            mask,
            query_positions_BL=positions_Bl,
            query_segments_BL=segments_Bl,
            window=window_Bl,
        )
        return _attend_at_once(q_BlHA, k_BSGA, v_BSGA, block_mask, sinks_H, score_cap)

    y_NBlHA = jax.lax.map(one_block, blocks)
    y_BNlHA = y_NBlHA.swapaxes(0, 1)
    y_BMHA = y_BNlHA.reshape(batch, length + missing, *q_BLHA.shape[2:])
    return y_BMHA[:, :length]


def _attend_at_once(
    q_BLHA, k_BSGA, v_BSGA, mask: AttentionMask, sinks_H, score_cap: float
) -> jax.Array:
    batch, length = q_BLHA.shape[:2]
    mask_BLS = mask.materialize(batch, length, k_BSGA.shape[1])
    if sinks_H is None and not score_cap:
        mask_B1LS = mask_BLS[:, None]
        return jax.nn.dot_product_attention(q_BLHA, k_BSGA, v_BSGA, mask=mask_B1LS)
    return _attend_by_scores(q_BLHA, k_BSGA, v_BSGA, mask_BLS, sinks_H, score_cap)


def _attend_by_scores(q_BLHA, k_BSGA, v_BSGA, mask_BLS, sinks_H, score_cap: float) -> jax.Array:
    """Computes attention whose scores have a limit, or whose softmax has one more score.

    No value comes of that score. The logsumexp that `jax.nn.dot_product_attention` returns would
    serve, but has no gradient.
    """
    batch, length, _, width = q_BLHA.shape
    num_groups = k_BSGA.shape[2]
    q_BLGRA = q_BLHA.reshape(batch, length, num_groups, -1, width)
    scores_BGRLS = jnp.einsum(
        "BLGRA,BSGA->BGRLS", q_BLGRA, k_BSGA, preferred_element_type=jnp.float32
    )
    scores_BGRLS *= width**-0.5
    if score_cap:
        scores_BGRLS = score_cap * jnp.tanh(scores_BGRLS / score_cap)
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, MASKED)
    if sinks_H is not None:
        scores_BGRLS = _append_sinks(scores_BGRLS, sinks_H)
    weights_BGRLX = jax.nn.softmax(scores_BGRLS, axis=-1)
    num_keys = k_BSGA.shape[1]
    weights_BGRLS = weights_BGRLX[..., :num_keys].astype(v_BSGA.dtype)
    y_BLGRA = jnp.einsum("BGRLS,BSGA->BLGRA", weights_BGRLS, v_BSGA)
    return y_BLGRA.reshape(q_BLHA.shape)


def _append_sinks(scores_BGRLS: jax.Array, sinks_H: jax.Array) -> jax.Array:
    """Returns scores with that of each head's sink after those of the keys."""
    num_groups, num_sharing = scores_BGRLS.shape[1:3]
    sinks_GR = sinks_H.astype(jnp.float32).reshape(num_groups, num_sharing)
    sink_shape = (*scores_BGRLS.shape[:-1], 1)
    sinks_BGRL1 = jnp.broadcast_to(sinks_GR[None, :, :, None, None], sink_shape)
    return jnp.concatenate([scores_BGRLS, sinks_BGRL1], axis=-1)


def _attend_across_devices(
    q_BLHA, k_BLGA, v_BLGA, mask: AttentionMask, sinks_H, score_cap: float
) -> jax.Array:
    """Attends within rows whose positions are split over the devices of the axis `context`."""
    batch, length = q_BLHA.shape[:2]
    queries = PartitionSpec(BATCH_AXES, "context", "tensor")
    keys = PartitionSpec(BATCH_AXES, None, "tensor")
    mask_specs = dataclasses.replace(
        mask,
        query_positions_BL=TOKENS,
        query_segments_BL=TOKENS,
        key_segments_BS=PartitionSpec(BATCH_AXES, None),
        window=None if mask.window is None else TOKENS,
    )
    sinks = None if sinks_H is None else PartitionSpec("tensor")
    sharded = jax.shard_map(
        functools.partial(attend_plainly, score_cap=score_cap),
        in_specs=(queries, keys, keys, mask_specs, sinks),
        out_specs=queries,
    )
    return sharded(q_BLHA, k_BLGA, v_BLGA, mask.by_query(batch, length), sinks_H)


def _pad_positions(x_BLX: jax.Array, missing: int) -> jax.Array:
    """Adds zeros at the end of the second axis."""
    widths = [(0, 0)] * x_BLX.ndim
    widths[1] = (0, missing)
    return jnp.pad(x_BLX, widths)


def _split_into_blocks(x_BMX: jax.Array) -> jax.Array:
    """Returns blocks of positions, `[N, B, l, ...]`."""
    x_BNlX = x_BMX.reshape(x_BMX.shape[0], -1, BLOCK, *x_BMX.shape[2:])
    return x_BNlX.swapaxes(0, 1)
