"""Accelerators to compile for on any machine, from XLA's descriptions of their devices.

A compiled program says what it computes and how much memory it needs. It says nothing about time.
"""

import dataclasses
import importlib.util
import os
import re

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moejax.extras import how_to_install

COMPILER_PACKAGES = {
    "tpu": ("libtpu",),
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
}
"""By platform of jax, the packages of which any one has its compiler."""


class TargetError(ValueError):
    """The compiler of a target is not installed, or the target lacks what was asked for."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      name: what users call it.
      platform: of jax.
      extra: what to install for its compiler.
      smallest: the smallest topology that its compiler knows: chips of a TPU by axis, or slices,
        hosts and GPUs.
      properties: of a GPU, as its compiler reads them.
      memory_bytes: of a device; 0: the compiler knows, and refuses what does not fit.
    """

    name: str
    platform: str
    extra: str
    smallest: str
    properties: str = ""
    memory_bytes: int = 0


def _gpu(
    name: str,
    description: str,
    *,
    cores: int,
    major: int,
    gbytes_per_s: int,
    l2_bytes: int,
    memory_bytes: int,
) -> Target:
    """Returns an NVIDIA GPU, with what Hopper and Blackwell have in common."""
    properties = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
      shared_memory_per_core: 233472
      registers_per_block_limit: 65536 registers_per_core_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {cores} fpus_per_core: 128 clock_rate_ghz: 1.98
      memory_bandwidth: {gbytes_per_s}000000000 l2_cache_size: {l2_bytes}
      device_memory_size: {memory_bytes}
      cuda_compute_capability {{ major: {major} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
    device_description_str: "{description}"
    """
    return Target(name, "gpu", "cuda13", "1x1x1", properties, memory_bytes)


# Streaming multiprocessors, bandwidth and sizes of GPUs as XLA lists them
# (xla/backends/gpu/target_config/specs).
H100 = _gpu(
    "h100",
    "NVIDIA H100 80GB HBM3",
    cores=132,
    major=9,
    gbytes_per_s=3352,
    l2_bytes=52428800,
    memory_bytes=84942979072,
)
B200 = _gpu(
    "b200",
    "NVIDIA B200",
    cores=148,
    major=10,
    gbytes_per_s=7672,
    l2_bytes=132644864,
    memory_bytes=191514411008,
)
V5P = Target("v5p", "tpu", "tpu", "2x2x1")
V6E = Target("v6e", "tpu", "tpu", "2x2")
TARGETS = {target.name: target for target in (H100, B200, V5P, V6E)}


def make_target_mesh(target: Target) -> Mesh:
    """Returns a mesh of one device, to compile for.

    Raises:
      TargetError: its compiler is missing.
    """
    devices = target_devices(target)[:1]
    return jax.make_mesh((1,), ("device",), axis_types=(AxisType.Auto,), devices=devices)


def target_devices(target: Target, topology: str = "") -> list[jax.Device]:
    """Returns devices to compile for.

    Args:
      target: their kind.
      topology: how many and how they are joined, such as "4x4x4" chips of a v5p in a torus, or
        "1x8x8": one slice of 8 hosts with 8 GPUs; the smallest by default.

    Raises:
      TargetError: the compiler is missing, or does not know the topology.
    """
    topology = topology or target.smallest
    if not re.fullmatch(r"\d+(x\d+)*", topology):
        raise TargetError(
            f"topology {topology} must be sizes joined by x, such as {target.smallest}"
        )
    describe = _tpu_devices if target.platform == "tpu" else _gpu_devices
    try:
        return list(describe(target, topology))
    except Exception as error:  # a compiler that does not know the target fails in many ways
        if not has_compiler(target):
            raise TargetError(
                f"target {target.name} needs the compiler for {target.platform}, which is not "
                f"installed; {how_to_install(target.extra)}"
            ) from error
        if topology == target.smallest:
            raise
        raise TargetError(
            f"target {target.name} cannot have topology {topology}, which should look like "
            f"{target.smallest}: {error}"
        ) from error


def has_compiler(target: Target) -> bool:
    """Whether the target's compiler is installed."""
    packages = COMPILER_PACKAGES[target.platform]
    return any(importlib.util.find_spec(package) for package in packages)


def _tpu_devices(target: Target, topology: str):
    # libtpu asks the machine it runs on for these, and where that has no TPU it waits for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(f"{target.name}:{topology}", "tpu").devices


def _gpu_devices(target: Target, topology: str):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of the driver
    description = topologies.get_topology_desc(
        topology,
        "cuda",
        topology=topology,
        target_config=target.properties,
    )
    return description.devices
