"""From the start of `moejax train` to the end of its first step, with and without compiled programs from before."""

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

FIRST_STEP = "step 1/"
"""What the log says at the end of the first step."""


def bench_start(config: Config, repetitions: int) -> dict[str, Any]:
    """Times processes of their own: `first` finds no compiled program, `again` those of a start before."""
    seconds: dict[str, list[float]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(config, folder)
        _start(recipe, folder / "warm-up", folder / "kept")  # prepares the data, and keeps programs
        for turn in range(repetitions):
            seconds["first"].append(
                _start(recipe, folder / f"{turn}-first", folder / f"{turn}-kept")
            )
            seconds["again"].append(_start(recipe, folder / f"{turn}-again", folder / "kept"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "ratio_again_to_first": round(medians["again"] / medians["first"], 3),
        **{f"{name}_s": round(median, 2) for name, median in medians.items()},
        "each_s": {name: [round(one, 2) for one in times] for name, times in seconds.items()},
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


def _start(recipe: Path, workdir: Path, programs: Path) -> float:
    """Starts to train, and ends that after the first step; the seconds until then.

    Raises:
      ChildError: it ended before.
    """
    command = [
        sys.executable,
        "-m",
        "moejax",
        "train",
        f"--config={recipe}",
        f"--workdir={workdir}",
        "--noreport",
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(programs)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    started, said = time.perf_counter(), []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            said.append(line)
            if line.startswith(FIRST_STEP):
                seconds = time.perf_counter() - started
                process.kill()
                return seconds
    raise ChildError(f"moejax train ended before its first step: {''.join(said)[-2000:]}")
