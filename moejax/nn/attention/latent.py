"""Multi-head latent attention: keys and values of all heads are made of one small vector."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig
from moejax.kernels.matmul import dense
from moejax.nn.attention.absorbed import attend_absorbed, is_cheaper_absorbed
from moejax.nn.attention.attend import attend
from moejax.nn.attention.cache import LatentCache, keys_and_mask
from moejax.nn.attention.scores import rotary_score_factor, scale_queries
from moejax.nn.mask import AttentionMask
from moejax.nn.norm import RMSNorm
from moejax.nn.positions import rotate_by_config
from moejax.sharding import gather_fsdp

LATENT_EPSILON = 1e-6
"""Of the norms of latent vectors, whatever that of the other norms is (DeepSeek-V2 and V3)."""


class LatentAttention(nnx.Module):
    """Causal attention of H heads whose keys and values come from a latent vector of each token.

    A head's query and key have a part without position and one with rotary positions, which is the
    same key for all heads. Only the latent vector and that key are cached.

    Args:
      config: of attention.
      width: of the residual stream, D.
      dtype: the compute dtype.
      rngs: for the parameters.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), section 2.1; `scale_latents`: LongCat-Flash 2025,
    section 2.2.
    """

    def __init__(self, config: AttentionConfig, width: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        heads, d_rope, d_kv = config.num_heads, config.d_rope, config.d_kv_latent
        d_query = config.d_nope + d_rope
        init = jax.nn.initializers.lecun_normal(in_axis=0)
        init_heads = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        init_out = jax.nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
        if config.d_query_latent:
            down_DC = init(rngs.params(), (width, config.d_query_latent))
            self.query_down = nnx.Param(down_DC, axes=("embed", "latent"))
            self.query_norm = RMSNorm(config.d_query_latent, LATENT_EPSILON)
        query_CHA = init_heads(rngs.params(), (config.d_query_latent or width, heads, d_query))
        first_axis = "latent" if config.d_query_latent else "embed"
        self.query = nnx.Param(query_CHA, axes=(first_axis, "heads", "head"))
        down_DX = init(rngs.params(), (width, d_kv + d_rope))
        self.kv_down = nnx.Param(down_DX, axes=("embed", "latent"))
        self.kv_norm = RMSNorm(d_kv, LATENT_EPSILON)
        kv_up_CHX = init_heads(rngs.params(), (d_kv, heads, config.d_nope + config.d_value))
        self.kv_up = nnx.Param(kv_up_CHX, axes=("latent", "heads", "head"))
        out_HAD = init_out(rngs.params(), (heads, config.d_value, width))
        self.out = nnx.Param(out_HAD, axes=("heads", "head", "embed"))
        if config.latent_bias:
            self.kv_down_bias = nnx.Param(jnp.zeros(d_kv + d_rope), axes=("latent",))
        if config.latent_bias and config.d_query_latent:
            self.query_down_bias = nnx.Param(jnp.zeros(config.d_query_latent), axes=("latent",))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.query_scale = self.latent_scale = 1.0
        if config.scale_latents:
            # Whatever the widths, queries, keys and values then have the same variance at first.
            self.query_scale = (width / (config.d_query_latent or width)) ** 0.5
            self.latent_scale = (width / d_kv) ** 0.5
        self.config = config
        self.dtype = dtype

    def init_cache(self, batch: int, slots: int) -> LatentCache:
        """Returns an empty cache of `slots` positions for each of `batch` rows."""
        latent_BSC = jnp.zeros((batch, slots, self.config.d_kv_latent), self.dtype)
        key_BSA = jnp.zeros((batch, slots, self.config.d_rope), self.dtype)
        return LatentCache(latent_BSC, key_BSA)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None = None,
        cache: LatentCache | None = None,
    ) -> tuple[Float[Array, "B L D"], LatentCache | None]:
        """Attends within the row, or to the cache; see `Attention`."""
        factor = rotary_score_factor(self.config, positions_BL, segments_BL)
        q_BLHA = self._queries(x_BLD, positions_BL, factor)
        new = self._compress(x_BLD, positions_BL)
        seen, mask = keys_and_mask(new, cache, positions_BL, segments_BL)
        num_queries, num_keys = x_BLD.shape[1], seen.latent_BSC.shape[1]
        if cache is not None and is_cheaper_absorbed(self.config, num_queries, num_keys):
            kv_up_CHX = gather_fsdp(self.kv_up, self.dtype)
            y_BLHV = attend_absorbed(q_BLHA, seen, kv_up_CHX, mask)
        else:
            y_BLHV = self._attend_expanded(q_BLHA, seen, mask)
        y_BLD = dense(y_BLHV, gather_fsdp(self.out, self.dtype), num_contracted=2)
        if self.config.out_bias:
            y_BLD += self.out_bias[...].astype(self.dtype)[None, None]
        return y_BLD, cache and seen

    def _queries(
        self, x_BLD: jax.Array, positions_BL: jax.Array, factor: float | jax.Array
    ) -> jax.Array:
        """Returns queries, without position first, times the factor on scores.

        `factor` is another one, on the part with positions.
        """
        config = self.config
        if config.d_query_latent:
            x_BLD = dense(x_BLD, gather_fsdp(self.query_down, self.dtype))
            if config.latent_bias:
                x_BLD += self.query_down_bias[...].astype(self.dtype)[None, None]
            x_BLD = self.query_norm(x_BLD)
        q_BLHA = dense(x_BLD, gather_fsdp(self.query, self.dtype))
        plain_BLHA, turned_BLHA = jnp.split(q_BLHA, [config.d_nope], axis=-1)
        turned_BLHA = rotate_by_config(turned_BLHA, positions_BL, config, factor=factor)
        q_BLHA = jnp.concatenate([plain_BLHA, turned_BLHA], axis=-1)
        return scale_queries(q_BLHA, config.score_factor * self.query_scale)

    def _compress(self, x_BLD: jax.Array, positions_BL: jax.Array) -> LatentCache:
        """Returns what keys and values of these positions are made of."""
        config = self.config
        down_BLX = dense(x_BLD, gather_fsdp(self.kv_down, self.dtype))
        if config.latent_bias:
            down_BLX += self.kv_down_bias[...].astype(self.dtype)[None, None]
        latent_BLC, key_BLA = jnp.split(down_BLX, [config.d_kv_latent], axis=-1)
        key_BL1A = rotate_by_config(key_BLA[:, :, None], positions_BL, config)
        latent_BLC = self.kv_norm(latent_BLC)
        if self.latent_scale != 1:
            latent_BLC *= self.latent_scale
        return LatentCache(latent_BLC, key_BL1A[:, :, 0])

    def _attend_expanded(
        self, q_BLHA: jax.Array, seen: LatentCache, mask: AttentionMask
    ) -> jax.Array:
        """Returns what queries see of the keys and values of each head, `[B, L, H, V]`."""
        config = self.config
        up_BSHX = dense(seen.latent_BSC, gather_fsdp(self.kv_up, self.dtype))
        plain_BSHA, v_BSHV = jnp.split(up_BSHX, [config.d_nope], axis=-1)
        shared_BS1A = seen.key_BSA[:, :, None]
        shared_BSHA = jnp.repeat(shared_BS1A, config.num_heads, axis=2)
        k_BSHA = jnp.concatenate([plain_BSHA, shared_BSHA], axis=-1)
        # Kernels take keys and values of one width, by whose root they divide scores.
        d_key = config.d_nope + config.d_rope
        width = max(d_key, config.d_value)
        q_BLHA = scale_queries(q_BLHA, (width / d_key) ** 0.5)
        q_BLHA, k_BSHA, v_BSHA = (_pad_heads(x, width) for x in (q_BLHA, k_BSHA, v_BSHV))
        y_BLHA = attend(q_BLHA, k_BSHA, v_BSHA, mask)
        return y_BLHA[..., : config.d_value]


def _pad_heads(x_BLHA: jax.Array, width: int) -> jax.Array:
    """Returns heads with zeros up to a width."""
    no_padding = (0, 0)
    missing = width - x_BLHA.shape[-1]
    return jnp.pad(x_BLHA, (no_padding, no_padding, no_padding, (0, missing)))
