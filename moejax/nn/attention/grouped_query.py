"""Grouped-query attention with rotary positions, in packed rows or with a cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moejax.config import ModelConfig
from moejax.kernels.device import platform
from moejax.kernels.matmul import dense
from moejax.nn.attention.causal_blocks import BLOCK, LONGEST_AT_ONCE, attend_causally
from moejax.nn.norm import RMSNorm
from moejax.nn.positions import rotate
from moejax.sharding import BATCH_AXES, TOKENS, gather_fsdp, has_context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far, one slot per position.

    Attributes:
      k_BSGA: keys, already rotated; S slots.
      v_BSGA: values.
    """

    k_BSGA: jax.Array
    v_BSGA: jax.Array


class Attention(nnx.Module):
    """Causal attention with H query heads that share G key and value heads.

    Source: Ainslie et al. 2023.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, heads, kv_heads = config.d_model, config.num_heads, config.num_kv_heads
        head = width // heads
        init_in = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        init_out = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        query_DHA = init_in(rngs.params(), (width, heads, head))
        key_DGA = init_in(rngs.params(), (width, kv_heads, head))
        value_DGA = init_in(rngs.params(), (width, kv_heads, head))
        out_HAD = init_out(rngs.params(), (heads, head, width))
        self.query = nnx.Param(query_DHA, axes=("embed", "heads", "head"))
        self.key = nnx.Param(key_DGA, axes=("embed", "kv_heads", "head"))
        self.value = nnx.Param(value_DGA, axes=("embed", "kv_heads", "head"))
        self.out = nnx.Param(out_HAD, axes=("heads", "head", "embed"))
        if config.qk_norm:
            self.query_norm = RMSNorm(head)
            self.key_norm = RMSNorm(head)
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Attends within the row, or to the cache and then S slots.

        Args:
          x_BLD: normalised residual stream.
          positions_BL: position of each token in its document; with a cache also the slot it
            is written to.
          segments_BL: number of the document within its row, 0 at padding; not needed with a cache.
          cache: keys and values so far, of which a query sees those up to its position; None
            attends to `x_BLD` alone.

        Returns:
          The output and the cache with the new keys and values.
        """
        q_BLHA = dense(x_BLD, gather_fsdp(self.query, self.dtype))
        k_BLGA = dense(x_BLD, gather_fsdp(self.key, self.dtype))
        v_BLGA = dense(x_BLD, gather_fsdp(self.value, self.dtype))
        if self.config.qk_norm:
            q_BLHA = self.query_norm(q_BLHA)
            k_BLGA = self.key_norm(k_BLGA)
        q_BLHA = rotate(q_BLHA, positions_BL, self.config.rope_theta)
        k_BLGA = rotate(k_BLGA, positions_BL, self.config.rope_theta)
        if cache is not None:
            row_B1 = jnp.arange(x_BLD.shape[0])[:, None]
            cache = KVCache(
                k_BSGA=cache.k_BSGA.at[row_B1, positions_BL].set(k_BLGA),
                v_BSGA=cache.v_BSGA.at[row_B1, positions_BL].set(v_BLGA),
            )
            mask_BLS = cache_mask(positions_BL, cache.k_BSGA.shape[1])
            y_BLHA = attend(q_BLHA, cache.k_BSGA, cache.v_BSGA, mask_BLS)
        elif segments_BL is None:
            raise ValueError(
                "attention within rows needs segments_BL, and attention to a cache needs cache; "
                "give one"
            )
        else:
            y_BLHA = attend_in_rows(q_BLHA, k_BLGA, v_BLGA, segments_BL)
        return dense(y_BLHA, gather_fsdp(self.out, self.dtype), num_contracted=2), cache


def attend_in_rows(
    q_BLHA: Float[Array, "B L H A"],
    k_BLGA: Float[Array, "B L G A"],
    v_BLGA: Float[Array, "B L G A"],
    segments_BL: Int[Array, "B L"],
) -> Float[Array, "B L H A"]:
    """Attends within packed rows, in the form that is fast on the platform.

    Where a mesh in context splits sequences, the queries of each device see keys and values of all.
    """
    if has_context():
        queries = PartitionSpec(BATCH_AXES, "context", "tensor")
        keys = PartitionSpec(BATCH_AXES, None, "tensor")
        sharded = jax.shard_map(attend, in_specs=(queries, keys, keys, TOKENS), out_specs=queries)
        return sharded(q_BLHA, k_BLGA, v_BLGA, row_mask(segments_BL))
    if platform() == "cpu":
        return attend_causally(q_BLHA, k_BLGA, v_BLGA, segments_BL)
    return attend(q_BLHA, k_BLGA, v_BLGA, row_mask(segments_BL))


def attend(
    q_BLHA: Float[Array, "B L H A"],
    k_BSGA: Float[Array, "B S G A"],
    v_BSGA: Float[Array, "B S G A"],
    mask_BLS: Bool[Array, "B L S"],
) -> Float[Array, "B L H A"]:
    """Computes softmax attention; queries of long rows take turns, in blocks.

    Scores `[B, H, L, S]` in float32 of all queries at once would need more memory than the rest of
    the model. Those of a block are computed again in the backward pass.
    """
    length = q_BLHA.shape[1]
    if length <= LONGEST_AT_ONCE:
        return jax.nn.dot_product_attention(q_BLHA, k_BSGA, v_BSGA, mask=mask_BLS[:, None])

    @jax.checkpoint
    def one_block(block):
        q_BlHA, mask_BlS = block
        return jax.nn.dot_product_attention(q_BlHA, k_BSGA, v_BSGA, mask=mask_BlS[:, None])

    def split(a_BLX):
        a_BNlX = a_BLX.reshape(a_BLX.shape[0], -1, BLOCK, *a_BLX.shape[2:])
        return a_BNlX.swapaxes(0, 1)

    # Queries that fill up the last block see every key, so that their softmax is not empty; their
    # outputs are cut off.
    no_padding = (0, 0)
    padding = (0, -length % BLOCK)
    q_BMHA = jnp.pad(q_BLHA, (no_padding, padding, no_padding, no_padding))
    mask_BMS = jnp.pad(mask_BLS, (no_padding, padding, no_padding), constant_values=True)
    y_NBlHA = jax.lax.map(one_block, (split(q_BMHA), split(mask_BMS)))
    y_BMHA = y_NBlHA.swapaxes(0, 1).reshape(q_BMHA.shape)
    return y_BMHA[:, :length]


def row_mask(segments_BL: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Returns which keys a query of a packed row may see: those of its segment that are not later.

    Segment 0 is padding. A padded query sees its own position, so that no softmax is empty; its
    output is not used.
    """
    length = segments_BL.shape[1]
    is_causal_LL = jnp.tril(jnp.ones((length, length), bool))
    query_segments_BL1 = segments_BL[:, :, None]
    key_segments_B1L = segments_BL[:, None, :]
    is_same_BLL = query_segments_BL1 == key_segments_B1L
    return is_same_BLL & is_causal_LL[None]


def cache_mask(positions_BL: Int[Array, "B L"], slots: int) -> Bool[Array, "B L S"]:
    """Returns which slots of a cache a query may see: those up to its own position."""
    slot_11S = jnp.arange(slots)[None, None, :]
    position_BL1 = positions_BL[:, :, None]
    return slot_11S <= position_BL1
