"""Expert weights as a device needs them: gathered over `fsdp`, and over the axes of experts."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES


def gather_over_fsdp(weights: ExpertWeights) -> ExpertWeights:
    """Returns all of each expert's parts over `fsdp`; the transpose is a reduce-scatter."""
    bias_ED = weights.down_bias_ED
    return dataclasses.replace(
        weights,
        gate_up_EDPF=_gather_axis(weights.gate_up_EDPF, 1),
        down_EFD=_gather_axis(weights.down_EFD, 2),
        down_bias_ED=None if bias_ED is None else _gather_axis(bias_ED, 1),
    )


def gather_over_experts(weights: ExpertWeights) -> ExpertWeights:
    """Returns the weights of all experts; the transpose is a reduce-scatter."""
    if jax.lax.axis_size(EXPERT_AXES) == 1:
        return weights
    return jax.tree.map(
        lambda w_eX: jax.lax.all_gather(w_eX, EXPERT_AXES, axis=0, tiled=True), weights
    )


def add_bias_once(weights: ExpertWeights) -> ExpertWeights:
    """Keeps the output's bias on one of the devices whose partial outputs are summed.

    The others get zeros.
    """
    if not weights.network.has_bias:
        return weights
    is_first = jax.lax.axis_index("tensor") == 0
    return dataclasses.replace(weights, down_bias_ED=jnp.where(is_first, weights.down_bias_ED, 0))


def _gather_axis(w_eX: jax.Array, axis: int) -> jax.Array:
    if jax.lax.axis_size("fsdp") == 1:
        return w_eX
    # Gate and up are side by side, as the product wants them. XLA:TPU changes the layout of what it
    # gathers, which is less work for parts; it reduce-scatters gradients of three axes, where it
    # all-reduces those of four; nor does it like a first axis of one.
    flat = w_eX.reshape(*w_eX.shape[:2], -1) if w_eX.ndim == 4 else w_eX
    if w_eX.shape[0] == 1:
        flat = jax.lax.all_gather(flat[0], "fsdp", axis=axis - 1, tiled=True)[None]
    else:
        flat = jax.lax.all_gather(flat, "fsdp", axis=axis, tiled=True)
    return flat.reshape(*flat.shape[:2], *w_eX.shape[2:]) if w_eX.ndim == 4 else flat
