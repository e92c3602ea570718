"""Weights of a model's experts, and what each of them makes of the same tokens: inputs of `expert_similarity`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from moejax.inspection.analysis.expert_profile import ProfileError
from moejax.kernels.matmul import dense
from moejax.models.blocks import Block, Context
from moejax.models.decoder import Decoder
from moejax.moe.experts.experts import apply_experts
from moejax.moe.layer import MoE
from moejax.moe.token_info import TokenInfo
from moejax.sharding import gather_fsdp

PROJECTIONS = ("gate", "up")


def expert_weights(model: Decoder) -> dict[str, Float[np.ndarray, "N E ..."]]:
    """Weights of the experts of all MoE layers, by name.

    Args:
      model: a decoder whose experts are in order, as loaded: `Decoder.place_experts`
        was not called.

    Returns:
      "up" and, with a gate, "gate" `[N, E, D, F]`, "down" `[N, E, F, D]`; with biases "up_bias" and
      "gate_bias" `[N, E, F]`, "down_bias" `[N, E, D]`. D is the latent width if the experts have
      one. Shared and free experts have no part in it.

    Raises:
      ProfileError: no MoE layer, or `moe.per_layer` gives layers experts of other shapes.
    """
    layers = _some([_weights_of(block.moe) for block, _ in model.walk() if block.is_moe])
    shapes = [{name: array.shape[1:] for name, array in layer.items()} for layer in layers]
    if any(of_layer != shapes[0] for of_layer in shapes):
        raise ProfileError(
            f"moe.per_layer={model.config.moe.per_layer!r} gives MoE layers experts of different shapes, {shapes}; "
            "use a model whose experts are alike"
        )
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def _weights_of(moe: MoE) -> dict[str, np.ndarray]:
    experts = moe.experts
    names = PROJECTIONS[-experts.network.num_projections :]
    arrays = {name: experts.gate_up[...][:, :, i] for i, name in enumerate(names)} | {
        "down": experts.down[...]
    }
    if experts.network.has_bias:
        arrays |= {f"{name}_bias": experts.gate_up_bias[...][:, i] for i, name in enumerate(names)}
        arrays["down_bias"] = experts.down_bias[...]
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def expert_outputs(
    model: Decoder, tokens_BL: Int[np.ndarray, "B L"]
) -> Float32[np.ndarray, "N E T D"]:
    """What every expert of every MoE layer returns for the same tokens, whether or not they would visit it.

    The inputs are those of the layer in a pass over the tokens, the normed residual stream, and
    outputs come without combine weight. Runs layer by layer, and gives N E T D numbers: meant for
    some hundred tokens.

    Args:
      model: as for `expert_weights`.
      tokens_BL: each row is one document, without padding.

    Returns:
      Outputs of the experts with weights, T = B * L in the order of rows.

    Raises:
      ProfileError: no MoE layer.
    """
    ids_BL = jnp.asarray(tokens_BL, jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(ids_BL.shape[1], dtype=jnp.int32), ids_BL.shape)
    ones_BL = jnp.ones_like(ids_BL)
    context = Context(positions_BL, ones_BL, TokenInfo(ones_BL > 0, ids_BL, positions_BL))
    run = jax.jit(
        lambda graphdef, state, x_BLD, own: _run(nnx.merge(graphdef, state), x_BLD, own),
        static_argnums=0,
    )
    x_BLD, outputs = model.embed(ids_BL), []
    for block, own in model.walk(context):
        x_BLD, outputs_ETD = run(*nnx.split(block), x_BLD, own)
        outputs += [] if outputs_ETD is None else [np.asarray(outputs_ETD)]
    return np.stack(_some(outputs))


def _run(block: Block, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array | None]:
    """One layer: the residual stream behind it, and the outputs of its experts."""
    next_BLD, _, _ = block(x_BLD, context)
    if not block.is_moe:
        return next_BLD, None
    y_BLD, _ = block.attention(
        block.attention_norm(x_BLD), context.positions_BL, context.segments_BL, None
    )
    return next_BLD, _outputs(block.moe, block.ffn_norm(x_BLD + y_BLD))


def _outputs(moe: MoE, x_BLD: Float[Array, "B L D"]) -> Float32[Array, "E T D"]:
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    if moe.config.d_latent:
        x_TD = dense(x_TD, gather_fsdp(moe.into_latent, x_TD.dtype))
    alone_T = jnp.zeros(len(x_TD), jnp.int32)

    def of_expert(weights):
        of_one = jax.tree.map(lambda w: w[None], weights)
        return apply_experts(x_TD, of_one, lambda x_RP, w_1PQ: x_RP @ w_1PQ[0], alone_T)

    y_ETD = jax.lax.map(
        of_expert, moe.experts.weights()
    )  # one after the other: hidden units take memory
    if moe.config.d_latent:
        y_ETD = dense(y_ETD, gather_fsdp(moe.out_of_latent, y_ETD.dtype))
    return y_ETD.astype(jnp.float32)


def _some(layers: list) -> list:
    """The same, if there are any."""
    if not layers:
        raise ProfileError(
            "the model has no MoE layer, and so no experts to look at; use one with moe.num_experts > 0"
        )
    return layers
