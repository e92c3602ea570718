"""Experts of a model in other places, some of them several times."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from moejax.models.blocks import Block, InterleavedBlock
from moejax.models.decoder import Decoder
from moejax.moe.expert_parallel.placement import PlacementError, Replicas
from moejax.moe.experts.experts import Experts
from moejax.moe.overrides import RoutingOverrides


def place_experts(
    model: Decoder, experts_NP: Int[np.ndarray, "N P"]
) -> tuple[Decoder, RoutingOverrides]:
    """Returns a copy of a model with its experts in slots, and the overrides that go with it.

    The model given stays as it is. Arrays that do not change are shared. Not for training.

    Args:
      model: whose experts are where they were trained.
      experts_NP: the expert in each slot of each MoE layer, from `placement.place`.

    Raises:
      PlacementError: another number of layers, or an expert without a slot; a router that does not
        send tokens, or a model that was placed already.
    """
    config = model.config
    if len(experts_NP) != config.num_moe_layers:
        raise PlacementError(
            f"{len(experts_NP)} layers are placed, and the model has {config.num_moe_layers}"
        )
    routers = {kind.router for kind in config.moe_groups}
    if routers & {"expert_choice", "soft"}:
        raise PlacementError("experts that choose tokens cannot have replicas or other places")
    replicas = Replicas.from_placement(experts_NP, config.moe.num_experts)
    placed = nnx.merge(*nnx.split(model))
    first = 0
    for block, num in _moe_blocks(placed):
        end = first + num
        moe = block.moe
        moe.experts = _in_slots(moe.experts, experts_NP[first:end])
        first = end
    return placed, RoutingOverrides(placement=replicas)


def _moe_blocks(model: Decoder) -> Iterator[tuple[Block, int]]:
    """Yields the MoE block of each stack that has one, and how many layers it stands for."""
    for stack in model.stacks:
        block: Any = stack.block
        if isinstance(block, InterleavedBlock):
            block = block.moe_block
        if block.is_moe:
            yield block, stack.num


def _in_slots(experts: Experts, experts_NP: Int[np.ndarray, "N P"]) -> Experts:
    """Returns the weights of the expert in each slot; those given have an axis of N layers."""
    if experts.are_placed:
        raise PlacementError(
            "the experts of this model are in the slots of a placement already; place those of the "
            "model as it was loaded"
        )

    take_of_layer = jax.vmap(jnp.take, in_axes=(0, 0, None))

    def place_variable(variable_NE):
        weights_NP = take_of_layer(variable_NE[...], experts_NP, 0)
        layers, _, *axes = variable_NE.axes
        return variable_NE.replace(weights_NP, axes=(layers, "slots", *axes))

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    graphdef, state = nnx.split(experts)
    placed = jax.tree.map(place_variable, state, is_leaf=is_variable)
    return nnx.merge(graphdef, placed)
