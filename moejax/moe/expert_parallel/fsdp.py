"""Expert weights as a device needs them: gathered over `fsdp`, and over the axes of experts."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES


def gather_over_fsdp(weights: ExpertWeights) -> ExpertWeights:
    """Returns all of each expert's parts over `fsdp`; the transpose is a reduce-scatter."""
    whole = dataclasses.replace(
        weights,
        gate_up_EDPF=_gather_projections(weights.gate_up_EDPF),
        down_EFD=_gather_axis(weights.down_EFD, 2),
    )
    if weights.down_bias_ED is None:
        return whole
    bias_ED = _gather_axis(weights.down_bias_ED, 1)
    return dataclasses.replace(whole, down_bias_ED=bias_ED)


def gather_over_experts(weights: ExpertWeights) -> ExpertWeights:
    """Returns the weights of all experts; the transpose is a reduce-scatter."""
    if jax.lax.axis_size(EXPERT_AXES) == 1:
        return weights

    def gather(w_eX: jax.Array) -> jax.Array:
        return jax.lax.all_gather(w_eX, EXPERT_AXES, axis=0, tiled=True)

    return jax.tree.map(gather, weights)


def add_bias_once(weights: ExpertWeights) -> ExpertWeights:
    """Keeps the output's bias on one of the devices whose partial outputs are summed.

    The others get zeros.
    """
    if not weights.network.has_bias:
        return weights
    is_first = jax.lax.axis_index("tensor") == 0
    bias_ED = jnp.where(is_first, weights.down_bias_ED, 0)
    return dataclasses.replace(weights, down_bias_ED=bias_ED)


def _gather_projections(gate_up_eDPF: jax.Array) -> jax.Array:
    """Gathers the projections in, whose axis D is split.

    Gate and up are side by side, as the product wants them. XLA:TPU changes the layout of what it
    gathers, which is less work for parts; it reduce-scatters gradients of three axes, where it
    all-reduces those of four.
    """
    if jax.lax.axis_size("fsdp") == 1:
        return gate_up_eDPF
    num_experts, d_part, num_projections, d_expert = gate_up_eDPF.shape
    gate_up_eDX = gate_up_eDPF.reshape(num_experts, d_part, -1)
    whole_eDX = _gather_axis(gate_up_eDX, 1)
    d_model = whole_eDX.shape[1]
    return whole_eDX.reshape(num_experts, d_model, num_projections, d_expert)


def _gather_axis(w_eX: jax.Array, axis: int) -> jax.Array:
    """Gathers one axis of an array, which is not the first."""
    if jax.lax.axis_size("fsdp") == 1:
        return w_eX
    num_experts = w_eX.shape[0]
    if num_experts > 1:
        return jax.lax.all_gather(w_eX, "fsdp", axis=axis, tiled=True)
    # XLA:TPU does not reduce-scatter a gradient whose first axis is one.
    w_X = w_eX[0]
    whole_X = jax.lax.all_gather(w_X, "fsdp", axis=axis - 1, tiled=True)
    return whole_X[None]
