"""The mesh, and one table from logical axes to mesh axes.

Every parameter carries the logical names of its axes; `RULES` says which mesh axis splits each. A name without a rule
is an error, and so is a rule that no parameter uses (tested).
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config import Config, ConfigError, MeshConfig, divisors

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes that split the batch."""

RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "gate_up": None,
    "experts": "expert",
    "router": None,
    "latent": None,
    "norm": None,
    "layers": None,
}


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """Fills in the size given as -1.

    Raises:
      ConfigError: sizes that do not multiply to `num_devices`, or more than one -1.
    """
    sizes = dataclasses.asdict(mesh)
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    fixed = 1
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size} must be at least 1, or -1 for all remaining devices")
        fixed *= max(size, 1)
    if len(open_axes) > 1:
        raise ConfigError(f"mesh.{open_axes[0]}=-1 and mesh.{open_axes[1]}=-1: only one mesh size may be -1")
    if open_axes and num_devices % fixed == 0:
        return dataclasses.replace(mesh, **{open_axes[0]: num_devices // fixed})
    if fixed != num_devices or open_axes:
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ConfigError(
            f"{axes} do not fit {num_devices} devices: sizes must be divisors ({divisors(num_devices)}) whose product "
            f"is {num_devices}; one may be -1"
        )
    return mesh


def make_mesh(config: Config, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of a config and checks that every split axis divides.

    Args:
      config: the experiment.
      devices: all devices by default.

    Raises:
      ConfigError: naming the key, the mesh axis and sizes that would work.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_mesh(config.mesh, len(devices))
    _check_divisible(config, sizes)
    shape = tuple(getattr(sizes, axis) for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def _check_divisible(config: Config, mesh: MeshConfig) -> None:
    model, moe = config.model, config.moe
    batch = mesh.data * mesh.fsdp * mesh.expert
    microbatch = config.train.batch_size // config.train.accumulation
    if microbatch % batch:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} over train.accumulation={config.train.accumulation} gives "
            f"microbatches of {microbatch}, which must be a multiple of mesh.data * mesh.fsdp * mesh.expert = {batch}; "
            f"use train.batch_size={batch * config.train.accumulation * max(1, round(microbatch / batch))}"
        )
    splits = [
        ("model.d_model", model.d_model, "fsdp"),
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.num_kv_heads", model.num_kv_heads, "tensor"),
        ("data.vocab_size", config.vocab_size, "tensor"),
    ]
    if config.num_moe_layers < model.num_layers:
        splits.append(("model.d_ff", model.d_ff, "tensor"))
    if config.num_moe_layers:
        splits += [("moe.num_experts", moe.num_experts, "expert")]
        splits += [("moe.d_expert", kind.d_expert, "tensor") for kind in config.moe_runs]
        splits += [("moe.d_latent", kind.d_latent, "fsdp") for kind in config.moe_runs if kind.d_latent]
    for key, value, axis in splits:
        size = getattr(mesh, axis)
        if value % size:
            below, above = value // size * size, -(-value // size) * size
            works = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(f"{key}={value} must be a multiple of mesh.{axis}={size}; use {works}")


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
      ValueError: a logical axis without a rule.
    """
    for axis in axes:
        if axis not in RULES:
            raise ValueError(f"logical axis {axis!r} has no rule in sharding.RULES; known are {[*RULES]}")
    return PartitionSpec(*(RULES[axis] for axis in axes))


def tree_shardings(axes_tree: Any, mesh: Mesh) -> Any:
    """Maps a tree whose leaves are tuples of logical axes to `NamedSharding`s."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes)), axes_tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of every array of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps activations split by batch when a mesh is in context; otherwise returns `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def batch_devices() -> int:
    """Into how many parts the mesh in context splits the batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
