"""Runs a model layer by layer, with some of its MoE layers edited.

Layers before the first edited one are run once for all interventions. Interventions that are one
program with other arrays, such as other blocked experts, are run together by `jax.vmap`, and
compile nothing again.
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
    """

    def __init__(self, model: Decoder):
        self.config = model.config.model
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
        nats_1B = _count_nats(*self.model, residuals.before[-1][None], batch)
        return Passed(*jax.device_get((nats_1B[0], residuals.traffic)))

    def begin(self, batch: Batch) -> Residuals:
        """Runs a batch as trained, and keeps the residual stream before every layer."""
        x_BLD, context = _embed(*self.model, batch)
        before = [x_BLD]
        traffic_by_layer = {}
        for index, (graphdef, state) in enumerate(self.blocks):
            x_1BLD, traffic_1 = _apply(graphdef, 1, state, x_BLD, LayerEdit(), context)
            x_BLD = x_1BLD[0]
            before.append(x_BLD)
            if traffic_1 is not None:
                traffic = jax.tree.map(lambda sum_1: sum_1[0], traffic_1)
                traffic_by_layer[self.places.index(index)] = traffic
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
        x = residuals.before[first]
        traffic_by_layer = {}
        for index in range(first, len(self.blocks)):
            graphdef, state = self.blocks[index]
            edit = edits_by_block.get(index)
            x, traffic_I = _apply(graphdef, num, state, x, edit or LayerEdit(), residuals.context)
            if num == 1:  # without the axis it is the program of a layer as trained
                x = x[0]
            if edit is not None:
                traffic_by_layer[self.places.index(index)] = traffic_I
        x_IBLD = x[None] if num == 1 else x
        nats_IB = _count_nats(*self.model, x_IBLD, batch)
        stacked = Passed(*jax.device_get((nats_IB, traffic_by_layer)))
        return [_take(stacked, i) for i in range(num)]


def _take(stacked: Passed, i: int) -> Passed:
    """Returns the pass of one intervention."""
    return jax.tree.map(lambda array_I: array_I[i], stacked)


@functools.partial(jax.jit, static_argnums=0)
def _embed(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> tuple[jax.Array, Context]:
    info = TokenInfo(jnp.asarray(batch.segments_BL) > 0, batch.tokens_BL, batch.positions_BL)
    context = Context(batch.positions_BL, batch.segments_BL, info)
    return nnx.merge(graphdef, state).embed(batch.tokens_BL), context


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
    graphdef: nnx.GraphDef,
    num: int,
    state: nnx.State,
    x: jax.Array,
    edits: LayerEdit,
    context: Context,
) -> tuple[jax.Array, Traffic | None]:
    """Applies a layer in `num` interventions.

    Args:
      graphdef: of the layer.
      num: how many interventions, I.
      state: of the layer.
      x: the residual stream of each, `[I, B, L, D]`, or the one that they share, `[B, L, D]`.
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

    x_axis = None if x.ndim == 3 else 0
    return jax.vmap(apply_one, in_axes=(x_axis, 0), axis_size=num)(x, edits)


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
    graphdef: nnx.GraphDef, state: nnx.State, x_IBLD: jax.Array, batch: Batch
) -> jax.Array:
    """Returns the cross-entropy of each row in each intervention, `[I, B]`."""
    model = nnx.merge(graphdef, state)

    def count_one(x_BLD):
        nats_BL = model.cross_entropy(model.final_norm(x_BLD), batch.targets_BL)
        return jnp.where(batch.loss_mask_BL, nats_BL, 0.0).sum(axis=1)

    # One after the other, for the logits of all would take more memory.
    return jax.lax.map(count_one, x_IBLD)
