"""Weights of a model's experts and their outputs for the same tokens, for `expert_similarity`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from moejax.inspection.analysis.expert_profile import ProfileError
from moejax.kernels.matmul import dense
from moejax.models.blocks import Block, Context
from moejax.models.decoder import Decoder
from moejax.models.shortcut_block import ShortcutBlock
from moejax.moe.experts.experts import apply_experts
from moejax.moe.layer import MoE
from moejax.moe.token_info import TokenInfo
from moejax.sharding import gather_fsdp

PROJECTIONS = ("gate", "up")


def expert_weights(model: Decoder) -> dict[str, Float[np.ndarray, "N E ..."]]:
    """Returns the weights of the experts of all MoE layers, by name.

    Args:
      model: a decoder whose experts are in order, as loaded, not from `place_experts`.

    Returns:
      "up" and, with a gate, "gate" `[N, E, D, F]`, "down" `[N, E, F, D]`; with biases "up_bias" and
      "gate_bias" `[N, E, F]`, "down_bias" `[N, E, D]`. D is the latent width if the experts have
      one. Shared and zero-computation experts are not included.

    Raises:
      ProfileError: no MoE layer, or `moe.per_layer` gives layers experts of other shapes.
    """
    moes = [block.moe for block, _ in model.walk() if block.is_moe]
    layers = _not_empty([_weights_of(moe) for moe in moes])
    shapes = [_shapes_of(layer) for layer in layers]
    if any(of_layer != shapes[0] for of_layer in shapes):
        raise ProfileError(
            f"moe.per_layer={model.config.moe.per_layer!r} gives MoE layers experts of different "
            f"shapes, {shapes}; use a model whose experts are alike"
        )
    stacked = {}
    for name in layers[0]:
        stacked[name] = np.stack([layer[name] for layer in layers])
    return stacked


def _shapes_of(layer: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of one expert's weights by name."""
    return {name: array_E.shape[1:] for name, array_E in layer.items()}


def _weights_of(moe: MoE) -> dict[str, np.ndarray]:
    experts = moe.experts
    names = PROJECTIONS[-experts.network.num_projections :]
    gate_up_EDPF = experts.gate_up[...]
    arrays = {name: gate_up_EDPF[:, :, i] for i, name in enumerate(names)}
    arrays["down"] = experts.down[...]
    if experts.network.has_bias:
        gate_up_bias_EPF = experts.gate_up_bias[...]
        for i, name in enumerate(names):
            arrays[f"{name}_bias"] = gate_up_bias_EPF[:, i]
        arrays["down_bias"] = experts.down_bias[...]
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def expert_outputs(
    model: Decoder,
    tokens_BL: Int[np.ndarray, "B L"],
) -> Float32[np.ndarray, "N E T D"]:
    """Returns the outputs of every expert of every MoE layer for the same tokens.

    Tokens need not be routed to the expert. The inputs are those of the layer in a pass over the
    tokens, the normed residual stream, and outputs come without combine weight. Runs layer by
    layer, and returns N E T D numbers: meant for some hundred tokens.

    Args:
      model: as for `expert_weights`.
      tokens_BL: each row is one document, without padding.

    Returns:
      Outputs of the experts with weights, T = B * L in the order of rows.

    Raises:
      ProfileError: no MoE layer.
    """
    ids_BL = jnp.asarray(tokens_BL, jnp.int32)
    positions_L = jnp.arange(ids_BL.shape[1], dtype=jnp.int32)
    positions_BL = jnp.broadcast_to(positions_L, ids_BL.shape)
    ones_BL = jnp.ones_like(ids_BL)
    context = Context(positions_BL, ones_BL, TokenInfo(ones_BL > 0, ids_BL, positions_BL))

    # Layers of one structure share a program: their weights are its arguments.
    @functools.partial(jax.jit, static_argnums=0)
    def run(graphdef, state, x_BLD, own):
        return _run(nnx.merge(graphdef, state), x_BLD, own)

    x_BLD = model.embed(ids_BL)
    outputs = []
    for block, own in model.walk(context):
        graphdef, state = nnx.split(block)
        x_BLD, outputs_ETD = run(graphdef, state, x_BLD, own)
        if outputs_ETD is not None:
            outputs.append(np.asarray(outputs_ETD))
    return np.stack(_not_empty(outputs))


def _run(
    block: Block | ShortcutBlock, x_BLD: jax.Array, context: Context
) -> tuple[jax.Array, jax.Array | None]:
    """Runs one layer.

    Returns:
      The residual stream after it, and the outputs of its experts, None in a dense layer.
    """
    next_BLD, _, _ = block(x_BLD, context)
    if not block.is_moe:
        return next_BLD, None
    mixed_BLD, _ = block.mix(x_BLD, context)
    residual_BLD = block.add_mixed(x_BLD, mixed_BLD)
    inputs_BLD = block.ffn_inputs(x_BLD, residual_BLD)
    return next_BLD, _outputs(block.moe, inputs_BLD)


def _outputs(moe: MoE, x_BLD: Float[Array, "B L D"]) -> Float32[Array, "E T D"]:
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    if moe.config.d_latent:
        x_TD = dense(x_TD, gather_fsdp(moe.latent_down, x_TD.dtype))
    group_T = jnp.zeros(len(x_TD), jnp.int32)  # all tokens belong to the only expert

    def of_expert(weights):
        alone = jax.tree.map(lambda w: w[None], weights)
        return apply_experts(x_TD, alone, lambda x_RP, w_1PQ: x_RP @ w_1PQ[0], group_T)

    # One expert after the other, for the hidden units of all would take too much memory.
    y_ETD = jax.lax.map(of_expert, moe.experts.weights())
    if moe.config.d_latent:
        y_ETD = dense(y_ETD, gather_fsdp(moe.latent_up, y_ETD.dtype))
    return y_ETD.astype(jnp.float32)


def _not_empty(layers: list) -> list:
    """Returns the list, and raises if the model has no MoE layer."""
    if not layers:
        raise ProfileError(
            "the model has no MoE layer, and so no experts to look at; "
            "use one with moe.num_experts > 0"
        )
    return layers
