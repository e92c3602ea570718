"""Runs a model layer by layer, with some of its MoE layers edited.

Layers before the first edited one are run once for all interventions. Interventions that are one
program with other arrays, such as other blocked experts, are stacked and run in one call, by
`jax.vmap` where that is fast, and compile nothing again.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from moejax.data import Batch
from moejax.inspection.counterfactuals.interventions import LayerEdit
from moejax.inspection.counterfactuals.result import CounterfactualError
from moejax.kernels.device import platform
from moejax.models import Decoder
from moejax.models.blocks import Block, Context
from moejax.moe.balancing.stats import RoutingStats
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

    Args:
      model: whose experts are where they were trained.
      at_once: whether stacked interventions are computed at once, by `jax.vmap`, or in turn. None:
        in turn on CPUs, where attention takes almost three times as long with a further axis.
    """

    def __init__(self, model: Decoder, at_once: bool | None = None):
        self.at_once = platform() != "cpu" if at_once is None else at_once
        self.config = model.config
        self.model = nnx.split(model)
        blocks: list[Block] = [block for block, _ in model.walk()]
        self.blocks = [nnx.split(block) for block in blocks]
        self.places = [index for index, block in enumerate(blocks) if block.is_moe]
        self.moes: list[MoE] = [blocks[index].moe for index in self.places]
        if any(moe.experts.are_placed for moe in self.moes):
            raise CounterfactualError(
                "experts of this model were placed elsewhere; load the run again"
            )

    def run(self, batch: Batch) -> Passed:
        """Runs a batch as trained."""
        residuals = self.begin(batch)
        nats_B = _count_nats(*self.model, residuals.before[-1], batch)
        return Passed(*jax.device_get((nats_B, residuals.traffic)))

    def begin(self, batch: Batch) -> Residuals:
        """Runs a batch as trained, and keeps the residual stream before every layer."""
        x_BLD, context = _embed(*self.model, batch)
        before = [x_BLD]
        traffic_by_layer = {}
        for index in range(len(self.blocks)):
            x_1BLD, traffic_1 = self._apply(index, x_BLD[None], LayerEdit(), context)
            x_BLD = x_1BLD[0]
            before.append(x_BLD)
            if traffic_1 is not None:
                traffic_by_layer[self.places.index(index)] = _take(traffic_1, 0)
        return Residuals(context, before, traffic_by_layer)

    def run_edited(
        self, batch: Batch, residuals: Residuals, edits: Mapping[int, LayerEdit], num: int
    ) -> list[Passed]:
        """Runs a batch from the first edited layer on, once for each of `num` interventions.

        Args:
          batch: as in `begin`.
          residuals: what `begin` returned for it.
          edits: by MoE layer, counted from 0; every array has a leading axis of interventions.
          num: how many interventions.
        """
        edits_by_block = {self.places[layer]: edit for layer, edit in edits.items()}
        first = min(edits_by_block)
        x_BLD = residuals.before[first]
        x_IBLD = jnp.broadcast_to(x_BLD[None], (num, *x_BLD.shape))
        traffic_by_layer = {}
        for index in range(first, len(self.blocks)):
            edit = edits_by_block.get(index, LayerEdit())
            x_IBLD, traffic_I = self._apply(index, x_IBLD, edit, residuals.context)
            if index in edits_by_block:
                traffic_by_layer[self.places.index(index)] = traffic_I
        # One after the other, for the logits of all would take too much memory.
        nats = [_count_nats(*self.model, x_BLD, batch) for x_BLD in x_IBLD]
        nats, traffic_by_layer = jax.device_get((nats, traffic_by_layer))
        return [Passed(nats_B, _take(traffic_by_layer, i)) for i, nats_B in enumerate(nats)]

    def _apply(
        self, index: int, x_IBLD: jax.Array, edits: LayerEdit, context: Context
    ) -> tuple[jax.Array, Traffic | None]:
        graphdef, state = self.blocks[index]
        return _apply(graphdef, self.at_once, state, x_IBLD, edits, context)


def _take(stacked: Any, i: int) -> Any:
    """Returns what belongs to one intervention."""
    return jax.tree.map(lambda array_I: array_I[i], stacked)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> tuple[jax.Array, Context]:
    info = TokenInfo(jnp.asarray(batch.segments_BL) > 0, batch.tokens_BL, batch.positions_BL)
    context = Context(batch.positions_BL, batch.segments_BL, info)
    return nnx.merge(graphdef, state).embed(batch.tokens_BL), context


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
    graphdef: nnx.GraphDef,
    at_once: bool,
    state: nnx.State,
    x_IBLD: jax.Array,
    edits: LayerEdit,
    context: Context,
) -> tuple[jax.Array, Traffic | None]:
    """Applies a layer in I interventions.

    Args:
      graphdef: of the layer.
      at_once: whether by `jax.vmap`, or one after the other in one program.
      state: of the layer.
      x_IBLD: the residual stream of each intervention.
      edits: of the layer; arrays have a leading axis of interventions.
      context: what all share.

    Returns:
      The residual stream and, of a MoE layer, the traffic of each intervention.
    """

    def apply_one(x_BLD, edit):
        block = nnx.merge(graphdef, state)
        if block.is_moe:
            block.ffn = edit.apply(block.moe)
        info = dataclasses.replace(context.info, overrides=edit.overrides)
        x_BLD, stats, _ = block(x_BLD, dataclasses.replace(context, info=info))
        return x_BLD, None if stats is None else _traffic(stats)

    if at_once and x_IBLD.shape[0] > 1:
        return jax.vmap(apply_one)(x_IBLD, edits)
    return jax.lax.map(lambda one: apply_one(*one), (x_IBLD, edits))


def _traffic(stats: RoutingStats) -> Traffic:
    return Traffic(
        num_tokens=stats.num_tokens,
        num_choices=stats.assignments_E.sum(),
        dropped=stats.dropped,
        gate_mass=stats.gate_mass,
        load_E=stats.assignments_E,
    )


@functools.partial(jax.jit, static_argnums=0)
def _count_nats(
    graphdef: nnx.GraphDef, state: nnx.State, x_BLD: jax.Array, batch: Batch
) -> jax.Array:
    model = nnx.merge(graphdef, state)
    nats_BL, _ = model.cross_entropy(model.final_norm(x_BLD), batch.targets_BL)
    return jnp.where(batch.loss_mask_BL, nats_BL, 0.0).sum(axis=1)
