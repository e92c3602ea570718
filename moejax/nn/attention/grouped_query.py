"""Grouped-query attention with rotary positions, in packed rows or with a cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.kernels.matmul import dense
from moejax.nn.attention.attend import attend
from moejax.nn.attention.cache import KVCache
from moejax.nn.attention.scores import rotary_score_factor, scale_queries
from moejax.nn.mask import AttentionMask
from moejax.nn.norms import MakeNorm, Norm
from moejax.nn.positions import rotate_by_config
from moejax.sharding import gather_fsdp


class LayerConstant(nnx.Variable):
    """A number that layers of one kind do not share, and that the configuration gives them.

    It has no gradient. As an array it passes through a scan over layers.
    """


class Attention(nnx.Module):
    """Causal attention with H query heads that share G key and value heads.

    Args:
      config: of attention.
      width: of the residual stream, D.
      dtype: the compute dtype.
      make_norm: makes the norms of queries and keys.
      rngs: for the parameters.

    Source: Ainslie et al. 2023. Options: biases as in Qwen2 and gpt-oss, a norm of each head as in
    Qwen3, one of the whole vector and the limit as in OLMoE.
    """

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        dtype: jnp.dtype,
        *,
        make_norm: MakeNorm,
        rngs: nnx.Rngs,
    ):
        heads, kv_heads = config.num_heads, config.num_kv_heads
        head = config.head_dim or width // heads
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
        if config.qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros((heads, head)), axes=("heads", "head"))
            self.key_bias = nnx.Param(jnp.zeros((kv_heads, head)), axes=("kv_heads", "head"))
            self.value_bias = nnx.Param(jnp.zeros((kv_heads, head)), axes=("kv_heads", "head"))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        if config.qk_norm == "head":
            self.query_norm = make_norm(head)
            self.key_norm = make_norm(head)
        if config.qk_norm == "whole":
            self.query_norm = make_norm(heads * head)
            self.key_norm = make_norm(kv_heads * head)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros(heads), axes=("heads",))
        if config.window:
            self.window = LayerConstant(jnp.int32(config.window), axes=())
        self.config = config
        self.head_dim = head
        self.dtype = dtype

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """Returns an empty cache of `slots` positions for each of `batch` rows."""
        shape = (batch, slots, self.config.num_kv_heads, self.head_dim)
        return KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

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
        q_BLHA, k_BLGA, v_BLGA = self._project(x_BLD)
        factor = rotary_score_factor(self.config, positions_BL, segments_BL)
        q_BLHA = rotate_by_config(q_BLHA, positions_BL, self.config, factor)
        q_BLHA = scale_queries(q_BLHA, self.config.score_factor)
        k_BLGA = rotate_by_config(k_BLGA, positions_BL, self.config)
        sinks_H = self.sinks[...] if self.config.sinks else None
        if cache is not None:
            cache = cache.with_positions(KVCache(k_BLGA, v_BLGA), positions_BL)
            mask = self._within_window(AttentionMask.of_cache(positions_BL))
            y_BLHA = attend(q_BLHA, cache.k_BSGA, cache.v_BSGA, mask, sinks_H)
        elif segments_BL is not None:
            mask = self._within_window(AttentionMask.within_rows(segments_BL))
            y_BLHA = attend(q_BLHA, k_BLGA, v_BLGA, mask, sinks_H)
        else:
            raise ValueError(
                "attention within rows needs segments_BL, and attention to a cache needs cache; "
                "give one"
            )
        y_BLD = dense(y_BLHA, gather_fsdp(self.out, self.dtype), num_contracted=2)
        if self.config.out_bias:
            y_BLD += self.out_bias[...].astype(self.dtype)[None, None]
        return y_BLD, cache

    def _within_window(self, mask: AttentionMask) -> AttentionMask:
        """Returns the mask with the layer's window, if the model has any."""
        if not self.config.window:
            return mask
        return dataclasses.replace(mask, window=self.window[...])

    def _project(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values before positions are known."""
        q_BLHA = dense(x_BLD, gather_fsdp(self.query, self.dtype))
        k_BLGA = dense(x_BLD, gather_fsdp(self.key, self.dtype))
        v_BLGA = dense(x_BLD, gather_fsdp(self.value, self.dtype))
        if self.config.qkv_bias:
            q_BLHA += self.query_bias[...].astype(self.dtype)[None, None]
            k_BLGA += self.key_bias[...].astype(self.dtype)[None, None]
            v_BLGA += self.value_bias[...].astype(self.dtype)[None, None]
        if self.config.qk_norm == "head":
            q_BLHA = self.query_norm(q_BLHA)
            k_BLGA = self.key_norm(k_BLGA)
        if self.config.qk_norm == "whole":
            q_BLHA = _norm_whole(self.query_norm, q_BLHA)
            k_BLGA = _norm_whole(self.key_norm, k_BLGA)
        if self.config.clip_qkv:
            limit = self.config.clip_qkv
            q_BLHA = jnp.clip(q_BLHA, -limit, limit)
            k_BLGA = jnp.clip(k_BLGA, -limit, limit)
            v_BLGA = jnp.clip(v_BLGA, -limit, limit)
        return q_BLHA, k_BLGA, v_BLGA


def _norm_whole(norm: Norm, x_BLHA: jax.Array) -> jax.Array:
    """Normalises all heads of a position as one vector."""
    batch, length, heads, head = x_BLHA.shape
    normed_BLX = norm(x_BLHA.reshape(batch, length, heads * head))
    return normed_BLX.reshape(x_BLHA.shape)
