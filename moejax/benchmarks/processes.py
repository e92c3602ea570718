"""Runs the same benchmark in several processes, whose differences no single process shows."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.benchmarks.recipe import ChildError, write_recipe
from moejax.config import Config


def bench_in_processes(
    benchmark: str,
    config: Config | None,
    arguments: Sequence[str],
    num: int,
) -> list[dict[str, Any]]:
    """Runs a benchmark in one process after another.

    Args:
      benchmark: its name.
      config: for a benchmark of a recipe.
      arguments: more flags.
      num: of processes.

    Returns:
      The rows that a process prints, or the one row of a benchmark without rows. A figure that
      differs between processes is `{"median": ..., "lowest": ..., "highest": ...}`; quartiles
      within a process are left out.

    Raises:
      ChildError: a process failed.
    """
    command = [sys.executable, "-m", "moejax", "bench", benchmark]
    with tempfile.TemporaryDirectory() as folder:
        if config:
            recipe = write_recipe(config, Path(folder))
            command.append(f"--config={recipe}")
        command += [*arguments, "--json"]
        tables = [_run(command) for _ in range(num)]
    return [_gathered(rows) for rows in zip(*tables, strict=True)]


def _run(command: list[str]) -> list[dict[str, Any]]:
    """Returns the rows that a benchmark prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = " ".join(command[1:])
        said = done.stderr[-2000:]
        raise ChildError(f"{words} failed: {said}")
    rows = json.loads(done.stdout)
    if isinstance(rows, list):
        return rows
    return [rows]


def _gathered(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns one row for those of all processes."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        if "quartiles" in name:
            continue
        values = [row[name] for row in rows]
        are_numbers = all(isinstance(value, int | float) for value in values)
        if are_numbers and len(set(values)) > 1:
            found[name] = {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
            }
        else:
            found[name] = values[0]
    return found
