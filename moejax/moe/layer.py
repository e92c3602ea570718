"""The MoE layer: parameters and names; reads like the path of a token."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.config import MoeConfig
from moejax.kernels.grouped_matmul import grouped_matmul, spare_rows_for
from moejax.kernels.project import project
from moejax.moe.dispatch import capacity_limit, capacity_slots, combine, dispatch, plan_capacity, plan_dropless
from moejax.moe.exchange import exchange
from moejax.moe.experts import Experts, FeedForward, apply_experts
from moejax.moe.routers import Routing, route
from moejax.moe.stats import RoutingStats, collect


class Router(nnx.Module):
    """A linear map to expert logits, in float32 whatever the compute dtype."""

    def __init__(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
        # A tenth of the usual variance keeps early routing close to uniform (Fedus et al. 2021, section 2.4).
        init = jax.nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts)), axes=("embed", "router"))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L E"]:
        """Logits of each expert for each token."""
        return project(x_BLD.astype(jnp.float32), self.kernel[...])


class MoE(nnx.Module):
    """Router, experts and shared experts of one layer."""

    def __init__(self, config: MoeConfig, d_model: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.config = config
        self.router = Router(d_model, config.num_experts, rngs=rngs)
        self.experts = Experts(config.num_experts, d_model, config.d_expert, dtype, rngs=rngs)
        if config.num_shared_experts:
            # Shared experts are added with weight 1, so that together they are one wider network.
            self.shared = FeedForward(d_model, config.num_shared_experts * config.d_expert, dtype, rngs=rngs)

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask_BL: Bool[Array, "B L"],
        *,
        capacity_factor: Float[Array, ""] | None = None,
        trace: bool = False,
    ) -> tuple[Float[Array, "B L D"], RoutingStats]:
        """Sends each token to its experts and adds up what they return.

        Args:
          x_BLD: normalised residual stream, in the compute dtype.
          mask_BL: False where a position is padding: it reaches no expert and enters no statistic.
          capacity_factor: limits the slots used by capacity dispatch; None is dropless (evaluation, inference).
          trace: keep the token-level `Routing` in the statistics.

        Returns:
          The layer's output, zeros at padding, and its `RoutingStats`.
        """
        batch, length, _ = x_BLD.shape
        with jax.named_scope("route"):
            logits_BLE = self.router(x_BLD)
            mask_T = mask_BL.reshape(-1)
            routing = route(logits_BLE.reshape(batch * length, -1), mask_T, self.config)
        with jax.named_scope("experts"):
            y_BLD, kept_BLK = self._run_experts(x_BLD, routing, capacity_factor)
        if self.config.num_shared_experts:
            with jax.named_scope("shared_experts"):
                y_BLD += jnp.where(mask_BL[..., None], self.shared(x_BLD), 0)
        stats = collect(routing, mask_T, kept_BLK.reshape(batch * length, -1), trace=trace)
        return y_BLD, stats

    def _run_experts(self, x_BLD, routing: Routing, capacity_factor):
        batch, length, _ = x_BLD.shape
        config = self.config
        shape = (batch, length, config.top_k)
        if config.dispatch == "capacity" and capacity_factor is not None:
            slots = capacity_slots(config.capacity_factor, config.top_k, length, config.num_experts)
            limit = capacity_limit(capacity_factor, config.top_k, length, config.num_experts)
            run_local = functools.partial(run_with_capacity, slots=slots)
        else:
            limit = jnp.int32(length)
            run_local = functools.partial(run_dropless, implementation=config.grouped_matmul)
        return exchange(
            run_local,
            x_BLD,
            routing.experts_TK.reshape(shape),
            routing.weights_TK.reshape(shape),
            *self.experts.weights(),
            limit,
        )


def run_dropless(x_BLD, experts_BLK, weights_BLK, gate_up_ED2F, down_EFD, limit, *, implementation: str):
    """Dispatch, experts and combine on one device, as many rows as there are choices; `limit` plays no part."""
    del limit
    top_k = experts_BLK.shape[-1]
    num_experts = gate_up_ED2F.shape[0]
    spare_rows = spare_rows_for(experts_BLK.size, num_experts, implementation)
    plan = plan_dropless(experts_BLK.reshape(-1, top_k), num_experts, spare_rows)
    return _run(
        plan,
        x_BLD,
        weights_BLK,
        gate_up_ED2F,
        down_EFD,
        functools.partial(
            grouped_matmul, group_sizes_E=plan.group_sizes_E, implementation=implementation, spare_rows=spare_rows
        ),
    )


def run_with_capacity(x_BLD, experts_BLK, weights_BLK, gate_up_ED2F, down_EFD, limit, *, slots: int):
    """Dispatch, experts and combine on one device, in `slots` rows per expert and sequence."""
    num_experts = gate_up_ED2F.shape[0]
    plan = plan_capacity(experts_BLK, num_experts, slots, jnp.minimum(limit, slots))

    def slotted_matmul(x_RP, w_EPQ):
        x_ECP = x_RP.reshape(num_experts, -1, x_RP.shape[-1])
        return jnp.einsum("ECP,EPQ->ECQ", x_ECP, w_EPQ).reshape(x_RP.shape[0], -1)

    return _run(plan, x_BLD, weights_BLK, gate_up_ED2F, down_EFD, slotted_matmul)


def _run(plan, x_BLD, weights_BLK, gate_up_ED2F, down_EFD, matmul):
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    y_RD = apply_experts(dispatch(x_TD, plan), gate_up_ED2F, down_EFD, matmul)
    y_TD = combine(y_RD, weights_BLK.reshape(plan.row_TK.shape), plan)
    kept_BLK = (plan.row_TK < plan.choice_R.shape[0]).reshape(weights_BLK.shape)
    return y_TD.reshape(x_BLD.shape), kept_BLK
