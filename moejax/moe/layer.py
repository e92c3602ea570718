"""The MoE layer: parameters and names; `MoE.__call__` reads like the path of a token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moejax.config import MoeConfig
from moejax.kernels.grouped_matmul import can_check_vma
from moejax.kernels.matmul import dense
from moejax.moe.balancing.stats import (
    RoutingStats,
    collect,
    collect_expert_choice,
    collect_soft_slots,
)
from moejax.moe.dispatch.assignment import Assignment, ExpertChoice, SoftSlots, TokenChoice
from moejax.moe.dispatch.capacity import (
    WEIGHTS,
    CombineWeights,
    capacity_slots,
    combine_within_capacity,
)
from moejax.moe.dispatch.on_device import (
    run_dropless,
    run_expert_choice,
    run_soft_slots,
    run_with_capacity,
)
from moejax.moe.expert_parallel.exchange import exchange
from moejax.moe.expert_parallel.strategy import LocalExperts, Strategy
from moejax.moe.experts.experts import Experts, FeedForward, Network, initialize
from moejax.moe.experts.zero_computation import ZeroComputationExperts
from moejax.moe.noise import draw_expert_dropout, jitter
from moejax.moe.overrides import check_overrides, drop_ablated
from moejax.moe.router import (
    RouterInputs,
    Routing,
    route,
    route_expert_choice,
    route_soft,
)
from moejax.moe.router.modules import Logits, RouterState, make_router
from moejax.moe.router.routing import SlotRouting, SoftRouting
from moejax.moe.token_info import TokenInfo
from moejax.sharding import batch_devices, gather_fsdp

AnyRouting = Routing | SlotRouting | SoftRouting


class MoE(nnx.Module):
    """The router, the experts and the shared experts of one layer.

    Args:
      config: of the layer.
      d_model: width of the residual stream, D.
      dtype: the compute dtype.
      vocab_size: rows of a hash router's table.
      active_top_k: experts per token at first, at most `moe.top_k`, where training changes them;
        None where it does not.
      rngs: for the parameters.
    """

    def __init__(
        self,
        config: MoeConfig,
        d_model: int,
        dtype: jnp.dtype,
        *,
        vocab_size: int,
        active_top_k: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.router = make_router(config, d_model, rngs=rngs)
        network = Network(config.activation, config.activation_limit, config.expert_bias)
        width = config.d_latent or d_model
        self.experts = Experts(
            config.num_experts, width, config.d_expert, dtype, network, rngs=rngs
        )
        if config.d_latent:
            down_DZ = initialize(rngs.params(), (d_model, width))
            up_ZD = initialize(rngs.params(), (width, d_model))
            self.latent_down = nnx.Param(down_DZ, axes=("embed", "latent"))
            self.latent_up = nnx.Param(up_ZD, axes=("latent", "embed"))
        if config.num_zero_computation_experts:
            self.zero_computation_experts = ZeroComputationExperts(config, d_model, rngs=rngs)
        if config.num_shared_experts:
            # The sum of several networks is one wider network.
            has_bias = config.expert_bias or config.shared_bias
            of_shared = dataclasses.replace(network, has_bias=has_bias)
            self.shared = FeedForward(d_model, config.shared_width, dtype, of_shared, rngs=rngs)
        if config.shared_combine == "gated":
            gate_D1 = initialize(rngs.params(), (d_model, 1))
            self.shared_gate = nnx.Param(gate_D1, axes=("embed", "router"))
        if config.output_bias:
            self.output_bias = nnx.Param(jnp.zeros(d_model), axes=("norm",))
        self._init_router_state(vocab_size, active_top_k, rngs)

    def _init_router_state(self, vocab_size: int, active_top_k: int | None, rngs: nnx.Rngs) -> None:
        num_choices = self.config.num_choices
        self.idle_steps = RouterState(jnp.zeros(num_choices, jnp.int32), axes=("router",))
        if self.config.has_selection_bias:
            self.selection_bias = RouterState(jnp.zeros(num_choices), axes=("router",))
        scheduled = None
        if active_top_k is not None:
            active_1 = jnp.full(1, active_top_k, jnp.int32)
            scheduled = RouterState(active_1, axes=("router",))
        self.active_top_k = nnx.data(scheduled)
        if self.config.router == "hash":
            draws_VE = jax.random.uniform(rngs.params(), (vocab_size, num_choices))
            table_VK = jax.lax.top_k(draws_VE, self.config.top_k)[1].astype(jnp.int32)
            self.table = RouterState(table_VK, axes=("router", "router"))

    def __call__(
        self, x_BLD: Float[Array, "B L D"], info: TokenInfo
    ) -> tuple[Float[Array, "B L D"], RoutingStats]:
        """Sends each token to its experts and adds up what they return.

        Args:
          x_BLD: normalised residual stream, in the compute dtype.
          info: about the tokens.

        Returns:
          The layer's output, zeros at padding, and its `RoutingStats`.
        """
        check_overrides(info.overrides, self.config, is_placed=self.experts.are_placed)
        # Whatever stands at padding, NaN too, would reach sums over tokens in spite of
        # weights of 0.
        x_BLD = jnp.where(info.is_token_BL[..., None], x_BLD, 0)
        with jax.named_scope("route"):
            jittered_BLD = jitter(x_BLD.astype(jnp.float32), self.config, info)
            logits = self.router(jittered_BLD)
            routing = self._route(logits, info)
            assignment, combined = self._assign(routing, info)
        with jax.named_scope("experts"):
            y_BLD, buffer_overflow = self._run_experts(x_BLD, assignment, info)
            y_BLD = self._add_zero_computation(y_BLD, x_BLD, combined)
        stats = self._collect(routing, combined, buffer_overflow, info)
        if self.config.num_shared_experts:
            with jax.named_scope("shared_experts"):
                y_BLD = self._add_shared(y_BLD, x_BLD, info)
        if self.config.output_bias:
            bias_11D = self.output_bias[...].astype(y_BLD.dtype)[None, None]
            y_BLD += jnp.where(info.is_token_BL[..., None], bias_11D, 0)
        return y_BLD, stats

    def _route(self, logits: Logits, info: TokenInfo) -> AnyRouting:
        """Decides which tokens and experts belong together."""
        config, length = self.config, info.is_token_BL.shape[1]
        if config.router == "soft":
            return route_soft(logits.logits_BLE, info.is_token_BL)
        inputs = self._router_inputs(logits, info)
        if config.router == "expert_choice":
            slots = capacity_slots(1.0, config.top_k, length, config.num_experts)
            return route_expert_choice(inputs, config, slots)
        return route(inputs, config, self._active_top_k(info))

    def _active_top_k(self, info: TokenInfo) -> Int[Array, ""] | None:
        """Returns the experts per token where they may be fewer than `moe.top_k`."""
        if info.overrides.active_top_k is not None:
            return info.overrides.active_top_k
        if self.active_top_k is None:
            return None
        return self.active_top_k[...][0]

    def _assign(self, routing: AnyRouting, info: TokenInfo) -> tuple[Assignment, Any]:
        """Returns where tokens go, within the capacity of experts.

        The second result, `CombineWeights`, is None unless tokens choose.
        """
        if isinstance(routing, SlotRouting):
            return self._expert_choice(routing, info), None
        if isinstance(routing, SoftRouting):
            return self._soft_slots(routing, info), None
        combined = self._combine(routing, info)
        return self._token_choice(combined, info), combined

    def _expert_choice(self, routing: SlotRouting, info: TokenInfo) -> ExpertChoice:
        weights_BEC = checkpoint_name(routing.weights_BEC, WEIGHTS)
        is_ablated_E = info.overrides.is_ablated_E
        if is_ablated_E is not None:
            weights_BEC = jnp.where(is_ablated_E[None, :, None], 0.0, weights_BEC)
        return ExpertChoice(routing.positions_BEC, weights_BEC)

    def _soft_slots(self, routing: SoftRouting, info: TokenInfo) -> SoftSlots:
        by_expert = (*info.is_token_BL.shape, self.config.num_experts, -1)
        dispatch_BLES = routing.dispatch_BLS.reshape(by_expert)
        combine_BLES = routing.combine_BLS.reshape(by_expert)
        is_ablated_E = info.overrides.is_ablated_E
        if is_ablated_E is not None:
            combine_BLES = jnp.where(is_ablated_E[None, None, :, None], 0.0, combine_BLES)
        return SoftSlots(dispatch_BLES, combine_BLES)

    def _combine(self, routing: Routing, info: TokenInfo) -> CombineWeights:
        """Returns the choices that have a slot, and how much each counts."""
        config = self.config
        combined = combine_within_capacity(
            routing,
            config,
            self._capacity_factor(info),
            length=info.is_token_BL.shape[1],
            num_devices=batch_devices(),
            max_slots_factor=config.capacity_factor if info.is_training else None,
        )
        dropout_TK = draw_expert_dropout(config, info)
        dropout_TK = drop_ablated(dropout_TK, combined.experts_TK, info.overrides)
        return dataclasses.replace(combined, dropout_TK=dropout_TK)

    def _capacity_factor(self, info: TokenInfo) -> jax.Array | float | None:
        """Returns slots over their mean number, None where no choice is dropped."""
        if info.overrides.capacity_factor is not None:
            return info.overrides.capacity_factor
        if self.config.dispatch == "dropless":
            return None
        if info.knobs is not None:
            return info.knobs.capacity_factor
        return self.config.eval_capacity_factor or None

    def _token_choice(self, combined: CombineWeights, info: TokenInfo) -> TokenChoice:
        """Returns the choices with weights on the experts' inputs or outputs.

        Experts are named by their slots where they were placed.
        """
        shape = (*info.is_token_BL.shape, self.config.top_k)
        experts_BLK = combined.experts_TK.reshape(shape)
        if info.overrides.placement is not None:
            experts_BLK = info.overrides.placement.slots_of(experts_BLK, self.experts.num_slots)
        if self.config.weight_on == "output":
            return TokenChoice(experts_BLK, combined.output_weights_TK.reshape(shape))
        weights_BLK = combined.weights_TK.reshape(shape)
        factors_BLK = jnp.ones_like(weights_BLK)
        if combined.dropout_TK is not None:
            factors_BLK = combined.dropout_TK.reshape(shape)
        return TokenChoice(experts_BLK, factors_BLK, weights_BLK)

    def _run_experts(
        self, x_BLD, assignment: Assignment, info: TokenInfo
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the experts, here or where they are on the mesh.

        Returns:
          Their combined output, and how many choices buffers had no room for. Experts work at
          another width where the layer has a latent one (LatentMoE, Nemotron 3).
        """
        config = self.config
        strategy = Strategy(config.exchange, config.exchange_buffer, config.exchange_chunks)
        dropless = self._dropless() if isinstance(assignment, TokenChoice) else None
        run = functools.partial(exchange, strategy, self._local_experts(assignment, info), dropless)
        if not config.d_latent:
            return run(x_BLD, assignment, self.experts.weights())
        latent_BLZ = dense(x_BLD, gather_fsdp(self.latent_down, x_BLD.dtype))
        y_BLZ, buffer_overflow = run(latent_BLZ, assignment, self.experts.weights())
        return dense(y_BLZ, gather_fsdp(self.latent_up, x_BLD.dtype)), buffer_overflow

    def _local_experts(self, assignment: Assignment, info: TokenInfo) -> LocalExperts:
        """Returns what a device does with its tokens, if it has all experts that these need."""
        config = self.config
        if isinstance(assignment, ExpertChoice):
            return LocalExperts(run_expert_choice)
        if isinstance(assignment, SoftSlots):
            return LocalExperts(run_soft_slots)
        has_slots = config.dispatch == "capacity" and config.capacity_group == "sequence"
        if not (has_slots and info.is_training):
            return self._dropless()
        length = info.is_token_BL.shape[1]
        slots = capacity_slots(config.capacity_factor, config.top_k, length, config.num_experts)
        return LocalExperts(functools.partial(run_with_capacity, slots=slots))

    def _dropless(self) -> LocalExperts:
        matmul = self.config.grouped_matmul
        run = functools.partial(run_dropless, implementation=matmul)
        return LocalExperts(run, can_check_vma(matmul))

    def _add_zero_computation(self, y_BLD, x_BLD, combined: CombineWeights | None):
        """Adds the outputs of experts without weights."""
        if not self.config.num_zero_computation_experts or combined is None:
            return y_BLD
        shape = (*x_BLD.shape[:2], self.config.top_k)
        experts_BLK = combined.experts_TK.reshape(shape)
        weights_BLK = combined.output_weights_TK.reshape(shape)
        other_BLD = self.zero_computation_experts(x_BLD, experts_BLK, weights_BLK)
        return (y_BLD.astype(jnp.float32) + other_BLD).astype(y_BLD.dtype)

    def _collect(
        self,
        routing: AnyRouting,
        combined: Any,
        buffer_overflow: jax.Array,
        info: TokenInfo,
    ) -> RoutingStats:
        """Sums up the layer's routing."""
        if isinstance(routing, SlotRouting):
            return collect_expert_choice(routing, info.is_token_BL, trace=info.trace)
        if isinstance(routing, SoftRouting):
            num_experts = self.config.num_experts
            return collect_soft_slots(routing, info.is_token_BL, num_experts, trace=info.trace)
        return collect(
            routing,
            info.is_token_BL.reshape(-1),
            combined,
            self.config,
            length=info.is_token_BL.shape[1],
            buffer_overflow=buffer_overflow,
            num_devices=batch_devices(),
            trace=info.trace,
        )

    def _router_inputs(self, logits: Logits, info: TokenInfo) -> RouterInputs:
        def flat(x_BLX):
            return None if x_BLX is None else x_BLX.reshape(-1, *x_BLX.shape[2:])

        return RouterInputs(
            logits_TE=flat(logits.logits_BLE),
            mask_T=flat(info.is_token_BL),
            length=info.is_token_BL.shape[1],
            tokens_T=flat(info.tokens_BL),
            positions_T=flat(info.positions_BL),
            bias_E=self.selection_bias[...] if self.config.has_selection_bias else None,
            table_VK=self.table[...] if self.config.router == "hash" else None,
            group_logits_TG=flat(logits.group_logits_BLG),
            noise_scale_TE=flat(logits.noise_scale_BLE),
            group_noise_scale_TG=flat(logits.group_noise_scale_BLG),
            is_blocked_E=info.overrides.is_blocked_E,
            keys_B=info.keys_B,
            is_training=info.knobs is not None,
            noise=1.0 if info.knobs is None else info.knobs.noise_scale,
        )

    def _add_shared(self, y_BLD, x_BLD, info: TokenInfo):
        """Adds the output of the shared experts to the routed one.

        Added with weight 1 (DeepSeekMoE), weighed by a sigmoid of the token (Qwen1.5-MoE), or
        averaged (Command).
        """
        shared_BLD = self.shared(x_BLD).astype(jnp.float32)
        if self.config.shared_combine == "gated":
            gate_BL1 = dense(
                x_BLD.astype(jnp.float32), gather_fsdp(self.shared_gate), precision="highest"
            )
            shared_BLD *= jax.nn.sigmoid(gate_BL1)
        sum_BLD = y_BLD.astype(jnp.float32) + jnp.where(info.is_token_BL[..., None], shared_BLD, 0)
        if self.config.shared_combine == "averaged":
            sum_BLD /= 2
        return sum_BLD.astype(y_BLD.dtype)
