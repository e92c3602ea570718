"""What all trials of a soak share: a recipe, its prepared rows, and the runs that nothing disturbed."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

REPOSITORY = Path(__file__).parents[2]
RECIPE = REPOSITORY / "configs/debug.py"
NUM_STEPS = 40
SAVED_EVERY = 5
LONGEST_S = 300.0
"""Until a process that should have ended is given up: far longer than any takes."""


@dataclasses.dataclass(frozen=True)
class Field:
    """Folders below one temporary folder.

    Attributes:
      folder: of everything.
    """

    folder: Path

    @property
    def undisturbed(self) -> Path:
        """A run on one device that nothing disturbed, with all its checkpoints."""
        return self.folder / "undisturbed"

    @property
    def undisturbed_by_two(self) -> Path:
        """The same on two devices."""
        return self.folder / "undisturbed-by-two"

    def new_run(self, name: str) -> Path:
        """An empty place for a run directory."""
        workdir = self.folder / "trials" / name
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        return workdir

    def flags(self, workdir: Path) -> list[str]:
        """Of `moejax train`."""
        leaves = {
            "data.directory": self.folder / "data",
            "train.num_steps": NUM_STEPS,
            "train.checkpoint_every": SAVED_EVERY,
            "train.keep_checkpoints": 20,
            "train.log_every": 2,
            "train.eval_every": 20,
            "alarms.stop": "",
        }
        settings = [f"--config.{key}={value}" for key, value in leaves.items()]
        return [
            "train",
            f"--config={RECIPE}",
            f"--workdir={workdir}",
            "--noreport",
            "--json",
            *settings,
        ]

    def environment(self, num_devices: int = 1) -> dict[str, str]:
        """Of a process of its own; compiled programs are shared."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(num_devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(self, workdir: Path, *more: str, num_devices: int = 1) -> subprocess.Popen[str]:
        """Starts to train, or to continue, in a process of its own; its error output goes to a file beside the run."""
        errors = workdir.with_suffix(f".errors-{time.monotonic_ns()}")
        with errors.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "moejax", *self.flags(workdir), *more],
                env=self.environment(num_devices),
                stdout=subprocess.DEVNULL,
                stderr=file,
                text=True,
            )
        process.errors = errors  # type: ignore[attr-defined]
        return process


def make_field(folder: Path) -> Field:
    """Trains the undisturbed runs; what they compile and prepare, the trials find."""
    field = Field(folder)
    for workdir, num_devices in ((field.undisturbed, 1), (field.undisturbed_by_two, 2)):
        process = field.start(workdir, num_devices=num_devices)
        code, errors = end(process)
        if code:
            raise RuntimeError(f"the undisturbed run failed with exit code {code}:\n{errors}")
    return field


def end(process: subprocess.Popen[str], within_s: float = LONGEST_S) -> tuple[int | None, str]:
    """Waits for a process; its exit code and what it wrote to standard error. None if it had to be killed."""
    try:
        code = process.wait(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    return code, process.errors.read_text(errors="replace")  # type: ignore[attr-defined]


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Runs a verb in this process: its exit code, output and errors. A traceback counts as exit code -1."""
    import logging

    from moejax.cli import main

    out, errors = io.StringIO(), io.StringIO()
    logging.getLogger().handlers.clear()  # the next call writes to this call's errors
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException as error:
            code = -1
            print(f"Traceback: {type(error).__name__}: {error}", file=errors)
    return code, out.getvalue(), errors.getvalue()


def refusal(code: int | None, errors: str) -> str:
    """What is wrong with a refusal; empty if it is one line of moejax and a failure's exit code."""
    if code not in (1, 2):
        return f"exit code {code}: {errors[-600:]}"
    if "Traceback" in errors:
        return f"a traceback: {errors[-600:]}"
    own = [line for line in errors.splitlines() if line.startswith("moejax: ")]
    if len(own) != 1:
        return f"{len(own)} lines that begin with 'moejax: ': {errors[-600:]}"
    return ""


def difference(workdir: Path, expected: Path) -> str:
    """How a run's history and last state differ from those of another; empty if they are equal to the last bit."""
    return _history_difference(workdir, expected) or state_difference(workdir, expected)


def _history_difference(workdir: Path, expected: Path) -> str:
    actual_lines, expected_lines = list(_lines(workdir)), list(_lines(expected))
    if len(actual_lines) != len(expected_lines):
        return f"{len(actual_lines)} lines of metrics, and {len(expected_lines)} undisturbed"
    for actual, wanted in zip(actual_lines, expected_lines, strict=True):
        if actual != wanted:
            keys = sorted(
                key for key in actual.keys() | wanted.keys() if actual.get(key) != wanted.get(key)
            )
            return f"metrics of step {wanted['step']} differ in {', '.join(keys)}"
    alarms = [
        (path / "alarms.jsonl").read_text()
        for path in (workdir, expected)
        if (path / "alarms.jsonl").exists()
    ]
    if len(set(alarms)) > 1:
        return "alarms differ"
    return ""


def _lines(workdir: Path) -> Iterator[dict[str, Any]]:
    """The lines of the metrics without what depends on the clock and the machine."""
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        yield {
            key: value for key, value in values.items() if not key.startswith(("perf/", "time/"))
        }


def state_difference(workdir: Path, expected: Path) -> str:
    """How the newest states differ; empty if all arrays are equal to the last bit."""
    actual_leaves = jax.tree_util.tree_leaves_with_path(_state(workdir))
    wanted_leaves = jax.tree.leaves(_state(expected))
    for (path, actual), wanted in zip(actual_leaves, wanted_leaves, strict=True):
        if not np.array_equal(actual, wanted, equal_nan=True):
            return f"{jax.tree_util.keystr(path)} differs in the newest state"
    return ""


def _state(workdir: Path) -> Any:
    from moejax.training.checkpoints.checkpoint import Checkpoints

    return Checkpoints(workdir, _trainable(workdir / "config.json"), read_only=True).restore()


@functools.lru_cache(maxsize=4)
def _trainable_of(text: str) -> Any:
    from moejax.config import resolve
    from moejax.sharding import make_mesh
    from moejax.training.state import make_train_setup

    sections = json.loads(text)
    sections["mesh"] = {"data": 1}
    config = resolve(sections)
    return make_train_setup(config, make_mesh(config, jax.devices()[:1]))


def _trainable(path: Path) -> Any:
    return _trainable_of(json.dumps(json.loads(path.read_text())["config"], sort_keys=True))
