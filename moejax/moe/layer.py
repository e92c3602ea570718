"""The MoE layer: parameters and names; `MoE.__call__` reads like the path of a token."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

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
from moejax.moe.expert_parallel.placement import Replicas
from moejax.moe.expert_parallel.strategy import LocalExperts, Strategy
from moejax.moe.experts.experts import Experts, FeedForward, Network, initialize
from moejax.moe.experts.zero_computation import ZeroComputationExperts
from moejax.moe.router import (
    UNRANKED,
    RouterInputs,
    Routing,
    route,
    route_expert_choice,
    route_soft,
)
from moejax.moe.router.modules import Logits, RouterState, make_router
from moejax.moe.router.routing import SlotRouting, SoftRouting, Stream, draw
from moejax.moe.token_info import TokenInfo
from moejax.sharding import batch_devices, gather_fsdp

AnyRouting = Routing | SlotRouting | SoftRouting


class BlockError(ValueError):
    """Experts that cannot be blocked."""


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
            into_DZ = initialize(rngs.params(), (d_model, width))
            out_of_ZD = initialize(rngs.params(), (width, d_model))
            self.into_latent = nnx.Param(into_DZ, axes=("embed", "latent"))
            self.out_of_latent = nnx.Param(out_of_ZD, axes=("latent", "embed"))
        if config.num_zero_computation_experts:
            self.free_experts = ZeroComputationExperts(config, d_model, rngs=rngs)
        if config.num_shared_experts:
            # The sum of several networks is one wider network.
            d_shared = config.num_shared_experts * config.d_expert
            self.shared = FeedForward(d_model, d_shared, dtype, network, rngs=rngs)
        if config.shared_combine == "gated":
            gate_D1 = initialize(rngs.params(), (d_model, 1))
            self.shared_gate = nnx.Param(gate_D1, axes=("embed", "router"))
        self._init_router_state(vocab_size, active_top_k, rngs)

    def _init_router_state(self, vocab_size: int, active_top_k: int | None, rngs: nnx.Rngs) -> None:
        num_choices = self.config.num_choices
        self.idle_steps = RouterState(jnp.zeros(num_choices, jnp.int32), axes=("router",))
        if self.config.has_selection_bias:
            self.selection_bias = RouterState(jnp.zeros(num_choices), axes=("router",))
        self.is_placed = False
        self.is_blocking = False
        self.is_limited = active_top_k is not None
        if active_top_k is not None:
            self.limit = RouterState(jnp.full(1, active_top_k, jnp.int32), axes=("router",))
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
        # Whatever stands at padding, NaN too, would reach sums over tokens in spite of
        # weights of 0.
        x_BLD = jnp.where(info.is_token_BL[..., None], x_BLD, 0)
        with jax.named_scope("route"):
            logits = self.router(self._jittered(x_BLD.astype(jnp.float32), info))
            routing = self._route(logits, info)
            assignment, combined = self._assign(routing, info)
        with jax.named_scope("experts"):
            y_BLD, buffer_overflow = self._run_experts(x_BLD, assignment, info)
            y_BLD = self._add_zero_computation(y_BLD, x_BLD, combined)
        stats = self._collect(routing, combined, buffer_overflow, info)
        if self.config.num_shared_experts:
            with jax.named_scope("shared_experts"):
                y_BLD = self._add_shared(y_BLD, x_BLD, info)
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
        return route(inputs, config, self.limit[...][0] if self.is_limited else None)

    def _assign(self, routing: AnyRouting, info: TokenInfo) -> tuple[Assignment, Any]:
        """Returns where tokens go, within the capacity of experts.

        The second result, `CombineWeights`, is None unless tokens choose.
        """
        config = self.config
        if isinstance(routing, SlotRouting):
            weights_BEC = checkpoint_name(routing.weights_BEC, WEIGHTS)
            return ExpertChoice(routing.positions_BEC, weights_BEC), None
        if isinstance(routing, SoftRouting):
            by_expert = (*info.is_token_BL.shape, config.num_experts, -1)
            dispatch_BLES = routing.dispatch_BLS.reshape(by_expert)
            return SoftSlots(dispatch_BLES, routing.combine_BLS.reshape(by_expert)), None
        combined = combine_within_capacity(
            routing,
            config,
            self._capacity_factor(info),
            length=info.is_token_BL.shape[1],
            num_devices=batch_devices(),
            max_slots_factor=config.capacity_factor if info.is_training else None,
        )
        combined = dataclasses.replace(combined, dropout_TK=self._draw_dropout(info))
        return self._token_choice(combined, info), combined

    def _capacity_factor(self, info: TokenInfo) -> jax.Array | float | None:
        """Returns slots over their mean number, None where no choice is dropped."""
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
        if self.is_placed:
            experts_BLK = self._to_slots(experts_BLK)
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
        latent_BLZ = dense(x_BLD, gather_fsdp(self.into_latent, x_BLD.dtype))
        y_BLZ, buffer_overflow = run(latent_BLZ, assignment, self.experts.weights())
        return dense(y_BLZ, gather_fsdp(self.out_of_latent, x_BLD.dtype)), buffer_overflow

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
        other_BLD = self.free_experts(x_BLD, experts_BLK, weights_BLK)
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
            is_blocked_E=self.is_blocked[...] if self.is_blocking else None,
            keys_B=info.keys_B,
            is_training=info.knobs is not None,
            noise=1.0 if info.knobs is None else info.knobs.noise_scale,
        )

    def _draw_dropout(self, info: TokenInfo) -> Float[Array, "T K"] | None:
        """Draws factors on the choices' outputs: 0 for some, above 1 for the others.

        Not dropout within an expert: a token loses the whole output of an expert.
        """
        if self.config.expert_dropout == 0 or info.knobs is None or info.keys_B is None:
            return None
        rate, top_k = info.knobs.expert_dropout, self.config.top_k
        length = info.is_token_BL.shape[1]
        uniform_BLK = draw(info.keys_B, Stream.DROPOUT, jax.random.uniform, length, top_k)
        return jnp.where(uniform_BLK.reshape(-1, top_k) < rate, 0.0, 1 / (1 - rate))

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

    def _jittered(self, x_BLD, info: TokenInfo):
        """Returns the router's input, in training multiplied by uniform noise.

        Source: Fedus et al. 2021, section 2.4.
        """
        if self.config.jitter == 0 or info.knobs is None or info.keys_B is None:
            return x_BLD
        uniform_BLD = draw(info.keys_B, Stream.JITTER, jax.random.uniform, *x_BLD.shape[1:])
        return x_BLD * (1 + info.knobs.jitter * (2 * uniform_BLD - 1))

    def place(self, experts_NP: Int[np.ndarray, "N P"]) -> None:
        """Gives experts of all layers of a stack other places, and some of them several.

        Not for training.

        Args:
          experts_NP: the expert in each slot, from `moe.placement.place`; parameters have a leading
            axis of N layers.
        """
        copies = Replicas.from_placement(experts_NP, self.config.num_experts)
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            if hasattr(self.experts, name):
                weight = getattr(self.experts, name)
                placed_NP = jax.vmap(lambda weight_E, experts_P: weight_E[experts_P])(
                    weight[...], experts_NP
                )
                setattr(self.experts, name, weight.replace(placed_NP))
        self.slots = RouterState(jnp.asarray(copies.slots_NEM), axes=("layers", "router", "router"))
        self.num_copies = RouterState(jnp.asarray(copies.num_NE), axes=("layers", "router"))
        self.is_placed = True

    def block(self, is_blocked_E: Bool[np.ndarray, "*layers E"]) -> None:
        """Keeps tokens from experts: the next in rank take their place; not for training.

        Scores and their normalisation over all experts stay as they are, but for `sparse_mixer`,
        where only experts that are left compete. Groups of experts are ranked by those that are
        left, and a token visits further groups where its own have too few: it visits K experts
        wherever K are left.

        Args:
          is_blocked_E: which experts; with a leading axis of layers where parameters have one.

        Raises:
          BlockError: another number of experts, or a router that ranks none.
        """
        if self.config.router in UNRANKED:
            raise BlockError(
                f"moe.router={self.config.router} ranks no expert after those that a token visits, "
                f"so none can be blocked; it can with any router but {', '.join(UNRANKED)}"
            )
        if is_blocked_E.shape != self.idle_steps.shape:
            raise BlockError(
                f"is_blocked_E has shape {is_blocked_E.shape}; it must be {self.idle_steps.shape}"
            )
        self.is_blocked = RouterState(jnp.asarray(is_blocked_E), axes=self.idle_steps.axes)
        self.is_blocking = True

    def _to_slots(self, experts_BLK):
        """Returns the slots of chosen experts.

        Tokens take turns among the replicas of an expert, by row and position in the row. What is
        no expert has no slot.
        """
        is_expert_BLK = experts_BLK < self.config.num_experts
        expert_BLK = jnp.minimum(experts_BLK, self.config.num_experts - 1)
        turn_BL1 = jnp.indices(experts_BLK.shape[:2]).sum(axis=0)[:, :, None]
        replica_BLK = turn_BL1 % self.num_copies[...][expert_BLK]
        slot_BLK = self.slots[...][expert_BLK, replica_BLK]
        return jnp.where(is_expert_BLK, slot_BLK, self.experts.down.shape[0])
