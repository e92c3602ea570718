"""Times of several programs, taken in turn: what slows a machine down for a while then slows all of them alike."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of one program.

    Attributes:
      median_ms: of all repetitions.
      quartiles_ms: between which half of them lie.
    """

    median_ms: float
    quartiles_ms: tuple[float, float]

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> "Times":
        """Of some repetitions."""
        low, high = (1e3 * float(np.quantile(seconds, q)) for q in (0.25, 0.75))
        return cls(1e3 * statistics.median(seconds), (low, high))


def interleave(
    programs: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int = 2
) -> dict[str, Times]:
    """Runs all programs in turn.

    Args:
      programs: each runs once when called, and returns the arrays to wait for.
      repetitions: of all of them.
      warm_up: so many turns before are not counted: they compile, and fill caches and
        the allocator.

    Returns:
      Times by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for repetition in range(warm_up + repetitions):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program())
            if repetition >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Times.from_seconds(times) for name, times in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What this machine reaches in float32 on a large matrix product and a large copy.

    Attributes:
      gflops: 10^9 multiplications and additions per second.
      gbytes: 10^9 bytes per second, read and written ones counted both.
    """

    gflops: float
    gbytes: float


def measure_peaks(repetitions: int = 7, size: int = 2048, megabytes: int = 256) -> Peaks:
    """Multiplies two matrices of `size`^2 and copies an array."""
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    array = jnp.zeros(megabytes * 250_000)
    multiply, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    times = interleave(
        {"multiply": lambda: multiply(matrix, matrix), "copy": lambda: copy(array)}, repetitions
    )
    return Peaks(
        gflops=2 * size**3 / times["multiply"].median_ms / 1e6,
        gbytes=2 * array.nbytes / times["copy"].median_ms / 1e6,
    )
