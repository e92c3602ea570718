"""Times several programs in turn, so that what slows a machine for a while slows all of them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one program.

    Attributes:
      median_ms: of all repetitions.
      quartiles_ms: the lower and the upper one.
    """

    median_ms: float
    quartiles_ms: tuple[float, float]

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> "Times":
        """Returns the times of some repetitions."""
        low_ms = 1e3 * float(np.quantile(seconds, 0.25))
        high_ms = 1e3 * float(np.quantile(seconds, 0.75))
        return cls(1e3 * statistics.median(seconds), (low_ms, high_ms))


def interleave(
    programs: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int = 2
) -> dict[str, Times]:
    """Runs all programs in turn, and times them.

    Args:
      programs: each runs once when called, and returns the arrays to wait for.
      repetitions: of all of them.
      warm_up: turns before these, which are not timed: they compile, and fill caches and the
        allocator.

    Returns:
      Times by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(warm_up + repetitions):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            ended = time.perf_counter()
            if turn >= warm_up:
                seconds[name].append(ended - started)
    return {name: Times.from_seconds(times) for name, times in seconds.items()}


def rounded(values: Iterable[float], digits: int) -> list[float]:
    """Returns the values with that many digits after the point."""
    return [round(value, digits) for value in values]


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What this machine reaches in float32 on a large matrix product and a large copy.

    Attributes:
      gflops: 10^9 multiplications and additions per second.
      gbytes: 10^9 bytes per second, counting those read and those written.
    """

    gflops: float
    gbytes: float


def measure_peaks(repetitions: int = 7, size: int = 2048, megabytes: int = 256) -> Peaks:
    """Measures a product of two matrices of `size`^2, and a copy of an array."""
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    array = jnp.zeros(megabytes * 250_000)  # of 4 bytes each
    multiply = jax.jit(jnp.matmul)
    copy = jax.jit(lambda x: x + 1)
    programs = {"multiply": lambda: multiply(matrix, matrix), "copy": lambda: copy(array)}
    times = interleave(programs, repetitions)
    flops = 2 * size**3
    num_bytes = 2 * array.nbytes
    return Peaks(
        gflops=flops / times["multiply"].median_ms / 1e6,
        gbytes=num_bytes / times["copy"].median_ms / 1e6,
    )
