"""Dispatch, experts and combine on one device, where tokens and expert weights have met.

Every function takes the sequences of a device, an assignment that says where their tokens go, and
expert weights, and returns the combined output `[B, L, D]`.
"""

import functools

import jax
import jax.numpy as jnp

from moejax.kernels.fused_feed_forward import feed_forward
from moejax.kernels.grouped_matmul import grouped_matmul, padding_rows_for, resolve_implementation
from moejax.kernels.tiles import tile_sizes
from moejax.moe.dispatch.assignment import ExpertChoice, SoftSlots, TokenChoice
from moejax.moe.dispatch.plan import (
    Plan,
    add_slots,
    combine,
    dispatch,
    dispatch_weights,
    plan_capacity,
    plan_dropless,
    take_slots,
)
from moejax.moe.experts.experts import ExpertWeights, apply_experts


def run_dropless(x_BLD, choice: TokenChoice, weights: ExpertWeights, *, implementation: str):
    """Runs all choices, in as many rows as there are choices.

    Args:
      x_BLD: tokens.
      choice: their experts.
      weights: of the experts.
      implementation: of the grouped matrix product; see `kernels/grouped_matmul`.
    """
    num_experts = weights.down_EFD.shape[0]
    experts_TK = choice.experts_BLK.reshape(-1, choice.experts_BLK.shape[-1])
    num_rows = min(experts_TK.size, choice.max_choices or experts_TK.size)
    if resolve_implementation(implementation) == "tiled" and _can_be_fused(choice, weights):
        sizes = tile_sizes(num_rows, num_experts)
        plan = plan_dropless(experts_TK, num_experts, padding_rows=sizes[-1], max_rows=num_rows)
        return _run_fused(plan, x_BLD, choice, weights, sizes, num_rows)
    padding_rows = padding_rows_for(num_rows, num_experts, implementation)
    plan = plan_dropless(experts_TK, num_experts, padding_rows, num_rows)
    matmul = functools.partial(
        grouped_matmul,
        group_sizes_E=plan.group_sizes_E,
        implementation=implementation,
        padding_rows=padding_rows,
    )
    return _run(plan, x_BLD, choice, weights, matmul)


def run_with_capacity(x_BLD, choice: TokenChoice, weights: ExpertWeights, *, slots: int):
    """Runs all choices in `slots` rows per expert and sequence, in which each must have room."""
    num_experts = weights.down_EFD.shape[0]
    plan = plan_capacity(choice.experts_BLK, num_experts, slots)
    return _run(plan, x_BLD, choice, weights, _equal_groups_matmul(num_experts))


def run_expert_choice(x_BLD, choice: ExpertChoice, weights: ExpertWeights):
    """Runs the tokens that experts chose."""
    num_experts = weights.down_EFD.shape[0]
    batch, length, width = x_BLD.shape
    x_EBCD = take_slots(x_BLD, choice.positions_BEC).swapaxes(0, 1)
    y_RD = apply_to_equal_groups(x_EBCD.reshape(-1, width), weights)
    y_BECD = y_RD.reshape(num_experts, batch, -1, width).swapaxes(0, 1)
    weighted_BECD = choice.weights_BEC[..., None] * y_BECD.astype(jnp.float32)
    return add_slots(weighted_BECD, choice.positions_BEC, length).astype(x_BLD.dtype)


def run_soft_slots(x_BLD, slots: SoftSlots, weights: ExpertWeights):
    """Runs slots that mix tokens; the weights of both mixtures stay float32."""
    mixed_EBSD = jnp.einsum("BLES,BLD->EBSD", slots.dispatch_BLES, x_BLD.astype(jnp.float32))
    x_EBSD = mixed_EBSD.astype(x_BLD.dtype)
    y_RD = apply_to_equal_groups(x_EBSD.reshape(-1, x_BLD.shape[-1]), weights)
    y_EBSD = y_RD.reshape(x_EBSD.shape).astype(jnp.float32)
    return jnp.einsum("BLES,EBSD->BLD", slots.combine_BLES, y_EBSD).astype(x_BLD.dtype)


def apply_to_equal_groups(x_RD: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Applies experts to rows, the same number for each expert, through batched products."""
    num_experts = weights.down_EFD.shape[0]
    expert_R = jnp.repeat(jnp.arange(num_experts), x_RD.shape[0] // num_experts)
    return apply_experts(x_RD, weights, _equal_groups_matmul(num_experts), expert_R)


def _can_be_fused(choice: TokenChoice, weights: ExpertWeights) -> bool:
    """Whether `feed_forward` can do all that is asked for."""
    return choice.input_weights_BLK is None and not weights.network.has_bias


def _run_fused(
    plan: Plan,
    x_BLD,
    choice: TokenChoice,
    weights: ExpertWeights,
    sizes: tuple[int, ...],
    num_rows: int,
):
    """Dispatch, experts and combine in one pass over the rows."""
    y_TD = feed_forward(
        x_BLD.reshape(-1, x_BLD.shape[-1]),
        choice.weights_BLK.reshape(plan.row_TK.shape),
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


def _run(plan: Plan, x_BLD, choice: TokenChoice, weights: ExpertWeights, matmul):
    """Dispatch, experts and combine, one after the other."""
    x_RD = dispatch(x_BLD.reshape(-1, x_BLD.shape[-1]), plan)
    if choice.input_weights_BLK is not None:
        weights_TK = choice.input_weights_BLK.reshape(plan.row_TK.shape)
        weighted_RD = dispatch_weights(weights_TK, plan)[:, None] * x_RD.astype(jnp.float32)
        x_RD = weighted_RD.astype(x_RD.dtype)
    y_RD = apply_experts(x_RD, weights, matmul, plan.expert_R)
    weights_TK = choice.weights_BLK.reshape(plan.row_TK.shape)
    return combine(y_RD, weights_TK, plan).reshape(x_BLD.shape)


def _equal_groups_matmul(num_experts: int):
    """Returns the product of rows, the same number for every expert, with the experts' matrices."""

    def matmul(x_RP, w_EPQ):
        x_ECP = x_RP.reshape(num_experts, -1, x_RP.shape[-1])
        return jnp.einsum("ECP,EPQ->ECQ", x_ECP, w_EPQ).reshape(x_RP.shape[0], -1)

    return matmul
