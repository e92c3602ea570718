"""Whether a training can fit the memory of its devices, before anything is traced.

Plain integer arithmetic on the configuration gives what a step holds at the same time at the very
least; what XLA adds is left out, so that nothing is refused that works. `moejax bench
compiled_step` says what a step really takes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from moejax.config import Config, ConfigError
from moejax.kernels.cross_entropy import LARGEST_CHUNK
from moejax.planning.count import count
from moejax.sharding import parts, resolve_mesh

FLOAT32_BYTES = 4
BATCH_BYTES = 4 * 4 + 1
"""Of a token of a batch: token, target, segment and position, int32, and whether it has a loss."""

MOMENTS = {"adamw": 2, "muon": 1, "muonh": 1, "adafactor": 0, "lion": 1, "sgd": 1}
"""Moments of a parameter, at the least, by `optimizer.name`: some have one more."""

UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6}

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux tells a container how much memory it may use."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds on a device, at the least.

    Attributes:
      parameters: float32.
      moments: of the optimizer.
      gradients: of all parameters at once, for their norm.
      batch: of tokens.
      activations: the residual stream at each layer, kept for the backward pass of a microbatch.
      logits: of as many tokens of a microbatch as are computed at once, float32.
    """

    parameters: int
    moments: int
    gradients: int
    batch: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))

    @property
    def state(self) -> int:
        """What the size of the model decides."""
        return self.parameters + self.moments + self.gradients


def estimate_memory(config: Config, num_devices: int) -> Memory:
    """Returns what a step holds on each device.

    Args:
      config: resolved.
      num_devices: over which its mesh is laid.

    Raises:
      ConfigError: the mesh does not fit that many devices.
    """
    sizes = parts(resolve_mesh(config.mesh, num_devices))
    counted, model, train = count(config), config.model, config.train
    weight_parts = sizes["fsdp"] * sizes["tensor"]
    other_parameters = (counted.total - counted.experts) // weight_parts
    expert_parameters = counted.experts // (weight_parts * sizes["expert"])
    parameters = FLOAT32_BYTES * (other_parameters + expert_parameters)
    token_parts = sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]
    tokens = train.batch_size * config.data.seq_len // token_parts
    microbatch_tokens = tokens // train.accumulation
    residual_width = model.d_model * model.num_layers
    activation_bytes = FLOAT32_BYTES if model.compute_dtype == "float32" else FLOAT32_BYTES // 2
    num_logits = microbatch_tokens * config.vocab_size // sizes["tensor"]
    # How many of them are frozen is not counted: at the least, all are.
    trained = 0 if config.optimizer.frozen else parameters
    moment_bytes = trained if config.optimizer.moments_dtype == "float32" else trained // 2
    return Memory(
        parameters=parameters,
        moments=MOMENTS[config.optimizer.name] * moment_bytes,
        gradients=trained,
        batch=BATCH_BYTES * tokens,
        activations=activation_bytes * microbatch_tokens * residual_width,
        logits=FLOAT32_BYTES * min(num_logits, LARGEST_CHUNK),
    )


def check_memory(config: Config, devices: Sequence[jax.Device] | None = None) -> None:
    """Refuses a training run that cannot fit its devices, unless `train.check_memory=False`.

    Args:
      config: resolved.
      devices: all by default.

    Raises:
      ConfigError: with what is needed, what there is, and what to change.
    """
    devices = jax.devices() if devices is None else devices
    if not config.train.check_memory:
        return
    needed = estimate_memory(config, len(devices))
    sharing = _sharing(devices)
    is_cpu = devices[0].platform == "cpu"
    available = host_memory() if is_cpu else device_memory(devices[0].memory_stats)
    if available is None or needed.total * sharing <= available:
        return
    if sharing == 1:
        where = "a device"
    else:
        where = f"each of {sharing} devices that share the memory of this machine"
    raise ConfigError(
        f"a step needs at least {_text(needed.total)} on {where}, which has {_text(available)}: "
        f"{_listed(needed)}; {_remedy(needed)}; train.check_memory=False tries all the same"
    )


def _listed(needed: Memory) -> str:
    """Returns all parts with their sizes, as in "parameters 1.2 GB, moments 2.4 GB"."""
    sizes = dataclasses.asdict(needed)
    return ", ".join(f"{name} {_text(size)}" for name, size in sizes.items())


def _remedy(needed: Memory) -> str:
    """Returns what to change, by whether the model or its batch takes most of the memory."""
    if needed.state > needed.total // 2:
        return (
            "lower moe.num_experts, moe.d_expert, model.d_model or model.num_layers, or split the "
            "model over more devices"
        )
    return "lower train.batch_size or data.seq_len, or raise train.accumulation"


def device_memory(statistics: Callable[[], dict[str, Any] | None]) -> int | None:
    """Returns bytes of memory of a device, from its `memory_stats`; None where it does not say."""
    try:
        found = statistics() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None
    return found.get("bytes_limit")


def host_memory(limits: Sequence[str] = LIMITS) -> int | None:
    """Returns bytes that this machine has, or that its container may use; None where not known.

    Args:
      limits: files that may hold a limit.
    """
    found = []
    # Some systems, such as Windows, have no such call.
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in limits:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # "max" stands for no limit
            found.append(int(text))
    return min(found) if found else None


def _sharing(devices: Sequence[jax.Device]) -> int:
    """Returns how many of the devices share one memory: those of this process on CPU."""
    if devices[0].platform != "cpu":
        return 1
    here = jax.process_index()
    num_here = sum(device.process_index == here for device in devices)
    return max(1, num_here)


def _text(number: int) -> str:
    """Returns bytes with a unit and, from a megabyte on, one decimal: 1.2 GB."""
    for unit, size in UNITS.items():
        if number >= size:
            # In integers, since the largest numbers are beyond a float.
            all_tenths = number * 10 // size
            ones, tenths = divmod(all_tenths, 10)
            return f"{ones:,}.{tenths} {unit}"
    return f"{number:,} bytes"
