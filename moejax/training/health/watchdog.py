"""Ends a process that hangs.

A collective that one process never enters keeps all others waiting, without a message.
"""

import faulthandler
import os
import sys
import threading
import time

import jax
from jax.sharding import Mesh

EXIT_CODE = 3

OTHER_WORK_SECONDS = 3600.0
"""The limit of compiling, an evaluation or a save, unless the limit of a step is larger."""

UNHURRIED_STEPS = 2
"""How many of the first steps have the limit of other work.

They connect the devices of the processes, and each step is waited for during the next.
"""


class Watchdog:
    """Exits with `EXIT_CODE` once a step, or other work, takes longer than its limit.

    Before that it prints to standard error what took so long, on which mesh, and the stacks of all
    threads.

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
        """Notes that a step begins; whatever was before it is done."""
        self._num_steps += 1
        if self._num_steps <= UNHURRIED_STEPS:
            self.other_work(f"step {step}")
        else:
            self._begin(f"step {step}", self._limit_s)

    def other_work(self, name: str) -> None:
        """Notes that something begins that may take longer than a step."""
        self._begin(name, max(OTHER_WORK_SECONDS, self._limit_s))

    def _begin(self, name: str, limit_s: float) -> None:
        # One assignment, since the thread reads all three.
        self._work = name, limit_s, time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(min(1.0, self._limit_s / 4)):
            name, limit_s, begun_at = self._work
            if time.monotonic() - begun_at > limit_s:
                self._end(name, limit_s)

    def _end(self, name: str, limit_s: float) -> None:
        """Prints what took too long and the stacks of all threads, and exits."""
        mesh = ", ".join(f"{axis} {size}" for axis, size in self._mesh.shape.items())
        process = f"process {jax.process_index()} of {jax.process_count()}"
        print(
            f"moejax: {name} has taken more than {limit_s:g} s "
            f"(train.step_limit_s={self._limit_s:g}) in {process}, on mesh {mesh}; it ends here, "
            "and the same command continues from the newest checkpoint. The stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=2)
        os._exit(EXIT_CODE)
