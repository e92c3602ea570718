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
from moejax.planning.count import count
from moejax.sharding import parts, resolve_mesh

FLOAT32_BYTES = 4
BATCH_BYTES = 4 * 4 + 1
"""Of a token of a batch: token, target, segment and position, int32, and whether its loss counts."""

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux tells a container how much memory it may use."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds on a device, at the least.

    Attributes:
      parameters: float32.
      moments: the two of AdamW.
      gradients: of all parameters at once, for their norm.
      batch: of tokens.
      activations: the residual stream at each layer, kept for the backward pass of a microbatch.
      logits: of a microbatch, float32.
    """

    parameters: int
    moments: int
    gradients: int
    batch: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))

    @property
    def state(self) -> int:
        """What the size of the model decides."""
        return self.parameters + self.moments + self.gradients


def estimate_memory(config: Config, num_devices: int) -> Memory:
    """What a step holds on each device.

    Args:
      config: resolved.
      num_devices: over which its mesh is laid.

    Raises:
      ConfigError: the mesh does not fit that many devices.
    """
    sizes = parts(resolve_mesh(config.mesh, num_devices))
    counted, model, train = count(config), config.model, config.train
    split = sizes["fsdp"] * sizes["tensor"]
    others = (counted.total - counted.experts) // split
    parameters = FLOAT32_BYTES * (others + counted.experts // (split * sizes["expert"]))
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    tokens = train.batch_size * config.data.seq_len // (rows * sizes["context"])
    of_microbatch = tokens // train.accumulation
    activation_bytes = FLOAT32_BYTES if model.compute_dtype == "float32" else FLOAT32_BYTES // 2
    return Memory(
        parameters=parameters,
        moments=2 * parameters,
        gradients=parameters,
        batch=BATCH_BYTES * tokens,
        activations=activation_bytes * of_microbatch * model.d_model * model.num_layers,
        logits=FLOAT32_BYTES * of_microbatch * config.vocab_size // sizes["tensor"],
    )


def check_memory(config: Config, devices: Sequence[jax.Device] | None = None) -> None:
    """Refuses a training that cannot fit its devices; `train.check_memory=False` lets it try.

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
    available = (
        host_memory() if devices[0].platform == "cpu" else device_memory(devices[0].memory_stats)
    )
    if available is None or needed.total * sharing <= available:
        return
    where = (
        "a device"
        if sharing == 1
        else f"each of {sharing} devices that share the memory of this machine"
    )
    remedy = (
        "lower moe.num_experts, moe.d_expert, model.d_model or model.num_layers, or split the model over more devices"
        if needed.state > needed.total // 2
        else "lower train.batch_size or data.seq_len, or raise train.accumulation"
    )
    raise ConfigError(
        f"a step needs at least {_text(needed.total)} on {where}, which has {_text(available)}: parameters "
        f"{_text(needed.parameters)}, moments {_text(needed.moments)}, gradients {_text(needed.gradients)}, batch "
        f"{_text(needed.batch)}, activations {_text(needed.activations)}, logits {_text(needed.logits)}; {remedy}; "
        "train.check_memory=False tries all the same"
    )


def device_memory(statistics: Callable[[], dict[str, Any] | None]) -> int | None:
    """Bytes of memory of a device, from its `memory_stats`; None where it does not say."""
    try:
        found = statistics()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None
    return (found or {}).get("bytes_limit")


def host_memory(limits: Sequence[str] = LIMITS) -> int | None:
    """Bytes that this machine has, or that its container may use; None where the system does not say.

    Args:
      limits: files that may hold a limit.
    """
    found = []
    with contextlib.suppress(
        AttributeError, ValueError, OSError
    ):  # it has no such call, as on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in limits:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # else "max"
            found.append(int(text))
    return min(found) if found else None


def _sharing(devices: Sequence[jax.Device]) -> int:
    """How many of the devices share one memory: those of this process on CPU."""
    if devices[0].platform != "cpu":
        return 1
    return max(1, sum(device.process_index == jax.process_index() for device in devices))


def _text(number: int) -> str:
    """Three digits and a unit: 1.25 GB; of absurd numbers, the power of ten."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            tenths = number * 10 // size
            return f"{tenths // 10:,}.{tenths % 10} {unit}"
    return f"{number:,} bytes"
