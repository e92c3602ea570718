"""Softmax attention: the kernel that suits the platform and the mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moejax.kernels.device import platform
from moejax.nn.attention.causal_blocks import BLOCK, LONGEST_AT_ONCE, attend_causally
from moejax.nn.mask import AttentionMask
from moejax.sharding import BATCH_AXES, TOKENS, has_context


def attend(
    q_BLHA: Float[Array, "B L H A"],
    k_BSGA: Float[Array, "B S G A"],
    v_BSGA: Float[Array, "B S G A"],
    mask: AttentionMask,
) -> Float[Array, "B L H A"]:
    """Computes softmax attention of H query heads, which share G key and value heads.

    Where a mesh in context splits sequences, the queries of each device see keys and values of all.

    Args:
      q_BLHA: queries.
      k_BSGA: keys.
      v_BSGA: values.
      mask: which keys each query may see.
    """
    is_in_rows = mask.is_of_rows
    if is_in_rows and has_context():
        return _attend_across_devices(q_BLHA, k_BSGA, v_BSGA, mask)
    if is_in_rows and platform() == "cpu":
        return attend_causally(q_BLHA, k_BSGA, v_BSGA, mask.query_segments_BL)
    return attend_plainly(q_BLHA, k_BSGA, v_BSGA, mask)


def attend_plainly(
    q_BLHA: Float[Array, "B L H A"],
    k_BSGA: Float[Array, "B S G A"],
    v_BSGA: Float[Array, "B S G A"],
    mask: AttentionMask,
) -> Float[Array, "B L H A"]:
    """Computes all scores, for any mask; queries of long rows take turns, in blocks.

    Scores `[B, H, L, S]` in float32 of all queries at once would need more memory than the rest of
    the model. Those of a block are computed again in the backward pass.
    """
    batch, length = q_BLHA.shape[:2]
    if length <= LONGEST_AT_ONCE:
        return _attend_at_once(q_BLHA, k_BSGA, v_BSGA, mask)
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
        return _attend_at_once(q_BlHA, k_BSGA, v_BSGA, block_mask)

    y_NBlHA = jax.lax.map(one_block, blocks)
    y_BNlHA = y_NBlHA.swapaxes(0, 1)
    y_BMHA = y_BNlHA.reshape(batch, length + missing, *q_BLHA.shape[2:])
    return y_BMHA[:, :length]


def _attend_at_once(q_BLHA, k_BSGA, v_BSGA, mask: AttentionMask) -> jax.Array:
    batch, length = q_BLHA.shape[:2]
    mask_BLS = mask.materialize(batch, length, k_BSGA.shape[1])
    return jax.nn.dot_product_attention(q_BLHA, k_BSGA, v_BSGA, mask=mask_BLS[:, None])


def _attend_across_devices(q_BLHA, k_BLGA, v_BLGA, mask: AttentionMask) -> jax.Array:
    """Attends within rows whose positions are split over the devices of the axis `context`."""
    batch, length = q_BLHA.shape[:2]
    queries = PartitionSpec(BATCH_AXES, "context", "tensor")
    keys = PartitionSpec(BATCH_AXES, None, "tensor")
    mask_specs = dataclasses.replace(
        mask,
        query_positions_BL=TOKENS,
        query_segments_BL=TOKENS,
        key_segments_BS=PartitionSpec(BATCH_AXES, None),
    )
    sharded = jax.shard_map(
        attend_plainly, in_specs=(queries, keys, keys, mask_specs), out_specs=queries
    )
    return sharded(q_BLHA, k_BLGA, v_BLGA, mask.with_positions(batch, length))


def _pad_positions(x_BLX: jax.Array, missing: int) -> jax.Array:
    """Adds zeros at the end of the second axis."""
    widths = [(0, 0)] * x_BLX.ndim
    widths[1] = (0, missing)
    return jnp.pad(x_BLX, widths)


def _split_into_blocks(x_BMX: jax.Array) -> jax.Array:
    """Returns blocks of positions, `[N, B, l, ...]`."""
    x_BNlX = x_BMX.reshape(x_BMX.shape[0], -1, BLOCK, *x_BMX.shape[2:])
    return x_BNlX.swapaxes(0, 1)
