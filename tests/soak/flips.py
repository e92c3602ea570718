"""A flipped bit in any file of a run is refused in one line, or changes nothing."""

import os
import shutil
from pathlib import Path

import numpy as np

from soak.field import NUM_STEPS, SAVED_EVERY, Field, call, difference, refusal, state_difference

CONTINUED_FROM = NUM_STEPS - 2 * SAVED_EVERY


def trial(field: Field, seed: int) -> str:
    """Flips a bit of a run that stopped early, uses the run, and returns what was wrong."""
    rng = np.random.default_rng(seed)
    workdir = field.new_run(f"flips-{seed}")
    shutil.copytree(field.undisturbed, workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        is_later = checkpoint.name.isdigit() and int(checkpoint.name) > CONTINUED_FROM
        if is_later:
            shutil.rmtree(checkpoint)
    path = _any_file(workdir, rng)
    name = path.relative_to(workdir)
    _flip(path, rng)
    problem = _evaluate(workdir) or _continue(field, workdir)
    shutil.rmtree(workdir)
    return f"{name}: {problem}" if problem else ""


def _any_file(workdir: Path, rng: np.random.Generator) -> Path:
    """Draws a file that is not empty; small files are as likely as large ones."""
    paths = sorted(workdir.rglob("*"))
    files = [path for path in paths if path.is_file() and path.stat().st_size]
    return files[rng.integers(len(files))]


def _flip(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    place = rng.integers(len(data))
    data[place] ^= 1 << rng.integers(8)
    os.chmod(path, 0o644)
    path.write_bytes(data)


def _evaluate(workdir: Path) -> str:
    """Evaluates, and returns what is wrong with a refusal; the continued run checks numbers."""
    code, _, errors = call(["eval", f"--workdir={workdir}", "--json"])
    return refusal(code, errors) if code else ""


def _continue(field: Field, workdir: Path) -> str:
    code, _, errors = call(field.flags(workdir))
    if code:
        return refusal(code, errors)
    problem = difference(workdir, field.undisturbed)
    is_history_lost = "history" in errors or "is damaged" in errors
    if problem and is_history_lost:  # it was reported, and changes no number of the model
        return state_difference(workdir, field.undisturbed)
    return problem
