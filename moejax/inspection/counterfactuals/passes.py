"""Runs a model layer by layer, with some of its MoE layers edited.

Layers before the first edited one are run once for all interventions. An edited layer with other
weights or another blocked expert is the same program with other arguments, and compiles nothing
again.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from moejax.data import Batch
from moejax.inspection.counterfactuals.interventions import LayerEdit
from moejax.inspection.counterfactuals.result import CounterfactualError
from moejax.models import Decoder
from moejax.models.blocks import Block, Context
from moejax.moe.layer import MoE
from moejax.moe.token_info import TokenInfo


class Traffic(NamedTuple):
    """Sums over a batch's tokens in one MoE layer.

    Attributes:
      num_tokens: without padding.
      num_choices: experts that were chosen for them.
      dropped: choices that found no slot.
      gate_mass: sum of combine weights.
      load_E: choices by expert.
    """

    num_tokens: Any
    num_choices: Any
    dropped: Any
    gate_mass: Any
    load_E: Any


class Passed(NamedTuple):
    """A batch after a pass.

    Attributes:
      nats_B: cross-entropy of each row.
      traffic: of the edited MoE layers, all of them in a pass as trained.
    """

    nats_B: Float[np.ndarray, "B"]
    traffic: dict[int, Traffic]


class Residuals(NamedTuple):
    """A batch on its way through the layers as trained.

    Attributes:
      context: what all layers share.
      before: the residual stream before each layer, and after the last.
      traffic: of each MoE layer.
    """

    context: Context
    before: list[jax.Array]
    traffic: dict[int, Traffic]


class Parts:
    """A model in single layers, each of which can be edited.

    Holds a second copy of the layers' weights next to the model's own.
    """

    def __init__(self, model: Decoder):
        self.model = nnx.split(model)
        blocks: list[Block] = [block for block, _ in model.walk()]
        self.blocks = [nnx.split(block) for block in blocks]
        self.places = [index for index, block in enumerate(blocks) if block.is_moe]
        self.moes: list[MoE] = [blocks[index].moe for index in self.places]
        if any(moe.is_placed for moe in self.moes):
            raise CounterfactualError(
                "experts of this model were placed elsewhere; load the run again"
            )

    def run(self, batch: Batch) -> Passed:
        """Runs a batch as trained."""
        residuals = self.begin(batch)
        return self._end(batch, residuals.before[-1], residuals.traffic)

    def begin(self, batch: Batch) -> Residuals:
        """Runs a batch as trained, and keeps the residual stream before every layer."""
        x_BLD, context = _embed(*self.model, batch)
        before = [x_BLD]
        traffic_by_layer = {}
        for index, (graphdef, state) in enumerate(self.blocks):
            x_BLD, traffic = _apply(graphdef, state, x_BLD, context)
            before.append(x_BLD)
            if traffic is not None:
                traffic_by_layer[self.places.index(index)] = traffic
        return Residuals(context, before, traffic_by_layer)

    def run_edited(
        self, batch: Batch, residuals: Residuals, edits: Mapping[int, LayerEdit]
    ) -> Passed:
        """Runs a batch from the first edited layer on.

        Args:
          batch: as in `begin`.
          residuals: what `begin` returned for it.
          edits: by MoE layer, counted from 0.
        """
        edits_by_block = {self.places[layer]: edit for layer, edit in edits.items()}
        first = min(edits_by_block)
        x_BLD = residuals.before[first]
        traffic_by_layer = {}
        for index in range(first, len(self.blocks)):
            graphdef, state = self.blocks[index]
            edit = edits_by_block.get(index)
            if edit is not None:
                graphdef, state = _edit_block(graphdef, state, edit)
            x_BLD, traffic = _apply(graphdef, state, x_BLD, residuals.context)
            if edit is not None:
                traffic_by_layer[self.places.index(index)] = traffic
        return self._end(batch, x_BLD, traffic_by_layer)

    def _end(self, batch: Batch, x_BLD: jax.Array, traffic: dict[int, Traffic]) -> Passed:
        nats_B = _count_nats(*self.model, x_BLD, batch)
        return Passed(*jax.device_get((nats_B, traffic)))


def _edit_block(
    graphdef: nnx.GraphDef, state: nnx.State, edit: LayerEdit
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns a block, split, with its MoE layer edited."""
    block = nnx.merge(graphdef, state)
    block.moe = edit(block.moe)
    return nnx.split(block)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> tuple[jax.Array, Context]:
    info = TokenInfo(jnp.asarray(batch.segments_BL) > 0, batch.tokens_BL, batch.positions_BL)
    context = Context(batch.positions_BL, batch.segments_BL, info)
    return nnx.merge(graphdef, state).embed(batch.tokens_BL), context


@functools.partial(jax.jit, static_argnums=0)
def _apply(
    graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, context: Context
) -> tuple[jax.Array, Traffic | None]:
    x_BLD, stats, _ = nnx.merge(graphdef, state)(x_BLD, context)
    if stats is None:
        return x_BLD, None
    traffic = Traffic(
        num_tokens=stats.num_tokens,
        num_choices=stats.assignments_E.sum(),
        dropped=stats.dropped,
        gate_mass=stats.gate_mass,
        load_E=stats.assignments_E,
    )
    return x_BLD, traffic


@functools.partial(jax.jit, static_argnums=0)
def _count_nats(
    graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, batch: Batch
) -> jax.Array:
    logits_BLV = nnx.merge(graphdef, state).unembed(x_BLD)
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
    return jnp.where(batch.loss_mask_BL, nats_BL, 0.0).sum(axis=1)
