"""The mesh, and one table from logical axes to mesh axes.

Every parameter carries the logical names of its axes; `RULES` says which mesh axis splits each. A
name without a rule is an error, and so is a rule that no parameter uses (tested).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moejax.config import Config, ConfigError, MeshConfig, divisors

MESH_AXES = ("data", "fsdp", "dcn_expert", "expert", "context", "tensor")
EXPERT_AXES = ("dcn_expert", "expert")
"""Mesh axes that split the experts.

The first is over groups of devices with slow links between them, the second within a group.
"""

BATCH_AXES = ("data", "fsdp", *EXPERT_AXES)
"""Mesh axes that split the batch."""

TOKENS = PartitionSpec(BATCH_AXES, "context")
"""How activations `[B, L, ...]` are split."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "gate_up": None,
    "experts": EXPERT_AXES,
    "slots": EXPERT_AXES,
    "router": None,
    "latent": None,
    "query_experts": None,
    "key_value": None,
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
            raise ConfigError(
                f"mesh.{axis}={size} must be at least 1, or -1 for all remaining devices"
            )
        fixed *= max(size, 1)
    if len(open_axes) > 1:
        raise ConfigError(
            f"mesh.{open_axes[0]}=-1 and mesh.{open_axes[1]}=-1: only one mesh size may be -1"
        )
    if open_axes and num_devices % fixed == 0:
        return dataclasses.replace(mesh, **{open_axes[0]: num_devices // fixed})
    if fixed != num_devices or open_axes:
        named = []
        for axis, size in sizes.items():
            if size != 1 or not axis.startswith("dcn_"):
                named.append(f"mesh.{axis}={size}")
        axes = ", ".join(named)
        raise ConfigError(
            f"{axes} do not fit {num_devices} devices: sizes must be divisors "
            f"({divisors(num_devices)}) whose product is {num_devices}; one may be -1"
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
    check_divisible(config, sizes)
    slow = (sizes.dcn_data, sizes.dcn_fsdp, sizes.dcn_expert, 1, 1, 1)
    fast = (sizes.data, sizes.fsdp, 1, sizes.expert, sizes.context, sizes.tensor)
    # An array [*slow, *fast] of devices, in which each axis of the mesh is split in two, slow
    # before fast. Within a group, an axis may take a part of a physical one: 8 x 8 of a torus of
    # 4 x 4 x 4.
    laid_out = []
    for group in _groups(devices, math.prod(slow)):
        mesh = mesh_utils.create_device_mesh(fast, group, allow_split_physical_axes=True)
        laid_out.append(mesh)
    split = np.stack(laid_out).reshape(*slow, *fast)
    num_axes = len(MESH_AXES)
    slow_before_fast = np.arange(2 * num_axes).reshape(2, num_axes).T.reshape(-1)
    joined = split.transpose(slow_before_fast)
    shape = np.multiply(slow, fast)
    axis_types = (AxisType.Auto,) * num_axes
    return Mesh(joined.reshape(shape), MESH_AXES, axis_types=axis_types)


def _groups(devices: list[Any], num_groups: int) -> list[list[Any]]:
    """Returns equal groups of devices that are close together; no slice of TPUs is split.

    Hosts without TPUs number their devices' slices too, though links between them may be fast.
    """
    slices = [getattr(device, "slice_index", 0) or 0 for device in devices]
    num_slices = len(set(slices)) if devices[0].platform == "tpu" else 1
    splits_a_slice = num_slices % num_groups and num_groups % num_slices
    ignores_slices = num_groups == 1 and num_slices > 1
    if splits_a_slice or ignores_slices:
        raise ConfigError(
            f"mesh.dcn_data * mesh.dcn_fsdp * mesh.dcn_expert = {num_groups} does not fit "
            f"{num_slices} slices of devices; use mesh.dcn_data={num_slices}"
        )
    if num_groups == 1:
        return [devices]

    def position(i: int) -> tuple[int, int, int]:
        return slices[i], devices[i].process_index, devices[i].id

    order = sorted(range(len(devices)), key=position)
    in_order = [devices[i] for i in order]
    size = len(devices) // num_groups
    return [in_order[first : first + size] for first in range(0, len(in_order), size)]


def parts(mesh: MeshConfig) -> dict[str, int]:
    """Returns into how many parts each axis splits, over slow and fast links together."""
    return {
        "data": mesh.dcn_data * mesh.data,
        "fsdp": mesh.dcn_fsdp * mesh.fsdp,
        "expert": mesh.dcn_expert * mesh.expert,
        "context": mesh.context,
        "tensor": mesh.tensor,
    }


def check_divisible(config: Config, mesh: MeshConfig) -> None:
    """Raises `ConfigError` naming a key that does not divide over a mesh whose sizes are known."""
    sizes = parts(mesh)
    _check_batch(config, mesh)
    _check_sequences(config, sizes["context"])
    _check_chunks(config, sizes)
    for key, value, axis in _splits(config):
        size = sizes[axis]
        if value % size:
            below = value // size * size
            above = -(-value // size) * size
            works = f"{below} or {above}" if below else f"{above}"
            name = _product(mesh, axis)
            equals = "=" if name == f"mesh.{axis}" else " = "
            raise ConfigError(
                f"{key}={value} must be a multiple of {name}{equals}{size}; use {works}"
            )


def _product(mesh: MeshConfig, *axes: str) -> str:
    """Returns what a message calls the parts of these axes: with slow sizes where there are any."""
    names = []
    for axis in axes:
        slow = f"dcn_{axis}"
        if getattr(mesh, slow, 1) > 1:
            names.append(f"mesh.{slow}")
        names.append(f"mesh.{axis}")
    return " * ".join(names)


def _batch_parts(sizes: dict[str, int]) -> int:
    return sizes["data"] * sizes["fsdp"] * sizes["expert"]


def _check_batch(config: Config, mesh: MeshConfig) -> None:
    train = config.train
    batch = _batch_parts(parts(mesh))
    microbatch = train.batch_size // train.accumulation
    if microbatch % batch:
        multiple = max(1, round(microbatch / batch))
        works = batch * train.accumulation * multiple
        name = _product(mesh, "data", "fsdp", "expert")
        raise ConfigError(
            f"train.batch_size={train.batch_size} over train.accumulation={train.accumulation} "
            f"gives microbatches of {microbatch}, which must be a multiple of {name} = {batch}; "
            f"use train.batch_size={works}"
        )


def _check_sequences(config: Config, context: int) -> None:
    routers = {kind.router for kind in config.moe_groups}
    if context > 1 and routers & {"expert_choice", "soft"}:
        raise ConfigError(
            f"mesh.context={context} splits sequences, and experts that choose among a sequence's "
            "tokens, as with moe.router=expert_choice or soft, need all of it; use mesh.context=1"
        )


def _check_chunks(config: Config, sizes: dict[str, int]) -> None:
    if sizes["expert"] == 1:
        return
    microbatch = config.train.batch_size // config.train.accumulation
    sequences = microbatch // _batch_parts(sizes)
    tokens = sequences * config.data.seq_len // sizes["context"]
    # moe.per_layer may change the number of chunks.
    for chunks in sorted({kind.exchange_chunks for kind in config.moe_groups}):
        if tokens % chunks:
            raise ConfigError(
                f"moe.exchange_chunks={chunks} must divide the {tokens} tokens of a device; "
                f"use one of {divisors(tokens, chunks)}"
            )


def _splits(config: Config) -> list[tuple[str, int, str]]:
    """Returns keys, their values, and the axis that splits each."""
    model, attention, moe = config.model, config.attention, config.moe
    splits = [
        ("model.d_model", model.d_model, "fsdp"),
        ("attention.num_heads", attention.num_heads, "tensor"),
        ("data.vocab_size", config.vocab_size, "tensor"),
        ("data.seq_len", config.data.seq_len, "context"),
    ]
    if attention.kind != "latent":
        splits.append(("attention.num_kv_heads", attention.num_kv_heads, "tensor"))
    if config.num_moe_layers < model.num_layers or model.shortcut:
        splits.append(("model.d_ff", model.d_ff, "tensor"))
    if config.num_moe_layers:
        splits.append(("moe.num_experts", moe.num_experts, "expert"))
    # Empty in a dense model; moe.per_layer may make groups differ.
    for kind in config.moe_groups:
        splits.append(("moe.d_expert", kind.d_expert, "tensor"))
        if kind.d_shared:
            splits.append(("moe.d_shared", kind.shared_width, "tensor"))
    for kind in config.moe_groups:
        if kind.d_latent:
            splits.append(("moe.d_latent", kind.d_latent, "fsdp"))
    return splits


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the mesh axes of an array with these logical axes; None is never split.

    Raises:
      ValueError: a logical axis without a rule.
    """
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(
                f"logical axis {axis!r} has no rule in sharding.RULES; known are {[*RULES]}"
            )
    return PartitionSpec(*(axis and RULES[axis] for axis in axes))


def tree_shardings(axes_tree: Any, mesh: Mesh) -> Any:
    """Maps a tree whose leaves are tuples of logical axes to `NamedSharding`s."""

    def sharding(axes):
        return NamedSharding(mesh, partition_spec(axes))

    return jax.tree.map(sharding, axes_tree, is_leaf=lambda node: isinstance(node, tuple))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of every array of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts all of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_tokens(x_BLX: jax.Array) -> jax.Array:
    """Keeps activations split by batch and sequence; without a mesh in context, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_BLX
    return jax.lax.with_sharding_constraint(x_BLX, TOKENS)


def has_context() -> bool:
    """Whether the mesh in context splits sequences."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["context"] > 1


def gather_fsdp(weight: Any, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns a parameter in a dtype, gathered over `fsdp`, where it is used.

    Without this XLA may split the activations instead, and gather the batch. The gradient goes back
    to the parameter's own parts.

    Args:
      weight: an `nnx.Param` with logical `axes`; of a scanned one the value may lack the
        leading axis.
      dtype: cast before it is sent; None: as it is.
    """
    value = weight[...]
    if dtype is not None:
        value = value.astype(dtype)
    num_missing_axes = len(weight.axes) - value.ndim
    split = partition_spec(weight.axes[num_missing_axes:])
    mesh = jax.sharding.get_abstract_mesh()
    has_fsdp = not mesh.empty and mesh.shape["fsdp"] > 1
    if not has_fsdp or "fsdp" not in split:
        return value
    return _gather_parts(split, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_parts(split: PartitionSpec, value):
    gathered = [None if axis == "fsdp" else axis for axis in split]
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*gathered))


def _gather_parts_forward(split, value):
    return _gather_parts(split, value), None


def _gather_parts_backward(split, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather_parts.defvjp(_gather_parts_forward, _gather_parts_backward)


def batch_devices() -> int:
    """Returns into how many parts the mesh in context splits the batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def parts_of_logits() -> tuple[int, int]:
    """Returns into how many parts the mesh in context splits a sequence, and logits `[B, L, V]`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1, 1
    length_parts = mesh.shape["context"]
    return length_parts, batch_devices() * length_parts * mesh.shape["tensor"]
