"""Times `moejax train` from its start to the end of its first step, by its compilation cache."""

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

FIRST_STEP = "step 1/"
"""What the log says at the end of the first step."""


def bench_start(config: Config, repetitions: int) -> dict[str, Any]:
    """Times processes that find no compiled program (`first`) or all that they need (`again`)."""
    seconds: dict[str, list[float]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(config, folder)
        filled_cache = folder / "kept"
        _start(recipe, folder / "warm-up", filled_cache)  # prepares the data, and fills the cache
        for turn in range(repetitions):
            empty_cache = folder / f"{turn}-kept"
            first = _start(recipe, folder / f"{turn}-first", empty_cache)
            again = _start(recipe, folder / f"{turn}-again", filled_cache)
            seconds["first"].append(first)
            seconds["again"].append(again)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "ratio_again_to_first": round(medians["again"] / medians["first"], 3),
        "first_s": round(medians["first"], 2),
        "again_s": round(medians["again"], 2),
        "each_s": {name: rounded(times, 2) for name, times in seconds.items()},
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


def _start(recipe: Path, workdir: Path, programs: Path) -> float:
    """Starts to train, ends that after the first step, and returns the seconds until then.

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
    environment = with_cache(programs)
    lines = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr or ():
            lines.append(line)
            if line.startswith(FIRST_STEP):
                seconds = time.perf_counter() - started
                process.kill()
                return seconds
    said = "".join(lines)[-2000:]
    raise ChildError(f"moejax train ended before its first step: {said}")
