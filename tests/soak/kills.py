"""A run that is killed again and again ends like one that nothing disturbed."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from soak.field import Field, difference, end

KILLS = 4
"""How often each run is killed."""


def trial(field: Field, seed: int) -> str:
    """Kills a run `KILLS` times, continues it to its end, and returns what differs or failed."""
    rng = np.random.default_rng(seed)
    workdir = field.new_run(f"kills-{seed}")
    for kill in range(KILLS):
        process = field.start(workdir)
        try:
            _moment(rng)(workdir, rng)
        finally:
            process.kill()
        code, errors = end(process)
        if code not in (-9, 0):  # 0: the run was faster
            return f"start {kill + 1} ended with exit code {code}: {errors[-600:]}"
    code, errors = end(field.start(workdir))
    if code:
        return f"the last start ended with exit code {code}: {errors[-600:]}"
    return difference(workdir, field.undisturbed)


def _moment(rng: np.random.Generator) -> Callable[[Path, np.random.Generator], None]:
    """Draws when to kill: at any time, or close to the beginning of a save or a line of metrics."""
    moments = [_any_time, _while_saving, _while_logging]
    return moments[rng.integers(3)]


def _any_time(workdir: Path, rng: np.random.Generator) -> None:
    time.sleep(rng.uniform(0.0, 8.0))


def _while_saving(workdir: Path, rng: np.random.Generator) -> None:
    before = _names(workdir / "checkpoints")
    _wait(lambda: _names(workdir / "checkpoints") != before)
    time.sleep(rng.uniform(0.0, 0.2))


def _while_logging(workdir: Path, rng: np.random.Generator) -> None:
    before = _size(workdir / "metrics.jsonl")
    _wait(lambda: _size(workdir / "metrics.jsonl") != before)
    time.sleep(rng.uniform(0.0, 0.5))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*")}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _wait(condition: Callable[[], bool], longest_s: float = 15.0) -> None:
    """Waits until a condition holds, but not for ever: the run may have ended before."""
    deadline = time.monotonic() + longest_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
