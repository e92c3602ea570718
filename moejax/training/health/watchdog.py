"""Ends a process that hangs: a collective that one process never enters keeps all others waiting, without a word."""

import faulthandler
import os
import sys
import threading
import time

import jax
from jax.sharding import Mesh

EXIT_CODE = 3

OTHER_WORK_SECONDS = 3600.0
"""What compiling, an evaluation or a save may take at least, whatever the limit of a step."""

UNHURRIED_STEPS = 2
"""The first steps of a process connect its devices to the others', and each step is waited for during the next."""


class Watchdog:
    """Exits with `EXIT_CODE` once a step, or other work, takes longer than it may.

    Before that it prints what it was, on which mesh, and the stacks of all threads to
    standard error.

    Args:
      limit_s: seconds from the beginning of one step to that of the next; 0 switches it off.
      mesh: named in the message.
    """

    def __init__(self, limit_s: float, mesh: Mesh):
        self._limit_s = limit_s
        self._mesh = mesh
        self._num_steps = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.other_work("the beginning")

    def __enter__(self) -> "Watchdog":
        if self._limit_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()

    def step(self, step: int) -> None:
        """A step begins; whatever was before it is done."""
        self._num_steps += 1
        if self._num_steps <= UNHURRIED_STEPS:
            self.other_work(f"step {step}")
        else:
            self._work = f"step {step}", self._limit_s, time.monotonic()

    def other_work(self, name: str) -> None:
        """Something begins that may take longer than a step."""
        self._work = name, max(OTHER_WORK_SECONDS, self._limit_s), time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(min(1.0, self._limit_s / 4)):
            name, limit_s, begun = self._work
            if time.monotonic() - begun > limit_s:
                self._end(name, limit_s)

    def _end(self, name: str, limit_s: float) -> None:
        mesh = ", ".join(f"{axis} {size}" for axis, size in self._mesh.shape.items())
        print(
            f"moejax: {name} has taken more than {limit_s:g} s (train.step_limit_s={self._limit_s:g}) in process "
            f"{jax.process_index()} of {jax.process_count()}, on mesh {mesh}; it ends here, and the same command "
            "continues from the newest checkpoint. The stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=2)
        os._exit(EXIT_CODE)
