"""Mixture of attention heads: each token chooses experts, which have queries and outputs."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import AttentionConfig, MoeConfig
from moejax.kernels.matmul import dense
from moejax.moe.balancing.stats import RoutingStats, collect
from moejax.moe.dispatch.capacity import CombineWeights, combine_within_capacity
from moejax.moe.router import RouterInputs, Routing, route
from moejax.moe.router.modules import Router
from moejax.moe.token_info import TokenInfo
from moejax.nn.attention.attend import attend
from moejax.nn.attention.cache import KVCache, keys_and_mask
from moejax.nn.attention.scores import rotary_score_factor, scale_queries
from moejax.nn.positions import rotate_by_config
from moejax.sharding import batch_devices, gather_fsdp


class RoutedAttention(nnx.Module):
    """Causal attention in which a token's queries and outputs are those of K experts of E.

    An expert has a query head for each of the G heads of keys and values, which all experts share.
    The output is the sum of those of the experts, by the weights of the router. Every expert
    projects every token, of which the chosen ones count: K of E products would do, at the price of
    sending tokens or weights.

    Args:
      config: of attention.
      router: of its experts.
      width: of the residual stream, D.
      dtype: the compute dtype.
      rngs: for the parameters.

    Source: Zhang et al. 2022 (Mixture of Attention Heads), section 3.2; Shen et al. 2024 (JetMoE),
    section 2.3, with the bias of the output.
    """

    def __init__(
        self,
        config: AttentionConfig,
        router: MoeConfig,
        width: int,
        dtype: jnp.dtype,
        *,
        rngs: nnx.Rngs,
    ):
        num_experts, heads = config.num_query_experts, config.num_kv_heads
        head = config.head_dim or width // config.num_heads
        init_query = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=(2, 3), batch_axis=0)
        init_key = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2, 3))
        init_out = jax.nn.initializers.lecun_normal(in_axis=(1, 2), out_axis=3, batch_axis=0)
        self.router = Router(router, width, rngs=rngs)
        query_EDGA = init_query(rngs.params(), (num_experts, width, heads, head))
        key_value_DPGA = init_key(rngs.params(), (width, 2, heads, head))
        out_EGAD = init_out(rngs.params(), (num_experts, heads, head, width))
        self.query = nnx.Param(query_EDGA, axes=("query_experts", "embed", "kv_heads", "head"))
        self.key_value = nnx.Param(key_value_DPGA, axes=("embed", "key_value", "kv_heads", "head"))
        self.out = nnx.Param(out_EGAD, axes=("query_experts", "kv_heads", "head", "embed"))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.config = config
        self.router_config = router
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
        """Attends within the row, or to the cache; see `Attention`."""
        is_token_BL = jnp.ones(positions_BL.shape, bool) if segments_BL is None else segments_BL > 0
        y_BLD, _, cache = self.attend(
            x_BLD, positions_BL, segments_BL, cache, TokenInfo(is_token_BL)
        )
        return y_BLD, cache

    def attend(
        self,
        x_BLD: Float[Array, "B L D"],
        positions_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"] | None,
        cache: KVCache | None,
        info: TokenInfo,
    ) -> tuple[Float[Array, "B L D"], RoutingStats, KVCache | None]:
        """Attends and returns the statistics of its router, too.

        Args:
          x_BLD: normalised residual stream.
          positions_BL: position of each token in its document; with a cache also its slot.
          segments_BL: number of the document within its row, 0 at padding.
          cache: keys and values so far; None attends to `x_BLD` alone.
          info: about the tokens.

        Returns:
          The output, the statistics, and the cache with the new keys and values.
        """
        with jax.named_scope("route"):
            routing = self._route(x_BLD, info)
            combined = combine_within_capacity(
                routing,
                self.router_config,
                None,
                length=x_BLD.shape[1],
                num_devices=batch_devices(),
            )
        q_BLKGA = self._queries(x_BLD, routing, positions_BL, segments_BL)
        new = self._keys(x_BLD, positions_BL)
        seen, mask = keys_and_mask(new, cache, positions_BL, segments_BL)
        batch, length, top_k, groups, head = q_BLKGA.shape
        # Heads that share keys are next to each other.
        q_BLGKA = q_BLKGA.swapaxes(2, 3)
        q_BLHA = q_BLGKA.reshape(batch, length, groups * top_k, head)
        y_BLHA = attend(q_BLHA, seen.k_BSGA, seen.v_BSGA, mask)
        y_BLGKA = y_BLHA.reshape(batch, length, groups, top_k, head)
        y_BLD = self._outputs(y_BLGKA.swapaxes(2, 3), combined)
        return y_BLD, self._collect(routing, combined, info), cache and seen

    def _route(self, x_BLD: jax.Array, info: TokenInfo) -> Routing:
        logits_BLE = self.router(x_BLD.astype(jnp.float32)).logits_BLE
        inputs = RouterInputs(
            logits_TE=logits_BLE.reshape(-1, logits_BLE.shape[-1]),
            mask_T=info.is_token_BL.reshape(-1),
            length=x_BLD.shape[1],
        )
        return route(inputs, self.router_config)

    def _queries(
        self,
        x_BLD: jax.Array,
        routing: Routing,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None,
    ) -> jax.Array:
        """Returns the rotated queries of the chosen experts."""
        config = self.config
        query_DEGA = gather_fsdp(self.query, self.dtype).swapaxes(0, 1)
        q_BLEGA = dense(x_BLD, query_DEGA)
        # Padding has no expert, and nobody reads what it gets.
        experts_TK = jnp.minimum(routing.experts_TK, config.num_query_experts - 1)
        experts_BLK = experts_TK.reshape(*x_BLD.shape[:2], -1)
        q_BLKGA = jnp.take_along_axis(q_BLEGA, experts_BLK[..., None, None], axis=2)
        factor = rotary_score_factor(config, positions_BL, segments_BL)
        q_BLHA = q_BLKGA.reshape(*x_BLD.shape[:2], -1, self.head_dim)
        q_BLHA = rotate_by_config(q_BLHA, positions_BL, config, factor=factor)
        return scale_queries(q_BLHA, config.score_factor).reshape(q_BLKGA.shape)

    def _keys(self, x_BLD: jax.Array, positions_BL: jax.Array) -> KVCache:
        """Returns the keys and values of the tokens."""
        key_value_BLPGA = dense(x_BLD, gather_fsdp(self.key_value, self.dtype))
        k_BLGA, v_BLGA = key_value_BLPGA[:, :, 0], key_value_BLPGA[:, :, 1]
        return KVCache(rotate_by_config(k_BLGA, positions_BL, self.config), v_BLGA)

    def _outputs(self, y_BLKGA: jax.Array, combined: CombineWeights) -> jax.Array:
        """Returns the sum of the experts' outputs by their weights."""
        shape = y_BLKGA.shape[:3]
        weights_BLK = combined.weights_TK.reshape(shape)
        experts_BLK = combined.experts_TK.reshape(shape)
        is_chosen_BLKE = jax.nn.one_hot(experts_BLK, self.config.num_query_experts)
        weights_BLKE = (is_chosen_BLKE * weights_BLK[..., None]).astype(self.dtype)
        y_BLEGA = jnp.einsum(
            "BLKE,BLKGA->BLEGA", weights_BLKE, y_BLKGA, preferred_element_type=jnp.float32
        )
        out_EGAD = gather_fsdp(self.out, self.dtype)
        y_BLD = dense(y_BLEGA.astype(self.dtype), out_EGAD, num_contracted=3)
        if self.config.out_bias:
            y_BLD += self.out_bias[...].astype(self.dtype)[None, None]
        return y_BLD

    def _collect(self, routing: Routing, combined: CombineWeights, info: TokenInfo) -> RoutingStats:
        return collect(
            routing,
            info.is_token_BL.reshape(-1),
            combined,
            self.router_config,
            length=info.is_token_BL.shape[1],
            num_devices=batch_devices(),
            trace=info.trace,
        )
