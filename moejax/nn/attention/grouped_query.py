"""Grouped-query attention with rotary positions, in packed rows or with a cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.kernels.matmul import dense
from moejax.nn.attention.attend import attend
from moejax.nn.attention.cache import KVCache, keys_and_mask
from moejax.nn.attention.layer_options import LayerOptions, make_constants, read_constants
from moejax.nn.attention.qk_norm import make_qk_norms, norm_unweighted, norm_whole
from moejax.nn.attention.scores import rotary_score_factor, scale_queries
from moejax.nn.attention.temperature import grow_with_position
from moejax.nn.norms import MakeNorm
from moejax.nn.positions import rotate_by_config
from moejax.sharding import gather_fsdp


class Attention(nnx.Module):
    """Causal attention with H query heads that share G key and value heads.

    Args:
      config: of attention.
      width: of the residual stream, D.
      dtype: the compute dtype.
      make_norm: makes the norms of queries and keys.
      norm_epsilon: of norms without weights.
      rngs: for the parameters.

    Source: Ainslie et al. 2023. Options: biases as in Qwen2 and gpt-oss, a norm of each head as in
    Qwen3, one of the whole vector and the limit as in OLMoE, one without weights, chunks, layers
    without positions and their temperature as in Llama 4.
    """

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        dtype: jnp.dtype,
        *,
        make_norm: MakeNorm,
        norm_epsilon: float,
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
        if config.qk_norm in ("head", "whole"):
            self.query_norm, self.key_norm = make_qk_norms(config, head, make_norm)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros(heads), axes=("heads",))
        num_pairs = (config.rope_dim or head) // 2
        self.constants = nnx.data(make_constants(config, num_pairs))
        self.config = config
        self.norm_epsilon = norm_epsilon
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
        options = read_constants(self.constants)
        q_BLHA, k_BLGA, v_BLGA = self._project(x_BLD, options)
        q_BLHA, k_BLGA = self._with_positions(q_BLHA, k_BLGA, positions_BL, segments_BL, options)
        q_BLHA = self._scale(q_BLHA, positions_BL, segments_BL, options)
        sinks_H = self.sinks[...] if self.config.sinks else None
        new = KVCache(k_BLGA, v_BLGA)
        seen, mask = keys_and_mask(new, cache, positions_BL, segments_BL)
        mask = mask.within(positions_BL, options.window, options.chunk)
        y_BLHA = attend(q_BLHA, seen.k_BSGA, seen.v_BSGA, mask, sinks_H, self.config.score_cap)
        y_BLD = dense(y_BLHA, gather_fsdp(self.out, self.dtype), num_contracted=2)
        if self.config.out_bias:
            y_BLD += self.out_bias[...].astype(self.dtype)[None, None]
        return y_BLD, cache and seen

    def _project(
        self, x_BLD: jax.Array, options: LayerOptions
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values before positions are known."""
        q_BLHA = dense(x_BLD, gather_fsdp(self.query, self.dtype))
        k_BLGA = dense(x_BLD, gather_fsdp(self.key, self.dtype))
        v_BLGA = dense(x_BLD, gather_fsdp(self.value, self.dtype))
        if self.config.qkv_bias:
            q_BLHA += self.query_bias[...].astype(self.dtype)[None, None]
            k_BLGA += self.key_bias[...].astype(self.dtype)[None, None]
            v_BLGA += self.value_bias[...].astype(self.dtype)[None, None]
        if not self.config.qk_norm_after_rope:
            q_BLHA, k_BLGA = self._normalize(q_BLHA, k_BLGA, options)
        if self.config.clip_qkv:
            limit = self.config.clip_qkv
            q_BLHA = jnp.clip(q_BLHA, -limit, limit)
            k_BLGA = jnp.clip(k_BLGA, -limit, limit)
            v_BLGA = jnp.clip(v_BLGA, -limit, limit)
        return q_BLHA, k_BLGA, v_BLGA

    def _normalize(
        self, q_BLHA: jax.Array, k_BLGA: jax.Array, options: LayerOptions
    ) -> tuple[jax.Array, jax.Array]:
        """Returns queries and keys with the model's norm, if it has one."""
        kind = self.config.qk_norm
        if kind == "head":
            return self.query_norm(q_BLHA), self.key_norm(k_BLGA)
        if kind == "whole":
            return norm_whole(self.query_norm, q_BLHA), norm_whole(self.key_norm, k_BLGA)
        if kind == "unweighted":
            q_BLHA = norm_unweighted(q_BLHA, self.config, self.norm_epsilon, options)
            k_BLGA = norm_unweighted(k_BLGA, self.config, self.norm_epsilon, options)
        return q_BLHA, k_BLGA

    def _with_positions(
        self,
        q_BLHA: jax.Array,
        k_BLGA: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None,
        options: LayerOptions,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns queries and keys that know their positions."""
        factor = rotary_score_factor(self.config, positions_BL, segments_BL)
        q_BLHA = rotate_by_config(q_BLHA, positions_BL, self.config, options, factor)
        k_BLGA = rotate_by_config(k_BLGA, positions_BL, self.config, options)
        if self.config.qk_norm_after_rope:
            q_BLHA, k_BLGA = self._normalize(q_BLHA, k_BLGA, options)
        return q_BLHA, k_BLGA

    def _scale(
        self,
        q_BLHA: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None,
        options: LayerOptions,
    ) -> jax.Array:
        """Returns queries with the factors that their scores have."""
        if self.config.temperature and options.has_rope is not None:
            q_BLHA = grow_with_position(
                q_BLHA, positions_BL, segments_BL, self.config, options.has_rope
            )
        return scale_queries(q_BLHA, self.config.score_factor)
