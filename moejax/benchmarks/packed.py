"""What packing arms saves: a sweep of seeds, packed, beside the same runs one after another.

Every side is what a user would start, from the start of the process to the last checkpoint: `moejax
train` for each seed, of which the first compiles and the others find its programs; one process that
trains one after another, with compiled programs kept from before; and the pack, which compiles
(`packed`) or has its programs from before (`packed_again`).
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from moejax.benchmarks.recipe import ChildError, write_recipe
from moejax.config import Config

ARMS = 8


def bench_packed(config: Config, repetitions: int) -> dict[str, Any]:
    """Times the four in turn; ratios are of medians, and `each_s` has the seconds of every turn."""
    seconds: dict[str, list[float]] = {
        "separate": [],
        "one_process": [],
        "packed": [],
        "packed_again": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = _Sides(config, Path(folder))
        bench.warm_up()
        for _ in range(repetitions):
            for name, times in seconds.items():
                started = time.perf_counter()
                getattr(bench, name)()
                times.append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "separate_over_packed": round(medians["separate"] / medians["packed"], 2),
        "one_process_over_packed_again": round(medians["one_process"] / medians["packed_again"], 2),
        **{f"{name}_s": round(median, 1) for name, median in medians.items()},
        "each_s": {name: [round(one, 1) for one in times] for name, times in seconds.items()},
        "arms": ARMS,
        "steps": config.train.num_steps,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


class _Sides:
    """The four ways, each in a folder that did not exist before.

    Programs that are kept from before stay where they are: jax does not find those of a
    copied folder.
    """

    def __init__(self, config: Config, folder: Path):
        self._folder = folder
        self._recipe = write_recipe(config, folder)
        self._turn = 0

    def warm_up(self) -> None:
        """Prepares the data and the compiled programs that are kept from before."""
        self.one_process()
        self.packed_again()

    def separate(self) -> None:
        """A process for each seed."""
        directory, programs = self._new(), self._new()
        for seed in range(ARMS):
            arguments = [
                f"--workdir={directory / str(seed)}",
                f"--config.train.seed={seed}",
                "--noreport",
            ]
            self._run("train", f"--config={self._recipe}", *arguments, programs=programs)

    def one_process(self) -> None:
        """One after another in one process."""
        self._sweep(self._new(), 1, self._folder / "compiled_one")

    def packed(self) -> None:
        """All side by side, compiled."""
        self._sweep(self._new(), ARMS, self._new())

    def packed_again(self) -> None:
        """All side by side, compiled before."""
        self._sweep(self._new(), ARMS, self._folder / "compiled_pack")

    def _sweep(self, directory: Path, pack: int, programs: Path) -> None:
        arguments = [
            f"--config={self._recipe}",
            f"--seeds={ARMS}",
            f"--pack={pack}",
            f"--dir={directory}",
        ]
        self._run("sweep", *arguments, programs=programs)

    def _new(self) -> Path:
        self._turn += 1
        return self._folder / str(self._turn)

    def _run(self, *arguments: str, programs: Path) -> None:
        """Runs moejax; the user's cache folder, in which it keeps its programs, is `programs`."""
        command = [sys.executable, "-m", "moejax", *arguments]
        environment = os.environ | {"XDG_CACHE_HOME": str(programs)}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would serve all sides
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildError(f"moejax {' '.join(arguments)} failed: {done.stderr[-2000:]}")
