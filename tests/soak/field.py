"""What all trials of a soak share: a recipe, its prepared rows, and the undisturbed runs."""

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
"""How long to wait for the end of a process: far longer than any takes."""


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
        """Returns an empty place for a run directory."""
        workdir = self.folder / "trials" / name
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        return workdir

    def flags(self, workdir: Path) -> list[str]:
        """Returns the words of `moejax train`."""
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
        """Returns the environment of another process; compiled programs are shared."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(num_devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(self, workdir: Path, *more: str, num_devices: int = 1) -> subprocess.Popen[str]:
        """Starts to train, or to continue, in another process.

        Its error output goes to a file next to the run.
        """
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
    """Waits for a process; returns its exit code, or None if it was killed, and its errors."""
    try:
        code = process.wait(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    return code, process.errors.read_text(errors="replace")  # type: ignore[attr-defined]


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Runs a verb in this process; returns its exit code, -1 for a traceback, output and errors."""
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
    """Returns what is wrong with a refusal, which should be one line and a failing exit code."""
    if code not in (1, 2):
        return f"exit code {code}: {errors[-600:]}"
    if "Traceback" in errors:
        return f"a traceback: {errors[-600:]}"
    own = [line for line in errors.splitlines() if line.startswith("moejax: ")]
    if len(own) != 1:
        return f"{len(own)} lines that begin with 'moejax: ': {errors[-600:]}"
    return ""


def difference(workdir: Path, expected: Path) -> str:
    """Returns how a run's history and last state differ from another's; empty if bitwise equal."""
    return _history_difference(workdir, expected) or state_difference(workdir, expected)


def _history_difference(workdir: Path, expected: Path) -> str:
    actual_lines, expected_lines = list(_lines(workdir)), list(_lines(expected))
    if len(actual_lines) != len(expected_lines):
        return f"{len(actual_lines)} lines of metrics, and {len(expected_lines)} undisturbed"
    for actual, wanted in zip(actual_lines, expected_lines, strict=True):
        if actual != wanted:
            names = sorted(actual.keys() | wanted.keys())
            differing = [name for name in names if actual.get(name) != wanted.get(name)]
            return f"metrics of step {wanted['step']} differ in {', '.join(differing)}"
    files = [path / "alarms.jsonl" for path in (workdir, expected)]
    alarms = {file.read_text() for file in files if file.exists()}
    if len(alarms) > 1:
        return "alarms differ"
    return ""


def _lines(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of the metrics without what depends on the clock and the machine."""
    of_machine = ("perf/", "time/")
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        yield {name: value for name, value in values.items() if not name.startswith(of_machine)}


def state_difference(workdir: Path, expected: Path) -> str:
    """Returns how the newest states differ; empty if all arrays are bitwise equal."""
    actual_leaves = jax.tree_util.tree_leaves_with_path(_state(workdir))
    wanted_leaves = jax.tree.leaves(_state(expected))
    for (path, actual), wanted in zip(actual_leaves, wanted_leaves, strict=True):
        if not np.array_equal(actual, wanted, equal_nan=True):
            return f"{jax.tree_util.keystr(path)} differs in the newest state"
    return ""


def _state(workdir: Path) -> Any:
    from moejax.training.checkpoints.checkpoint import Checkpoints

    content = json.loads((workdir / "config.json").read_text())
    text = json.dumps(content["config"], sort_keys=True)
    return Checkpoints(workdir, _train_setup(text), read_only=True).restore()


@functools.lru_cache(maxsize=4)
def _train_setup(text: str) -> Any:
    """Returns the setup on one device of a configuration in JSON."""
    from moejax.config import resolve
    from moejax.sharding import make_mesh
    from moejax.training.state import make_train_setup

    sections = json.loads(text)
    sections["mesh"] = {"data": 1}
    config = resolve(sections)
    return make_train_setup(config, make_mesh(config, jax.devices()[:1]))
