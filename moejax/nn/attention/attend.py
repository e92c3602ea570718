"""Softmax attention: the kernel that suits the platform and the mask."""

import dataclasses
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
) -> Float[Array, "B L H A"]:
    """Computes softmax attention of H query heads, which share G key and value heads.

    Where a mesh in context splits sequences, the queries of each device see keys and values of all.

    Args:
      q_BLHA: queries.
      k_BSGA: keys.
      v_BSGA: values.
      mask: which keys each query may see.
      sinks_H: a score of each head that takes part in its softmax and has no value.
    """
    if mask.has_rows and has_context():
        return _attend_across_devices(q_BLHA, k_BSGA, v_BSGA, mask, sinks_H)
    if mask.is_of_rows and sinks_H is None and platform() == "cpu":
        return attend_causally(q_BLHA, k_BSGA, v_BSGA, mask.query_segments_BL)
    return attend_plainly(q_BLHA, k_BSGA, v_BSGA, mask, sinks_H)


def attend_plainly(
    q_BLHA: Float[Array, "B L H A"],
    k_BSGA: Float[Array, "B S G A"],
    v_BSGA: Float[Array, "B S G A"],
    mask: AttentionMask,
    sinks_H: Float[Array, "H"] | None = None,
) -> Float[Array, "B L H A"]:
    """Computes all scores, for any mask; queries of long rows take turns, in blocks.

    Scores `[B, H, L, S]` in float32 of all queries at once would need more memory than the rest of
    the model. Those of a block are computed again in the backward pass.
    """
    batch, length = q_BLHA.shape[:2]
    if length <= LONGEST_AT_ONCE:
        return _attend_at_once(q_BLHA, k_BSGA, v_BSGA, mask, sinks_H)
    # Queries that fill up the last block may see no key. Their softmax is then that of equal
    # scores, which is finite; their outputs are cut off.
    missing = -length % BLOCK
    mask = mask.with_positions(batch, length)
    queries = (q_BLHA, mask.query_positions_BL, mask.query_segments_BL)
    padded = jax.tree.map(lambda x_BLX: _pad_positions(x_BLX, missing), queries)
    blocks = jax.tree.map(_split_into_blocks, padded)

    @jax.checkpoint
    def one_block(block: Any) -> jax.Array:
        q_BlHA, positions_Bl, segments_Bl = block
        block_mask = dataclasses.replace(
            mask, query_positions_BL=positions_Bl, query_segments_BL=segments_Bl
        )
        return _attend_at_once(q_BlHA, k_BSGA, v_BSGA, block_mask, sinks_H)

    y_NBlHA = jax.lax.map(one_block, blocks)
    y_BNlHA = y_NBlHA.swapaxes(0, 1)
    y_BMHA = y_BNlHA.reshape(batch, length + missing, *q_BLHA.shape[2:])
    return y_BMHA[:, :length]


def _attend_at_once(q_BLHA, k_BSGA, v_BSGA, mask: AttentionMask, sinks_H) -> jax.Array:
    batch, length = q_BLHA.shape[:2]
    mask_BLS = mask.materialize(batch, length, k_BSGA.shape[1])
    mask_B1LS = mask_BLS[:, None]
    if sinks_H is None:
        return jax.nn.dot_product_attention(q_BLHA, k_BSGA, v_BSGA, mask=mask_B1LS)
    return _attend_with_sinks(q_BLHA, k_BSGA, v_BSGA, mask_BLS, sinks_H)


def _attend_with_sinks(q_BLHA, k_BSGA, v_BSGA, mask_BLS, sinks_H) -> jax.Array:
    """Computes attention whose softmax has one more score, of which no value comes.

    The logsumexp that `jax.nn.dot_product_attention` returns would serve, but has no gradient.
    """
    batch, length, num_heads, width = q_BLHA.shape
    num_groups = k_BSGA.shape[2]
    q_BLGRA = q_BLHA.reshape(batch, length, num_groups, -1, width)
    scores_BGRLS = jnp.einsum(
        "BLGRA,BSGA->BGRLS", q_BLGRA, k_BSGA, preferred_element_type=jnp.float32
    )
    scores_BGRLS *= width**-0.5
    scores_BGRLS = jnp.where(mask_BLS[:, None, None], scores_BGRLS, MASKED)
    sinks_GR = sinks_H.astype(jnp.float32).reshape(num_groups, num_heads // num_groups)
    sink_shape = (*scores_BGRLS.shape[:-1], 1)
    sinks_BGRL1 = jnp.broadcast_to(sinks_GR[None, :, :, None, None], sink_shape)
    all_scores_BGRLX = jnp.concatenate([scores_BGRLS, sinks_BGRL1], axis=-1)
    weights_BGRLX = jax.nn.softmax(all_scores_BGRLX, axis=-1)
    weights_BGRLS = weights_BGRLX[..., :-1].astype(v_BSGA.dtype)
    y_BLGRA = jnp.einsum("BGRLS,BSGA->BLGRA", weights_BGRLS, v_BSGA)
    return y_BLGRA.reshape(q_BLHA.shape)


def _attend_across_devices(q_BLHA, k_BLGA, v_BLGA, mask: AttentionMask, sinks_H) -> jax.Array:
    """Attends within rows whose positions are split over the devices of the axis `context`."""
    batch, length = q_BLHA.shape[:2]
    queries = PartitionSpec(BATCH_AXES, "context", "tensor")
    keys = PartitionSpec(BATCH_AXES, None, "tensor")
    mask_specs = dataclasses.replace(
        mask,
        query_positions_BL=TOKENS,
        query_segments_BL=TOKENS,
        key_segments_BS=PartitionSpec(BATCH_AXES, None),
        window=None if mask.window is None else PartitionSpec(),
    )
    sinks = None if sinks_H is None else PartitionSpec("tensor")
    sharded = jax.shard_map(
        attend_plainly, in_specs=(queries, keys, keys, mask_specs, sinks), out_specs=queries
    )
    return sharded(q_BLHA, k_BLGA, v_BLGA, mask.with_positions(batch, length), sinks_H)


def _pad_positions(x_BLX: jax.Array, missing: int) -> jax.Array:
    """Adds zeros at the end of the second axis."""
    widths = [(0, 0)] * x_BLX.ndim
    widths[1] = (0, missing)
    return jnp.pad(x_BLX, widths)


def _split_into_blocks(x_BMX: jax.Array) -> jax.Array:
    """Returns blocks of positions, `[N, B, l, ...]`."""
    x_BNlX = x_BMX.reshape(x_BMX.shape[0], -1, BLOCK, *x_BMX.shape[2:])
    return x_BNlX.swapaxes(0, 1)
