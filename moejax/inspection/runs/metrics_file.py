"""Reads `metrics.jsonl`, a line of numbers for each logged step, into a series for each metric."""

import math
from array import array
from pathlib import Path
from typing import Any, TypeAlias

from moejax.inspection.runs.errors import RunError, missing_file, unreadable_file
from moejax.training.health.speed import shares_of_pack
from moejax.training.run_directory.reader import LineError, RunDirectory

Series: TypeAlias = dict[str, tuple["array[int]", "array[float]"]]
"""Steps and values of each metric, eight bytes a number; Python objects would need a hundred."""


def read_series(run: RunDirectory) -> Series:
    """Reads a whole file; see `Run.series` for steps that a resumed run wrote again.

    Raises:
      RunError: the file is missing or damaged, or may not be read.
    """
    path = run.metrics
    series: Series = {}
    try:
        for line in run.read_metrics():
            add_values(series, line, path)
    except FileNotFoundError as error:
        raise missing_file(path) from error
    except OSError as error:
        raise unreadable_file(path, error) from error
    except LineError as error:
        raise RunError(f"{path}: {error}; delete that line") from error
    return series


def add_values(series: Series, line: dict[str, Any], path: Path) -> None:
    """Adds a line of `metrics.jsonl` to what is known; see `Run.series` for steps written again.

    Each arm of a pack gets its share of the pack's time.

    Args:
      series: steps and values of each metric; changed in place.
      line: the line's object, with an integer `step`.
      path: of the file, for errors.

    Raises:
      RunError: a value is no number.
    """
    step, shares = line["step"], shares_of_pack(line)
    for key, value in line.items():
        if key == "step":
            continue
        if not isinstance(value, (int, float, type(None))):
            raise RunError(
                f"{path}, step {step}: {key}={value!r} must be a number or null; delete that line"
            )
        steps, values = series.setdefault(key, (array("q"), array("d")))
        while steps and steps[-1] >= step:
            steps.pop()
            values.pop()
        try:
            number = math.nan if value is None else float(value) * shares.get(key, 1.0)
            steps.append(step)
            values.append(number)
        except OverflowError as error:
            raise RunError(
                f"{path}: step {step} or {key} is no number of 64 bits; delete that line"
            ) from error
