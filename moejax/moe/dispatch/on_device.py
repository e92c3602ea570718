"""Dispatch, experts and combine on one device, where tokens and expert weights have met.

Every function takes the sequences of a device, an assignment that says where their tokens go, and
expert weights, and returns the combined output `[B, L, D]`.
"""

import functools

import jax
import jax.numpy as jnp

from moejax.kernels.fused_feed_forward import Rows, feed_forward
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
from moejax.moe.experts.experts import ExpertWeights, Matmul, apply_experts


def run_dropless(
    x_BLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
    *,
    implementation: str,
) -> jax.Array:
    """Runs all choices, in as many rows as there are choices.

    Args:
      x_BLD: tokens.
      choice: their experts.
      weights: of the experts.
      implementation: of the grouped matrix product; see `kernels/grouped_matmul`.
    """
    num_experts = weights.down_EFD.shape[0]
    top_k = choice.experts_BLK.shape[-1]
    experts_TK = choice.experts_BLK.reshape(-1, top_k)
    num_choices = experts_TK.size
    num_rows = min(num_choices, choice.max_choices or num_choices)
    is_tiled = resolve_implementation(implementation) == "tiled"
    if is_tiled and _can_be_fused(choice, weights):
        sizes = tile_sizes(num_rows, num_experts)
        plan = plan_dropless(experts_TK, num_experts, sizes[-1], num_rows)
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


def run_with_capacity(
    x_BLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
    *,
    slots: int,
) -> jax.Array:
    """Runs all choices in `slots` rows per expert and sequence, in which each must have room."""
    num_experts = weights.down_EFD.shape[0]
    plan = plan_capacity(choice.experts_BLK, num_experts, slots)
    matmul = _equal_groups_matmul(num_experts)
    return _run(plan, x_BLD, choice, weights, matmul)


def run_expert_choice(
    x_BLD: jax.Array,
    choice: ExpertChoice,
    weights: ExpertWeights,
) -> jax.Array:
    """Runs the tokens that experts chose."""
    num_experts = weights.down_EFD.shape[0]
    batch, length, width = x_BLD.shape
    x_BECD = take_slots(x_BLD, choice.positions_BEC)
    x_EBCD = x_BECD.swapaxes(0, 1)
    x_RD = x_EBCD.reshape(-1, width)
    y_RD = apply_to_equal_groups(x_RD, weights)
    y_EBCD = y_RD.reshape(num_experts, batch, -1, width)
    y_BECD = y_EBCD.swapaxes(0, 1)
    weights_BEC1 = choice.weights_BEC[..., None]
    weighted_BECD = weights_BEC1 * y_BECD.astype(jnp.float32)
    y_BLD = add_slots(weighted_BECD, choice.positions_BEC, length)
    return y_BLD.astype(x_BLD.dtype)


def run_soft_slots(
    x_BLD: jax.Array,
    slots: SoftSlots,
    weights: ExpertWeights,
) -> jax.Array:
    """Runs slots that mix tokens; the weights of both mixtures stay float32."""
    d_model = x_BLD.shape[-1]
    dtype = x_BLD.dtype
    x_BLD = x_BLD.astype(jnp.float32)
    mixed_EBSD = jnp.einsum("BLES,BLD->EBSD", slots.dispatch_BLES, x_BLD)
    mixed_EBSD = mixed_EBSD.astype(dtype)
    mixed_RD = mixed_EBSD.reshape(-1, d_model)
    y_RD = apply_to_equal_groups(mixed_RD, weights)
    y_EBSD = y_RD.reshape(mixed_EBSD.shape)
    y_EBSD = y_EBSD.astype(jnp.float32)
    y_BLD = jnp.einsum("BLES,EBSD->BLD", slots.combine_BLES, y_EBSD)
    return y_BLD.astype(dtype)


def apply_to_equal_groups(x_RD: jax.Array, weights: ExpertWeights) -> jax.Array:
    """Applies experts to rows, the same number for each expert, through batched products."""
    num_experts = weights.down_EFD.shape[0]
    rows_per_expert = x_RD.shape[0] // num_experts
    expert_E = jnp.arange(num_experts)
    expert_R = jnp.repeat(expert_E, rows_per_expert)
    matmul = _equal_groups_matmul(num_experts)
    return apply_experts(x_RD, weights, matmul, expert_R)


def _can_be_fused(choice: TokenChoice, weights: ExpertWeights) -> bool:
    """Whether `feed_forward` can do all that is asked for."""
    return choice.input_weights_BLK is None and not weights.network.has_bias


def _run_fused(
    plan: Plan,
    x_BLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
    sizes: tuple[int, ...],
    num_rows: int,
) -> jax.Array:
    """Dispatch, experts and combine in one pass over the rows."""
    d_model = x_BLD.shape[-1]
    y_TD = feed_forward(
        x_BLD.reshape(-1, d_model),
        _by_token(choice.weights_BLK, plan),
        weights.gate_up_EDPF,
        weights.down_EFD,
        Rows(plan.row_TK, plan.choice_R, plan.group_sizes_E),
        activate=weights.network.activate,
        sizes=sizes,
        max_rows=num_rows,
    )
    return y_TD.reshape(x_BLD.shape)


def _run(
    plan: Plan,
    x_BLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
    matmul: Matmul,
) -> jax.Array:
    """Dispatch, experts and combine, one after the other."""
    d_model = x_BLD.shape[-1]
    x_TD = x_BLD.reshape(-1, d_model)
    x_RD = dispatch(x_TD, plan)
    if choice.input_weights_BLK is not None:
        input_weights_TK = _by_token(choice.input_weights_BLK, plan)
        x_RD = _weigh_rows(x_RD, input_weights_TK, plan)
    y_RD = apply_experts(x_RD, weights, matmul, plan.expert_R)
    weights_TK = _by_token(choice.weights_BLK, plan)
    y_TD = combine(y_RD, weights_TK, plan)
    return y_TD.reshape(x_BLD.shape)


def _by_token(weights_BLK: jax.Array, plan: Plan) -> jax.Array:
    """Returns the weights with one axis of tokens."""
    return weights_BLK.reshape(plan.row_TK.shape)


def _weigh_rows(x_RD: jax.Array, weights_TK: jax.Array, plan: Plan) -> jax.Array:
    """Multiplies each row by the weight of its choice, in float32."""
    weight_R = dispatch_weights(weights_TK, plan)
    weight_R1 = weight_R[:, None]
    weighted_RD = weight_R1 * x_RD.astype(jnp.float32)
    return weighted_RD.astype(x_RD.dtype)


def _equal_groups_matmul(num_experts: int) -> Matmul:
    """Returns the product of rows, the same number for every expert, with the experts' matrices."""

    def matmul(x_RP: jax.Array, w_EPQ: jax.Array) -> jax.Array:
        num_rows, width = x_RP.shape
        x_ECP = x_RP.reshape(num_experts, -1, width)
        y_ECQ = jnp.einsum("ECP,EPQ->ECQ", x_ECP, w_EPQ)
        return y_ECQ.reshape(num_rows, -1)

    return matmul
