"""Checks expert parallelism of a configuration on its mesh against one device with all experts.

A tiny batch goes through the experts in both ways. Widths are as small as the mesh allows; experts,
choices, strategy, buffers and chunks are those of the configuration.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moejax.config import Config
from moejax.kernels.grouped_matmul import can_check_vma
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.on_device import run_dropless
from moejax.moe.expert_parallel.exchange import exchange
from moejax.moe.expert_parallel.strategy import LocalExperts, Strategy, choose_strategy
from moejax.moe.experts.experts import ExpertWeights
from moejax.planning.hlo.collectives import collective_rows, list_collectives
from moejax.sharding import BATCH_AXES, EXPERT_AXES, TOKENS, partition_spec

TOKENS_OF_CHUNK = 32
"""Tokens of a device in each chunk."""

ARRAYS = ("tokens", "combine weights", "gate and up", "down", "choices", "gradient of the output")
SPECS = (
    TOKENS,
    TOKENS,
    partition_spec(("experts", "embed", "gate_up", "mlp")),
    partition_spec(("experts", "mlp", "embed")),
    TOKENS,
    TOKENS,
)
NAMES = (
    "output",
    "gradient of tokens",
    "gradient of weights",
    "gradient of gate and up",
    "gradient of down",
)
LOADS = ("even", "on one expert")


@dataclasses.dataclass(frozen=True)
class MeshCheck:
    """What a check found.

    Attributes:
      strategy: of expert parallelism; what "auto" stands for.
      shapes: of a device's part of each array.
      collectives: rows of `collective_rows`, of a forward and a backward pass.
      worst: largest difference from one device over the largest value, by load and array.
    """

    strategy: str
    shapes: dict[str, tuple[int, ...]]
    collectives: list[dict[str, Any]]
    worst: dict[tuple[str, str], float]


def check_mesh(config: Config, mesh: Mesh) -> MeshCheck:
    """Computes outputs and all gradients on the mesh and on one device, and compares them.

    The load is even once, and overflows buffers the other time.

    Args:
      config: of a model with experts.
      mesh: from `make_mesh(config)`; every process of it calls this.
    """
    how = _strategy(config, mesh)
    shardings = [NamedSharding(mesh, spec) for spec in SPECS]
    # The output is sharded like the tokens, and a gradient like the array that it is of.
    out_shardings = (shardings[0], *shardings[:4])
    layer = _layer(how, config.moe.grouped_matmul)
    run = jax.jit(layer, out_shardings=out_shardings)
    arrays = {load: _draw(config, mesh, load) for load in LOADS}
    placed = {load: _place(arrays[load], shardings) for load in LOADS}
    even = placed[LOADS[0]]
    with jax.set_mesh(mesh):
        program = run.lower(*even).compile()
        actual = {load: program(*placed[load]) for load in LOADS}
    collectives = list_collectives(program.as_text() or "", mesh)
    expect = jax.jit(_layer(how, "dense"))
    worst = {}
    for load in LOADS:
        expected = expect(*arrays[load])
        differences = _differences(actual[load], expected)
        for name, difference in differences.items():
            worst[load, name] = difference
    return MeshCheck(
        strategy=how.name,
        shapes=_local_shapes(even),
        collectives=collective_rows(collectives),
        worst=worst,
    )


def _strategy(config: Config, mesh: Mesh) -> Strategy:
    """Returns how tokens and experts meet, with the name that it comes to on this mesh."""
    moe = config.moe
    top_k = 0 if moe.router in ("expert_choice", "soft") else moe.top_k
    how = Strategy(moe.exchange, moe.exchange_buffer, moe.exchange_chunks)
    num_groups, group_size = (mesh.shape[axis] for axis in EXPERT_AXES)
    name = choose_strategy(how, num_groups, group_size, moe.num_experts, top_k)
    return dataclasses.replace(how, name=name)


def _layer(how: Strategy, implementation: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function of `ARRAYS` that gives what `NAMES` lists."""
    run_experts = functools.partial(run_dropless, implementation=implementation)

    def run(x_BLD, weights_BLK, gate_up_EDPF, down_EFD, experts_BLK, dy_BLD):
        def forward(x_BLD, weights_BLK, gate_up_EDPF, down_EFD):
            local = LocalExperts(run_experts, can_check_vma(implementation))
            chosen = TokenChoice(experts_BLK, weights_BLK)
            weights = ExpertWeights(gate_up_EDPF, down_EFD)
            y_BLD, _ = exchange(how, local, local, x_BLD, chosen, weights)
            return y_BLD

        y_BLD, pull = jax.vjp(forward, x_BLD, weights_BLK, gate_up_EDPF, down_EFD)
        return y_BLD, *pull(dy_BLD)

    return run


def _draw(config: Config, mesh: Mesh, load: str) -> list[np.ndarray]:
    """Returns `ARRAYS` with a sequence, or a part of one, for each device.

    They are the same on all processes.
    """
    moe = config.moe
    rng = np.random.default_rng(0)
    batch = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    length = TOKENS_OF_CHUNK * moe.exchange_chunks * mesh.shape["context"]
    d_model = 8 * mesh.shape["fsdp"]
    width = 8 * mesh.shape["tensor"]
    # The experts of a token differ in any case; "on one expert" has the first one for every token.
    scores_BLE = rng.random((batch, length, moe.num_experts))
    if load != LOADS[0]:
        scores_BLE[..., 0] += 1
    ranking_BLE = np.argsort(-scores_BLE, axis=-1)
    experts_BLK = ranking_BLE[..., : moe.top_k]
    experts_BLK = experts_BLK.astype(np.int32)

    def normal(*sizes: int) -> np.ndarray:
        values = rng.normal(size=sizes)
        return values.astype(np.float32)

    # Drawn in this order, which all processes share.
    x_BLD = normal(batch, length, d_model)
    weights_BLK = normal(*experts_BLK.shape)
    gate_up_EDPF = normal(moe.num_experts, d_model, 2, width)
    down_EFD = normal(moe.num_experts, width, d_model)
    dy_BLD = normal(batch, length, d_model)
    return [x_BLD, weights_BLK, gate_up_EDPF, down_EFD, experts_BLK, dy_BLD]


def _place(arrays: list[np.ndarray], shardings: list[NamedSharding]) -> list[jax.Array]:
    """Returns the arrays on the devices of this process, each with its own parts."""
    return list(map(_place_array, arrays, shardings))


def _place_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns an array with its parts on the devices of this process."""
    part_of_device = array.__getitem__
    return jax.make_array_from_callback(array.shape, sharding, part_of_device)


def _local_shapes(placed: list[jax.Array]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of a device's part of each array, by name."""
    named = zip(ARRAYS, placed, strict=True)
    return {name: array.sharding.shard_shape(array.shape) for name, array in named}


def _differences(actual: Iterable[jax.Array], expected: Iterable[jax.Array]) -> dict[str, float]:
    """Returns the largest difference of each array over its largest value, by name."""
    named = zip(NAMES, actual, expected, strict=True)
    return {name: _difference(on_mesh, np.asarray(alone)) for name, on_mesh, alone in named}


def _difference(actual: jax.Array, expected: np.ndarray) -> float:
    """Returns the largest difference over the largest value; NaN stays NaN.

    Only the parts on this process's devices are compared.
    """
    worst_of_parts = []
    for shard in actual.addressable_shards:
        found = np.asarray(shard.data)
        difference = np.abs(found - expected[shard.index])
        worst_of_parts.append(difference.max())
    largest = np.abs(expected).max()
    worst = np.max(worst_of_parts)
    return float(worst / max(largest, 1e-30))
