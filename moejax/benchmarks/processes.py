"""The same benchmark in several processes: what differs between them, turns within one process do not show."""

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
    benchmark: str, config: Config | None, arguments: Sequence[str], num: int
) -> list[dict[str, Any]]:
    """Runs a benchmark in one process after the other.

    Args:
      benchmark: its name.
      config: for a benchmark of a recipe.
      arguments: more flags.
      num: of processes.

    Returns:
      The rows that a process gives, one row for a benchmark without rows. A figure that differs
      between processes is `{"median": ..., "lowest": ..., "highest": ...}`; quartiles within a
      process are left out.

    Raises:
      ChildError: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--config={write_recipe(config, Path(folder))}"] if config else []
        command = [sys.executable, "-m", "moejax", "bench", benchmark, *flags, *arguments, "--json"]
        runs = [_run(command) for _ in range(num)]
    return [_gathered(rows) for rows in zip(*runs, strict=True)]


def _run(command: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildError(f"{' '.join(command[1:])} failed: {done.stderr[-2000:]}")
    rows = json.loads(done.stdout)
    return rows if isinstance(rows, list) else [rows]


def _gathered(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for those of all processes."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if "quartiles" in name:
            continue
        if all(isinstance(value, int | float) for value in values) and len(set(values)) > 1:
            found[name] = {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
            }
        else:
            found[name] = values[0]
    return found
