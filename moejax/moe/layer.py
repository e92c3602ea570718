"""The MoE layer: parameters and names; reads like the path of a token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.config import Knobs, MoeConfig
from moejax.kernels.grouped_matmul import can_check_vma
from moejax.kernels.matmul import dense
from moejax.moe.balancing.stats import (
    CombineWeights,
    RoutingStats,
    collect,
    collect_slots,
    collect_soft,
)
from moejax.moe.dispatch.capacity import (
    CapacityAssignment,
    apply_capacity,
    capacity_limit,
    capacity_slots,
)
from moejax.moe.dispatch.on_device import (
    ExpertChoice,
    SoftSlots,
    TokenChoice,
    run_dropless,
    run_slots,
    run_soft,
    run_with_capacity,
)
from moejax.moe.expert_parallel.exchange import exchange
from moejax.moe.expert_parallel.placement import Replicas
from moejax.moe.expert_parallel.strategy import Exchange, LocalExperts
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
from moejax.moe.router.modules import Logits, make_router
from moejax.moe.router.routing import Stream, draw
from moejax.moe.router.scores import combine_weights, spread_over_survivors
from moejax.moe.router.selection import save_for_remat
from moejax.sharding import batch_devices, gather_fsdp


class BlockError(ValueError):
    """Experts that cannot be blocked."""


class RouterState(nnx.Variable):
    """What a router carries besides parameters: no gradient, no optimizer; saved, restored, updated once per step."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What a layer knows about its tokens besides the residual stream.

    Attributes:
      is_token_BL: False where a position is padding: it reaches no expert and enters no statistic.
      tokens_BL: token ids; None unless the router looks at them.
      positions_BL: positions in their documents; None unless the router looks at them.
      knobs: traced scalars; None in evaluation.
      keys_B: a key per sequence, for everything drawn at random; None where nothing is.
      trace: keep the token-level routing in the statistics.
    """

    is_token_BL: jax.Array
    tokens_BL: jax.Array | None = None
    positions_BL: jax.Array | None = None
    knobs: Knobs | None = None
    keys_B: jax.Array | None = None
    trace: bool = dataclasses.field(default=False, metadata={"static": True})


class MoE(nnx.Module):
    """Router, experts, and what goes beside them, of one layer.

    Args:
      config: of the layer.
      d_model: width of the residual stream, D.
      dtype: the compute dtype.
      vocab_size: rows of a hash router's table.
      limit: experts per token at first, at most `moe.top_k`, where training changes them; None
        where it does not.
      rngs: for the parameters.
    """

    def __init__(
        self,
        config: MoeConfig,
        d_model: int,
        dtype: jnp.dtype,
        *,
        vocab_size: int,
        limit: int | None = None,
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
            self.into_latent = nnx.Param(
                initialize(rngs.params(), (d_model, width)), axes=("embed", "latent")
            )
            self.out_of_latent = nnx.Param(
                initialize(rngs.params(), (width, d_model)), axes=("latent", "embed")
            )
        if config.num_zero_computation_experts:
            self.free_experts = ZeroComputationExperts(config, d_model, rngs=rngs)
        if config.num_shared_experts:
            # The sum of several networks is one wider network.
            self.shared = FeedForward(
                d_model, config.num_shared_experts * config.d_expert, dtype, network, rngs=rngs
            )
        if config.shared_combine == "gated":
            self.shared_gate = nnx.Param(
                initialize(rngs.params(), (d_model, 1)), axes=("embed", "router")
            )
        self.idle_steps = RouterState(jnp.zeros(config.num_choices, jnp.int32), axes=("router",))
        if config.has_selection_bias:
            self.selection_bias = RouterState(jnp.zeros(config.num_choices), axes=("router",))
        self.is_placed = False
        self.is_blocking = False
        self.is_limited = limit is not None
        if limit is not None:
            self.limit = RouterState(jnp.full(1, limit, jnp.int32), axes=("router",))
        if config.router == "hash":
            draws_VE = jax.random.uniform(rngs.params(), (vocab_size, config.num_choices))
            table_VK = jax.lax.top_k(draws_VE, config.top_k)[1].astype(jnp.int32)
            self.table = RouterState(table_VK, axes=("router", "router"))

    def place(self, experts_NP: Int[np.ndarray, "N P"]) -> None:
        """Gives experts other places, and some of them several, of all layers of a stack; not for training.

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
                f"moe.router={self.config.router} ranks no expert behind those that a token visits, so none can be "
                f"blocked; it can with any router but {', '.join(UNRANKED)}"
            )
        if is_blocked_E.shape != self.idle_steps.shape:
            raise BlockError(
                f"is_blocked_E has shape {is_blocked_E.shape}; it must be {self.idle_steps.shape}"
            )
        self.is_blocked = RouterState(jnp.asarray(is_blocked_E), axes=self.idle_steps.axes)
        self.is_blocking = True

    def _to_slots(self, experts_BLK):
        """Slots of chosen experts; tokens take turns among the copies of one, by row and place in the row.

        What is no expert has no slot.
        """
        is_expert_BLK = experts_BLK < self.config.num_experts
        expert_BLK = jnp.minimum(experts_BLK, self.config.num_experts - 1)
        turn_BL1 = jnp.indices(experts_BLK.shape[:2]).sum(axis=0)[:, :, None]
        slot_BLK = self.slots[...][expert_BLK, turn_BL1 % self.num_copies[...][expert_BLK]]
        return jnp.where(is_expert_BLK, slot_BLK, self.experts.down.shape[0])

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
        y_BLD, stats = {"expert_choice": self._experts_choose, "soft": self._mix}.get(
            self.config.router, self._tokens_choose
        )(x_BLD, logits, info)
        if self.config.num_shared_experts:
            with jax.named_scope("shared_experts"):
                y_BLD = self._with_shared(y_BLD, x_BLD, info)
        return y_BLD, stats

    def _with_shared(self, y_BLD, x_BLD, info: TokenInfo):
        """The routed output with that of the shared experts.

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
        """The router's input, in training multiplied by uniform noise (Fedus et al. 2021, section 2.4)."""
        if self.config.jitter == 0 or info.knobs is None or info.keys_B is None:
            return x_BLD
        uniform_BLD = draw(info.keys_B, Stream.JITTER, jax.random.uniform, *x_BLD.shape[1:])
        return x_BLD * (1 + info.knobs.jitter * (2 * uniform_BLD - 1))

    def _tokens_choose(self, x_BLD, logits: Logits, info: TokenInfo):
        config, length = self.config, x_BLD.shape[1]
        with jax.named_scope("route"):
            inputs = self._inputs(logits, info, length)
            routing = route(inputs, config, self.limit[...][0] if self.is_limited else None)
            experts_TK, service = self._admit(routing, info, length)
        with jax.named_scope("experts"):
            y_BLD, buffer_overflow = self._run(x_BLD, experts_TK, service, info)
        stats = collect(
            routing, inputs.mask_T, service, config,
            length=length, buffer_overflow=buffer_overflow, num_devices=batch_devices(), trace=info.trace,
        )  # fmt: skip
        return y_BLD, stats

    def _inputs(self, logits: Logits, info: TokenInfo, length: int) -> RouterInputs:
        def flat(x_BLX):
            return None if x_BLX is None else x_BLX.reshape(-1, *x_BLX.shape[2:])

        return RouterInputs(
            logits_TE=flat(logits.logits_BLE),
            mask_T=flat(info.is_token_BL),
            length=length,
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

    def _admit(
        self, routing: Routing, info: TokenInfo, length: int
    ) -> tuple[Int[Array, "T K"], CombineWeights]:
        """Who finds a slot, where the others go, and with which weights."""
        config = self.config
        factor = config.eval_capacity_factor if info.knobs is None else info.knobs.capacity_factor
        none_TK = jnp.zeros(routing.experts_TK.shape, bool)
        if config.dispatch == "dropless" or (
            info.knobs is None and config.eval_capacity_factor == 0
        ):
            admission = CapacityAssignment(routing.experts_TK, none_TK, none_TK)
            return routing.experts_TK, self._service(routing.weights_TK, admission, info, length)
        num_tokens = routing.experts_TK.shape[0]
        groups = {"sequence": num_tokens // length, "device": batch_devices(), "global": 1}[
            config.capacity_group
        ]
        size = (config.top_k, num_tokens // groups, config.num_experts)
        limit = capacity_limit(jnp.float32(factor), *size)
        if info.knobs is not None:
            limit = jnp.minimum(
                limit, capacity_slots(config.capacity_factor, *size)
            )  # the size of the buffers
        admission = apply_capacity(
            routing.experts_TK,
            routing.ranking_TE,
            routing.weights_TK,
            limit,
            num_experts=config.num_experts,
            num_groups=groups,
            order=config.capacity_order,
            overflow=config.overflow,
        )
        weights_TK = routing.weights_TK
        if config.overflow == "next":
            # A choice that stays without a slot keeps its part in the normalisation.
            held_TK = jnp.where(admission.is_dropped_TK, routing.experts_TK, admission.experts_TK)
            weights_TK = combine_weights(routing.log_scores_TE, held_TK, config)
        if config.overflow == "renormalize":
            is_kept_TK = ~admission.is_dropped_TK & (routing.experts_TK < config.num_choices)
            kept_TK = spread_over_survivors(weights_TK, routing.log_weights_TK, is_kept_TK)
        else:
            kept_TK = jnp.where(admission.is_dropped_TK, 0.0, weights_TK)
        return save_for_remat(admission.experts_TK), self._service(kept_TK, admission, info, length)

    def _service(
        self, weights_TK, admission: CapacityAssignment, info: TokenInfo, length: int
    ) -> CombineWeights:
        dropout_TK = self._dropout(weights_TK.shape, info, length)
        return CombineWeights(
            checkpoint_name(weights_TK, "routing_weights"),
            admission.is_dropped_TK,
            admission.is_moved_TK,
            dropout_TK,
        )

    def _dropout(
        self, shape: tuple[int, ...], info: TokenInfo, length: int
    ) -> Float[Array, "T K"] | None:
        """Factors on the choices' outputs: 0 for some drawn at random, and more than 1 for the rest to make up for it.

        Not dropout within an expert: a token loses the whole output of an expert.
        """
        if self.config.expert_dropout == 0 or info.knobs is None or info.keys_B is None:
            return None
        rate = info.knobs.expert_dropout
        uniform_TK = draw(
            info.keys_B, Stream.DROPOUT, jax.random.uniform, length, shape[1]
        ).reshape(shape)
        return jnp.where(uniform_TK < rate, 0.0, 1 / (1 - rate))

    def _run(self, x_BLD, experts_TK, service: CombineWeights, info: TokenInfo):
        batch, length, _ = x_BLD.shape
        config = self.config
        local = self._dropless()
        if (
            config.dispatch == "capacity"
            and config.capacity_group == "sequence"
            and info.knobs is not None
        ):
            slots = capacity_slots(config.capacity_factor, config.top_k, length, config.num_experts)
            local = LocalExperts(functools.partial(run_with_capacity, slots=slots))
        weights_TK, factors_TK = service.weights_TK, service.dropout_TK
        experts_BLK, weights_BLK = (
            a.reshape(batch, length, config.top_k) for a in (experts_TK, weights_TK)
        )
        factors_BLK = None if factors_TK is None else factors_TK.reshape(weights_BLK.shape)
        out_BLK = weights_BLK if factors_BLK is None else weights_BLK * factors_BLK
        chosen_BLK = self._to_slots(experts_BLK) if self.is_placed else experts_BLK
        if config.weight_on == "output":
            y_BLD, buffer_overflow = self._through_experts(
                local, x_BLD, TokenChoice(chosen_BLK, out_BLK)
            )
        else:
            ones_BLK = jnp.ones_like(weights_BLK) if factors_BLK is None else factors_BLK
            y_BLD, buffer_overflow = self._through_experts(
                local, x_BLD, TokenChoice(chosen_BLK, ones_BLK, weights_BLK)
            )
        if config.num_zero_computation_experts:
            free_BLD = self.free_experts(x_BLD, experts_BLK, out_BLK)
            y_BLD = (y_BLD.astype(jnp.float32) + free_BLD).astype(y_BLD.dtype)
        return y_BLD, buffer_overflow

    def _dropless(self) -> LocalExperts:
        matmul = self.config.grouped_matmul
        return LocalExperts(
            functools.partial(run_dropless, implementation=matmul), can_check_vma(matmul)
        )

    def _through_experts(self, local: LocalExperts, x_BLD, chosen):
        """The experts' combined output, and how many choices buffers had no room for.

        In between at another width, if they have one (LatentMoE, Nemotron 3).
        """
        config = self.config
        rows = self._dropless() if isinstance(chosen, TokenChoice) else None
        how = Exchange(config.exchange, config.exchange_buffer, config.exchange_chunks)
        through = functools.partial(exchange, how, local, rows, weights=self.experts.weights())
        if not config.d_latent:
            return through(x_BLD, chosen)
        into, out_of = (gather_fsdp(w, x_BLD.dtype) for w in (self.into_latent, self.out_of_latent))
        y_BLD, buffer_overflow = through(dense(x_BLD, into), chosen)
        return dense(y_BLD, out_of), buffer_overflow

    def _experts_choose(self, x_BLD, logits: Logits, info: TokenInfo):
        length = x_BLD.shape[1]
        with jax.named_scope("route"):
            slots = capacity_slots(1.0, self.config.top_k, length, self.config.num_experts)
            routing = route_expert_choice(self._inputs(logits, info, length), self.config, slots)
        with jax.named_scope("experts"):
            chosen = ExpertChoice(
                routing.positions_BEC, checkpoint_name(routing.weights_BEC, "routing_weights")
            )
            y_BLD, _ = self._through_experts(LocalExperts(run_slots), x_BLD, chosen)
        return y_BLD, collect_slots(routing, info.is_token_BL, trace=info.trace)

    def _mix(self, x_BLD, logits: Logits, info: TokenInfo):
        with jax.named_scope("route"):
            routing = route_soft(logits.logits_BLE, info.is_token_BL)
        with jax.named_scope("experts"):
            by_expert = (*logits.logits_BLE.shape[:2], self.config.num_experts, -1)
            mixing = SoftSlots(
                routing.dispatch_BLS.reshape(by_expert), routing.combine_BLS.reshape(by_expert)
            )
            y_BLD, _ = self._through_experts(LocalExperts(run_soft), x_BLD, mixing)
        return y_BLD, collect_soft(
            routing, info.is_token_BL, self.config.num_experts, trace=info.trace
        )
