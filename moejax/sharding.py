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
"""Mesh axes that split the experts: over groups of devices with slow links between them, and within a group."""

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
        named = {
            axis: size for axis, size in sizes.items() if size != 1 or not axis.startswith("dcn_")
        }
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in named.items())
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
    check_divisible(config, sizes)
    slow = (sizes.dcn_data, sizes.dcn_fsdp, sizes.dcn_expert, 1, 1, 1)
    fast = (sizes.data, sizes.fsdp, 1, sizes.expert, sizes.context, sizes.tensor)
    # An array [*slow, *fast] of devices, in which each axis of the mesh is split in two, slow
    # before fast. Within a group, an axis may take a part of a physical one: 8 x 8 of a torus of
    # 4 x 4 x 4.
    groups = _groups(devices, math.prod(slow))
    laid_out = [
        mesh_utils.create_device_mesh(fast, group, allow_split_physical_axes=True)
        for group in groups
    ]
    split = np.stack(laid_out).reshape(*slow, *fast)
    joined = split.transpose(*(axis for i in range(len(slow)) for axis in (i, i + len(slow))))
    shape = tuple(s * f for s, f in zip(slow, fast, strict=True))
    return Mesh(joined.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _groups(devices: list[Any], num_groups: int) -> list[list[Any]]:
    """Equal groups of devices that lie close together; no slice of TPUs is torn apart.

    Other hosts, too, number their devices' slices, though links between them may be fast.
    """
    slices = [getattr(device, "slice_index", 0) or 0 for device in devices]
    num_slices = len(set(slices)) if devices[0].platform == "tpu" else 1
    if (num_slices % num_groups and num_groups % num_slices) or (num_groups == 1 < num_slices):
        raise ConfigError(
            f"mesh.dcn_data * mesh.dcn_fsdp * mesh.dcn_expert = {num_groups} does not fit {num_slices} slices of "
            f"devices; use mesh.dcn_data={num_slices}"
        )
    if num_groups == 1:
        return [devices]
    order = sorted(
        range(len(devices)), key=lambda i: (slices[i], devices[i].process_index, devices[i].id)
    )
    size = len(devices) // num_groups
    return [
        [devices[i] for i in order[first : first + size]] for first in range(0, len(order), size)
    ]


def parts(mesh: MeshConfig) -> dict[str, int]:
    """Into how many parts each axis splits, over slow and fast links together."""
    return {
        "data": mesh.dcn_data * mesh.data,
        "fsdp": mesh.dcn_fsdp * mesh.fsdp,
        "expert": mesh.dcn_expert * mesh.expert,
        "context": mesh.context,
        "tensor": mesh.tensor,
    }


def check_divisible(config: Config, mesh: MeshConfig) -> None:
    """Raises `ConfigError` naming a key that does not divide over a mesh whose sizes are all known."""
    model, moe, sizes = config.model, config.moe, parts(mesh)

    def product(*axes: str) -> str:
        """What a message calls the parts of these axes: with the slow sizes where there are any."""
        names = [
            name
            for axis in axes
            for name in (f"dcn_{axis}", axis)
            if getattr(mesh, name, 1) > 1 or name == axis
        ]
        return " * ".join(f"mesh.{name}" for name in names)

    batch = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    microbatch = config.train.batch_size // config.train.accumulation
    if microbatch % batch:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} over train.accumulation={config.train.accumulation} gives "
            f"microbatches of {microbatch}, which must be a multiple of {product('data', 'fsdp', 'expert')} = {batch}; "
            f"use train.batch_size={batch * config.train.accumulation * max(1, round(microbatch / batch))}"
        )
    if sizes["context"] > 1 and any(
        kind.router in ("expert_choice", "soft") for kind in config.moe_groups
    ):
        raise ConfigError(
            f"mesh.context={sizes['context']} splits sequences, and experts that choose among a sequence's tokens, as "
            "with moe.router=expert_choice or soft, need all of it; use mesh.context=1"
        )
    tokens = microbatch // batch * config.data.seq_len // sizes["context"]
    for chunks in sorted(
        {kind.exchange_chunks for kind in config.moe_groups}
    ):  # moe.per_layer may change it
        if sizes["expert"] > 1 and tokens % chunks:
            raise ConfigError(
                f"moe.exchange_chunks={chunks} must divide the {tokens} tokens of a device; use one of "
                f"{divisors(tokens, chunks)}"
            )
    splits = [
        ("model.d_model", model.d_model, "fsdp"),
        ("model.num_heads", model.num_heads, "tensor"),
        ("model.num_kv_heads", model.num_kv_heads, "tensor"),
        ("data.vocab_size", config.vocab_size, "tensor"),
        ("data.seq_len", config.data.seq_len, "context"),
    ]
    if config.num_moe_layers < model.num_layers:
        splits.append(("model.d_ff", model.d_ff, "tensor"))
    if config.num_moe_layers:
        splits += [("moe.num_experts", moe.num_experts, "expert")]
        splits += [("moe.d_expert", kind.d_expert, "tensor") for kind in config.moe_groups]
        splits += [
            ("moe.d_latent", kind.d_latent, "fsdp") for kind in config.moe_groups if kind.d_latent
        ]
    for key, value, axis in splits:
        size = sizes[axis]
        if value % size:
            below, above = value // size * size, -(-value // size) * size
            works = f"{below} or {above}" if below else f"{above}"
            equals = "=" if product(axis) == f"mesh.{axis}" else " = "
            raise ConfigError(
                f"{key}={value} must be a multiple of {product(axis)}{equals}{size}; use {works}"
            )


def partition_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Mesh axes of an array with these logical axes.

    Raises:
      ValueError: a logical axis without a rule.
    """
    for axis in axes:
        if axis not in RULES:
            raise ValueError(
                f"logical axis {axis!r} has no rule in sharding.RULES; known are {[*RULES]}"
            )
    return PartitionSpec(*(RULES[axis] for axis in axes))


def tree_shardings(axes_tree: Any, mesh: Mesh) -> Any:
    """Maps a tree whose leaves are tuples of logical axes to `NamedSharding`s."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, partition_spec(axes)),
        axes_tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis of every array of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_tokens(x_BLX: jax.Array) -> jax.Array:
    """Keeps activations split by batch and sequence when a mesh is in context; otherwise returns `x_BLX` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_BLX
    return jax.lax.with_sharding_constraint(x_BLX, TOKENS)


def has_context() -> bool:
    """Whether the mesh in context splits sequences."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["context"] > 1


def gather_fsdp(weight: Any, dtype: DTypeLike | None = None) -> jax.Array:
    """A parameter in a dtype, with all of its parts over `fsdp`, for the place that uses it.

    Said explicitly, or XLA may split the activations instead, and gather the batch. The gradient
    goes back to the parameter's own parts.

    Args:
      weight: an `nnx.Param` with logical `axes`; of a scanned one the value may lack the
        leading axis.
      dtype: cast before it travels; None: as it is.
    """
    value = weight[...] if dtype is None else weight[...].astype(dtype)
    split = partition_spec(weight.axes[len(weight.axes) - value.ndim :])
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1 or "fsdp" not in split:
        return value
    return _gather_parts(split, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_parts(split: PartitionSpec, value):
    gathered = PartitionSpec(*(None if axis == "fsdp" else axis for axis in split))
    return jax.lax.with_sharding_constraint(value, gathered)


def _gather_parts_forward(split, value):
    return _gather_parts(split, value), None


def _gather_parts_backward(split, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather_parts.defvjp(_gather_parts_forward, _gather_parts_backward)


def batch_devices() -> int:
    """Into how many parts the mesh in context splits the batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
