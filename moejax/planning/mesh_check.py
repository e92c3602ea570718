"""One tiny batch through the exchange of a configuration, on its mesh, compared with one device that has all experts.

Widths are as small as the mesh allows; experts, choices, strategy, buffers and chunks are those of
the configuration.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
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
"""Of each device."""

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
    """What was found.

    Attributes:
      strategy: of the exchange; what "auto" stands for.
      shapes: of a device's part of each array.
      collectives: rows of `collective_rows`, of a pass forward and backward.
      worst: largest difference from one device over the largest value, by load and array.
    """

    strategy: str
    shapes: dict[str, tuple[int, ...]]
    collectives: list[dict[str, Any]]
    worst: dict[tuple[str, str], float]


def check_mesh(config: Config, mesh: Mesh) -> MeshCheck:
    """Runs outputs and all gradients on the mesh and on one device, for an even load and for one that overflows.

    Args:
      config: of a model with experts.
      mesh: from `make_mesh(config)`; every process of it calls this.
    """
    moe = config.moe
    top_k = 0 if moe.router in ("expert_choice", "soft") else moe.top_k
    how = Strategy(moe.exchange, moe.exchange_buffer, moe.exchange_chunks)
    slow, fast = (mesh.shape[axis] for axis in EXPERT_AXES)
    strategy = choose_strategy(how, slow, fast, moe.num_experts, top_k)
    how = dataclasses.replace(how, name=strategy)
    shardings = [NamedSharding(mesh, spec) for spec in SPECS]
    # Results lie as the arguments do: the output like the tokens, and a gradient like
    # what it is of.
    run = jax.jit(
        _layer(how, moe.grouped_matmul), out_shardings=tuple(shardings[i] for i in (0, 0, 1, 2, 3))
    )
    expect = jax.jit(_layer(how, "dense"))
    arrays = {load: _draw(config, mesh, load) for load in LOADS}
    placed = {
        load: [_place(a, sharding) for a, sharding in zip(arrays[load], shardings, strict=True)]
        for load in LOADS
    }
    worst = {}
    with jax.set_mesh(mesh):
        program = run.lower(*placed[LOADS[0]]).compile()
        actual = {load: program(*placed[load]) for load in LOADS}
    for load in LOADS:
        for name, a, e in zip(NAMES, actual[load], expect(*arrays[load]), strict=True):
            worst[load, name] = _difference(a, np.asarray(e))
    shapes = {
        name: a.sharding.shard_shape(a.shape)
        for name, a in zip(ARRAYS, placed[LOADS[0]], strict=True)
    }
    rows = collective_rows(list_collectives(program.as_text() or "", mesh))
    return MeshCheck(strategy, shapes, rows, worst)


def _layer(how: Strategy, implementation: str) -> Callable[..., tuple[jax.Array, ...]]:
    def run(x_BLD, weights_BLK, gate_up_EDPF, down_EFD, experts_BLK, dy_BLD):
        def forward(x_BLD, weights_BLK, gate_up_EDPF, down_EFD):
            local = LocalExperts(
                functools.partial(run_dropless, implementation=implementation),
                can_check_vma(implementation),
            )
            chosen = TokenChoice(experts_BLK, weights_BLK)
            return exchange(
                how, local, local, x_BLD, chosen, ExpertWeights(gate_up_EDPF, down_EFD)
            )[0]

        y_BLD, pull = jax.vjp(forward, x_BLD, weights_BLK, gate_up_EDPF, down_EFD)
        return y_BLD, *pull(dy_BLD)

    return run


def _draw(config: Config, mesh: Mesh, load: str) -> list[np.ndarray]:
    """A sequence, or a part of one, for each device: `ARRAYS`, the same on all processes."""
    moe, rng = config.moe, np.random.default_rng(0)
    batch, length = (
        math.prod(mesh.shape[axis] for axis in BATCH_AXES),
        TOKENS_OF_CHUNK * moe.exchange_chunks * mesh.shape["context"],
    )
    d_model, width = 8 * mesh.shape["fsdp"], 8 * mesh.shape["tensor"]
    # Whatever is drawn, the experts of a token differ; "on one expert" has the first one
    # among them all.
    scores_BLE = rng.random((batch, length, moe.num_experts)) + (load != LOADS[0]) * (
        np.arange(moe.num_experts) == 0
    )
    experts_BLK = np.argsort(-scores_BLE, axis=-1)[..., : moe.top_k].astype(np.int32)
    sizes = [
        (batch, length, d_model), experts_BLK.shape, (moe.num_experts, d_model, 2, width),
        (moe.num_experts, width, d_model),
    ]  # fmt: skip
    arrays = [rng.normal(size=size).astype(np.float32) for size in sizes]
    return [*arrays, experts_BLK, rng.normal(size=sizes[0]).astype(np.float32)]


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _difference(actual: jax.Array, expected: np.ndarray) -> float:
    """Of the parts on this process's devices, over the largest value; NaN stays NaN."""
    parts = [
        np.abs(np.asarray(shard.data) - expected[shard.index]).max()
        for shard in actual.addressable_shards
    ]
    return float(np.max(parts) / max(np.abs(expected).max(), 1e-30))
