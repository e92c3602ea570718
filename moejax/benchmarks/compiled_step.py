"""Compiles the train step of a config for another machine, and says what it holds and sends.

Only shapes go in, so neither data nor a tokenizer is needed, and nothing is timed.
"""

import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.config import Config, Knobs
from moejax.data import Batch
from moejax.planning.hlo.collectives import collective_rows, list_collectives
from moejax.planning.targets import Target, TargetError, target_devices
from moejax.sharding import batch_sharding, make_mesh, replicated
from moejax.training.state import TrainSetup, make_train_setup
from moejax.training.step import make_train_step

FIGURES = (
    "peak_bytes",
    "argument_bytes",
    "temporary_bytes",
    "wire_bytes",
    "conditional_wire_bytes",
    "collectives",
)
"""What a row says of a step that compiles."""


def bench_compiled_step(config: Config, target: Target, topology: str) -> dict[str, Any]:
    """Compiles the train step.

    Args:
      config: the experiment; its mesh must fit the topology.
      target: the kind of device.
      topology: how many of them; see `target_devices`.

    Returns:
      A row that says whether the step fits the memory of a device, bytes that a device holds at
      most (`peak_bytes`), and bytes that it sends in a step (`wire_bytes`) with the collectives by
      kind and axis; None where the compiler refuses what does not fit.

    Raises:
      TargetError: the target's compiler is missing, or does not know the topology, or the mesh
        cannot be laid over it.
      ConfigError: the config does not fit the devices.
    """
    topology = topology or target.smallest
    mesh = _make_mesh(config, target, topology)
    row = {
        "target": target.name,
        "topology": topology,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "tokens_per_device": config.train.batch_size * config.data.seq_len // mesh.size,
    }
    started = time.perf_counter()
    try:
        compiled = lower_step(make_train_setup(config, mesh)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        logging.getLogger("moejax").warning("%s", str(error).splitlines()[0])
        return row | {"fits": False} | dict.fromkeys(FIGURES)
    row["compile_s"] = round(time.perf_counter() - started, 1)
    memory: Any = compiled.memory_analysis()
    collectives = collective_rows(list_collectives(compiled.as_text() or "", mesh))
    wire_bytes = sum(one["bytes"] for one in collectives)
    conditional_wire_bytes = sum(one["conditional_bytes"] for one in collectives)
    return row | {
        "fits": target.memory_bytes == 0 or memory.peak_memory_in_bytes <= target.memory_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "wire_bytes": wire_bytes,
        "conditional_wire_bytes": conditional_wire_bytes,
        "collectives": collectives,
    }


def _make_mesh(config: Config, target: Target, topology: str) -> Mesh:
    try:
        return make_mesh(config, target_devices(target, topology))
    except NotImplementedError as error:  # jax's own, for a mesh that no torus has
        raise TargetError(
            f"the mesh cannot be laid over topology {topology} of {target.name}: each of its axes "
            "must be a product of some of these sizes"
        ) from error


def lower_step(setup: TrainSetup) -> jax.stages.Lowered:
    """Lowers the train step of a run, for arrays that do not exist."""
    config, mesh = setup.config, setup.mesh

    def split(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    state = jax.tree.map(split, setup.abstract, setup.shardings)
    rows = (config.train.batch_size, config.data.seq_len)
    integers_BL = jax.ShapeDtypeStruct(rows, jnp.int32)
    batch = Batch(
        tokens_BL=integers_BL,
        targets_BL=integers_BL,
        segments_BL=integers_BL,
        positions_BL=integers_BL,
        loss_mask_BL=jax.ShapeDtypeStruct(rows, jnp.bool_),
    )
    knobs = jax.eval_shape(lambda: Knobs.from_config(config))
    inputs = split(batch, batch_sharding(mesh)), split(knobs, replicated(mesh))
    with jax.set_mesh(mesh):
        return make_train_step(setup).lower(state, *inputs)
