"""Measures what packing arms saves: a packed sweep of seeds against the same runs in sequence.

Every side is what a user would start, from the start of the process to the last checkpoint: `moejax
train` for each seed, of which the first compiles and the others find its programs in the cache; one
process that trains one after another, with a filled compilation cache; and the pack, which compiles
(`packed`) or finds its programs in the cache (`packed_again`).
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from moejax.benchmarks.recipe import ChildError, with_cache, write_recipe
from moejax.benchmarks.timing import rounded
from moejax.config import Config

ARMS = 8
"""Seeds that are trained."""


def bench_packed(config: Config, repetitions: int) -> dict[str, Any]:
    """Times the four in turn; ratios are of medians, and `each_s` has the seconds of every turn."""
    seconds: dict[str, list[float]] = {
        "separate": [],
        "one_process": [],
        "packed": [],
        "packed_again": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        sides = _Sides(config, Path(folder))
        sides.warm_up()
        for _ in range(repetitions):
            for name, times in seconds.items():
                run_side = getattr(sides, name)
                started = time.perf_counter()
                run_side()
                times.append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    medians_s = {f"{name}_s": round(median, 1) for name, median in medians.items()}
    return {
        "separate_over_packed": round(medians["separate"] / medians["packed"], 2),
        "one_process_over_packed_again": round(medians["one_process"] / medians["packed_again"], 2),
        **medians_s,
        "each_s": {name: rounded(times, 1) for name, times in seconds.items()},
        "arms": ARMS,
        "steps": config.train.num_steps,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


class _Sides:
    """The four ways, each in a folder that did not exist before.

    Compilation caches that are kept stay where they are: jax does not find the programs of a copied
    folder.
    """

    def __init__(self, config: Config, folder: Path):
        self._folder = folder
        self._recipe = write_recipe(config, folder)
        self._turn = 0

    def warm_up(self) -> None:
        """Prepares the data, and fills the compilation caches that are kept."""
        self.one_process()
        self.packed_again()

    def separate(self) -> None:
        """Trains each seed in a process of its own."""
        directory = self._new_folder()
        programs = self._new_folder()
        for seed in range(ARMS):
            arguments = [
                f"--workdir={directory / str(seed)}",
                f"--config.train.seed={seed}",
                "--noreport",
            ]
            self._run("train", f"--config={self._recipe}", *arguments, programs=programs)

    def one_process(self) -> None:
        """Trains one seed after another in one process."""
        self._sweep(self._new_folder(), 1, self._folder / "compiled_one")

    def packed(self) -> None:
        """Trains all seeds side by side, and compiles."""
        self._sweep(self._new_folder(), ARMS, self._new_folder())

    def packed_again(self) -> None:
        """Trains all seeds side by side, with a filled compilation cache."""
        self._sweep(self._new_folder(), ARMS, self._folder / "compiled_pack")

    def _sweep(self, directory: Path, pack: int, programs: Path) -> None:
        arguments = [
            f"--config={self._recipe}",
            f"--seeds={ARMS}",
            f"--pack={pack}",
            f"--dir={directory}",
        ]
        self._run("sweep", *arguments, programs=programs)

    def _new_folder(self) -> Path:
        self._turn += 1
        return self._folder / str(self._turn)

    def _run(self, *arguments: str, programs: Path) -> None:
        """Runs moejax with a compilation cache in `programs`."""
        command = [sys.executable, "-m", "moejax", *arguments]
        environment = with_cache(programs)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            words = " ".join(arguments)
            said = done.stderr[-2000:]
            raise ChildError(f"moejax {words} failed: {said}")
