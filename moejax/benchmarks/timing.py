"""Compiles programs and times several in turn.

So what slows a machine for a while slows all of them.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Arguments(NamedTuple):
    """What a program of a function is called with.

    Attributes:
      dy_TD: gradient of the function's output.
      inputs: its arguments that have gradients.
      choices: its other arguments.
    """

    dy_TD: Any
    inputs: tuple[Any, ...]
    choices: tuple[Any, ...] = ()


def program_of(function: Callable[..., jax.Array], direction: str) -> Callable[..., Any]:
    """Returns a function of the fields of `Arguments`, which calls `function(*inputs, *choices)`.

    Everything is an argument: XLA would spend minutes on sorting constants while it compiles.
    """

    def forward(dy_TD, inputs, choices):
        return function(*inputs, *choices)

    def forward_backward(dy_TD, inputs, choices):
        def of_inputs(*inputs):
            return function(*inputs, *choices)

        y_TD, pull = jax.vjp(of_inputs, *inputs)
        return y_TD, pull(dy_TD)

    programs = {"forward": forward, "forward_backward": forward_backward}
    return programs[direction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function with its arguments."""

    compiled: Any
    arguments: Arguments

    @classmethod
    def compile(
        cls,
        function: Callable[..., jax.Array],
        direction: str,
        arguments: Arguments,
    ) -> "Program":
        """Compiles `function(*inputs, *choices)`, alone or with its gradients for `inputs`."""
        program = jax.jit(program_of(function, direction))
        lowered = program.lower(*arguments)
        return cls(lowered.compile(), arguments)

    def __call__(self) -> Any:
        """Runs once."""
        return self.compiled(*self.arguments)

    @property
    def temporary_bytes(self) -> int:
        """Bytes held in addition to arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes


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
        median_ms = 1e3 * statistics.median(seconds)
        low, high = np.quantile(seconds, [0.25, 0.75])
        low_ms = 1e3 * float(low)
        high_ms = 1e3 * float(high)
        return cls(median_ms, (low_ms, high_ms))


def interleave(
    programs: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warm_up: int = 2,
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
            duration = _seconds_of(program)
            if turn >= warm_up:
                seconds[name].append(duration)
    return {name: Times.from_seconds(times) for name, times in seconds.items()}


def _seconds_of(program: Callable[[], Any]) -> float:
    """Runs a program once, and returns how long it takes."""
    started = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - started


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
    programs = {
        "multiply": functools.partial(multiply, matrix, matrix),
        "copy": functools.partial(copy, array),
    }
    times = interleave(programs, repetitions)
    flops = 2 * size**3
    num_bytes = 2 * array.nbytes
    return Peaks(
        gflops=flops / times["multiply"].median_ms / 1e6,
        gbytes=num_bytes / times["copy"].median_ms / 1e6,
    )
