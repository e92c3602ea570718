"""Dispatch, experts and combine on one device: what `exchange` runs where tokens and expert weights have met.

Every function takes this device's sequences, arrays that say where their tokens go (with a leading
axis of sequences), and expert weights, and returns the combined output.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.kernels.fused_feed_forward import feed_forward
from moejax.kernels.grouped_matmul import grouped_matmul, padding_rows_for, resolve_implementation
from moejax.kernels.tiles import tile_sizes
from moejax.moe.dispatch.plan import (
    add_slots,
    combine,
    dispatch,
    dispatch_weights,
    plan_capacity,
    plan_dropless,
    take_slots,
)
from moejax.moe.experts.experts import ExpertWeights, apply_experts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Where tokens go, if they choose.

    Attributes:
      experts_BLK: experts; E or more: none of those with weights.
      weights_BLK: multiply the experts' outputs.
      input_weights_BLK: multiply their inputs; None: nothing does.
      max_choices: so many are of experts with weights, at most; None: all may be. It
        bounds the rows.
    """

    experts_BLK: jax.Array
    weights_BLK: jax.Array
    input_weights_BLK: Any = None
    max_choices: int | None = dataclasses.field(default=None, metadata={"static": True})

    def of_experts(self, first: jax.Array, count: int) -> "TokenChoice":
        """The same for `count` experts from `first` on; other choices are of none."""
        experts_BLK = self.experts_BLK - first
        is_here_BLK = (experts_BLK >= 0) & (experts_BLK < count)
        return dataclasses.replace(self, experts_BLK=jnp.where(is_here_BLK, experts_BLK, count))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Whom experts take, if they choose.

    Attributes:
      positions_BEC: of tokens in their sequence; L: an empty slot.
      weights_BEC: multiply the experts' outputs.
    """

    positions_BEC: jax.Array
    weights_BEC: jax.Array

    def of_experts(self, first: jax.Array, count: int) -> "ExpertChoice":
        """The same for `count` experts from `first` on."""
        return jax.tree.map(
            lambda a_BEC: jax.lax.dynamic_slice_in_dim(a_BEC, first, count, axis=1), self
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftSlots:
    """How slots mix tokens, and tokens the slots' outputs.

    Attributes:
      dispatch_BLES: weights of a sequence's tokens in the S slots of each expert.
      combine_BLES: weights of the slots' outputs for each token, of the same shape.
    """

    dispatch_BLES: jax.Array
    combine_BLES: jax.Array

    def of_experts(self, first: jax.Array, count: int) -> "SoftSlots":
        """The same for `count` experts from `first` on."""
        return jax.tree.map(
            lambda a_BLES: jax.lax.dynamic_slice_in_dim(a_BLES, first, count, axis=2), self
        )


def run_dropless(x_BLD, chosen: TokenChoice, weights: ExpertWeights, *, implementation: str):
    """As many rows as there are choices."""
    experts_BLK = chosen.experts_BLK
    top_k, num_experts = experts_BLK.shape[-1], weights.down_EFD.shape[0]
    experts_TK = experts_BLK.reshape(-1, top_k)
    num_rows = min(experts_TK.size, chosen.max_choices or experts_TK.size)
    if resolve_implementation(implementation) == "tiled" and _is_plain(chosen, weights):
        sizes = tile_sizes(num_rows, num_experts)
        plan = plan_dropless(experts_TK, num_experts, padding_rows=sizes[-1], max_rows=num_rows)
        return _run_in_one_pass(plan, x_BLD, chosen, weights, sizes, num_rows)
    padding_rows = padding_rows_for(num_rows, num_experts, implementation)
    plan = plan_dropless(experts_TK, num_experts, padding_rows, num_rows)
    matmul = functools.partial(
        grouped_matmul,
        group_sizes_E=plan.group_sizes_E,
        implementation=implementation,
        padding_rows=padding_rows,
    )
    return _run(plan, x_BLD, chosen, weights, matmul)


def _is_plain(chosen: TokenChoice, weights: ExpertWeights) -> bool:
    """Whether `feed_forward` knows all that there is to do."""
    return chosen.input_weights_BLK is None and not weights.network.has_bias


def _run_in_one_pass(
    plan, x_BLD, chosen: TokenChoice, weights: ExpertWeights, sizes: tuple[int, ...], num_rows: int
):
    y_TD = feed_forward(
        x_BLD.reshape(-1, x_BLD.shape[-1]),
        chosen.weights_BLK.reshape(plan.row_TK.shape),
        weights.gate_up_EDPF,
        weights.down_EFD,
        plan.row_TK,
        plan.choice_R,
        plan.group_sizes_E,
        activate=weights.network.activate,
        sizes=sizes,
        max_rows=num_rows,
    )
    return y_TD.reshape(x_BLD.shape)


def run_with_capacity(x_BLD, chosen: TokenChoice, weights: ExpertWeights, *, slots: int):
    """In `slots` rows per expert and sequence, in which every choice must find room."""
    num_experts = weights.down_EFD.shape[0]
    plan = plan_capacity(chosen.experts_BLK, num_experts, slots)
    return _run(plan, x_BLD, chosen, weights, _slotted(num_experts))


def _run(plan, x_BLD, chosen: TokenChoice, weights: ExpertWeights, matmul):
    x_RD = dispatch(x_BLD.reshape(-1, x_BLD.shape[-1]), plan)
    if chosen.input_weights_BLK is not None:
        weights_TK = chosen.input_weights_BLK.reshape(plan.row_TK.shape)
        weighted_RD = dispatch_weights(weights_TK, plan)[:, None] * x_RD.astype(jnp.float32)
        x_RD = weighted_RD.astype(x_RD.dtype)
    y_RD = apply_experts(x_RD, weights, matmul, plan.expert_R)
    return combine(y_RD, chosen.weights_BLK.reshape(plan.row_TK.shape), plan).reshape(x_BLD.shape)


def _slotted(num_experts: int):
    """Product of as many rows for every expert with its matrix."""

    def matmul(x_RP, w_EPQ):
        x_ECP = x_RP.reshape(num_experts, -1, x_RP.shape[-1])
        return jnp.einsum("ECP,EPQ->ECQ", x_ECP, w_EPQ).reshape(x_RP.shape[0], -1)

    return matmul


def apply_slotted(x_RD: jax.Array, weights: ExpertWeights) -> jax.Array:
    """As many rows for every expert, all of which count, through batched products."""
    num_experts = weights.down_EFD.shape[0]
    expert_R = jnp.repeat(jnp.arange(num_experts), x_RD.shape[0] // num_experts)
    return apply_experts(x_RD, weights, _slotted(num_experts), expert_R)


def run_slots(x_BLD, slots: ExpertChoice, weights: ExpertWeights):
    """Where experts choose."""
    positions_BEC, weights_BEC1 = slots.positions_BEC, slots.weights_BEC[..., None]
    num_experts, (batch, length, width) = weights.down_EFD.shape[0], x_BLD.shape
    x_EBCD = take_slots(x_BLD, positions_BEC).swapaxes(0, 1)
    y_RD = apply_slotted(x_EBCD.reshape(-1, width), weights)
    y_BECD = y_RD.reshape(num_experts, batch, -1, width).swapaxes(0, 1)
    weighted_BECD = weights_BEC1 * y_BECD.astype(jnp.float32)
    return add_slots(weighted_BECD, positions_BEC, length).astype(x_BLD.dtype)


def run_soft(x_BLD, mixing: SoftSlots, weights: ExpertWeights):
    """Where slots mix tokens: the weights of both mixtures stay float32."""
    x_EBSD = jnp.einsum("BLES,BLD->EBSD", mixing.dispatch_BLES, x_BLD.astype(jnp.float32)).astype(
        x_BLD.dtype
    )
    y_EBSD = apply_slotted(x_EBSD.reshape(-1, x_BLD.shape[-1]), weights).reshape(x_EBSD.shape)
    y_BLD = jnp.einsum("BLES,EBSD->BLD", mixing.combine_BLES, y_EBSD.astype(jnp.float32))
    return y_BLD.astype(x_BLD.dtype)
