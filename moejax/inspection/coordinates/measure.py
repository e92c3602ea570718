"""What is measured of a model: activations of a fixed batch at several places."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.data import Batch
from moejax.models import Decoder
from moejax.models.blocks import Block, Context
from moejax.moe.token_info import TokenInfo

PLACES = ("embedding", "attention", "feed_forward", "router", "residual", "logits")
"""Where activations are measured: those of layers at all layers together.

`router` are the logits of the experts; a dense model has none.
"""


def activations_of(model: Decoder, batch: Batch) -> dict[str, jax.Array]:
    """Returns activations by place, those of all layers in one array with an axis of layers.

    Args:
      model: whose layers are plain blocks.
      batch: packed rows.
    """
    info = TokenInfo(batch.segments_BL > 0, batch.tokens_BL, batch.positions_BL)
    context = Context(batch.positions_BL, batch.segments_BL, info)
    x_BLD = model.embed(batch.tokens_BL)
    found: dict[str, list[jax.Array]] = {place: [] for place in PLACES}
    found["embedding"].append(x_BLD)
    for block, block_context in model.walk(context):
        if not isinstance(block, Block) or block_context is None:
            raise TypeError("coordinates are measured of plain layers; use model.shortcut=False")
        mixed_BLD, _ = block.mix(x_BLD, block_context)
        residual_BLD = block.add_mixed(x_BLD, mixed_BLD)
        inputs_BLD = block.ffn_inputs(x_BLD, residual_BLD)
        x_BLD, _ = block.add_ffn(residual_BLD, inputs_BLD, block_context)
        found["attention"].append(mixed_BLD)
        found["feed_forward"].append((x_BLD - residual_BLD) / block.residual_multiplier)
        if block.is_moe and block.moe.router is not None:
            found["router"].append(block.moe.router(inputs_BLD).logits_BLE)
    found["residual"].append(x_BLD)
    found["logits"].append(model.unembed(x_BLD)[..., : model.config.num_token_ids])
    return {place: jnp.stack(arrays) for place, arrays in found.items() if arrays}


def measure(
    graphdef: nnx.GraphDef, params: Any, router_state: Any, batch: Batch
) -> dict[str, np.ndarray]:
    """Returns `activations_of` a model that is split, on the host."""

    @jax.jit
    def measured(params: Any, router_state: Any) -> dict[str, jax.Array]:
        return activations_of(nnx.merge(graphdef, params, router_state), batch)

    return jax.device_get(measured(params, router_state))


def sizes_of(activations: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the root mean square of the activations of each place."""
    return {place: _rms(array) for place, array in activations.items()}


def changes_of(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns the root mean square of what steps changed in the activations of each place."""
    return {place: _rms(after[place] - before[place]) for place in before}


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array, dtype=np.float64).mean()))
