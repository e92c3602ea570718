"""Reads `metrics.jsonl`, a line of numbers for each logged step, into a series for each metric."""

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from moejax.inspection.runs.errors import RunError, missing_file, unreadable_file
from moejax.training.health.speed import shares_of_pack

Series: TypeAlias = dict[str, tuple["array[int]", "array[float]"]]
"""Steps and values of each metric, eight bytes a number; Python objects would need a hundred."""


def read_series(path: Path) -> Series:
    """Reads a whole file; see `Run.series` for steps that a resumed run wrote again.

    Raises:
      RunError: the file is missing or damaged, or may not be read.
    """
    series: Series = {}
    for line in _read_lines(path):
        add_values(series, line, path)
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


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of `metrics.jsonl`; a last line that a crash cut off is left out."""
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise missing_file(path) from error
    except OSError as error:
        raise unreadable_file(path, error) from error
    damage: tuple[int, Exception] | None = None
    with file:
        for number, line in enumerate(file, start=1):
            # A damaged line may be one that a crash cut off, if nothing follows it.
            if damage and line.strip():
                raise RunError(
                    f"{path}: line {damage[0]} is damaged ({damage[1]}); delete that line"
                ) from damage[1]
            if damage:
                continue
            try:
                values = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                damage = number, error
                continue
            if not isinstance(values, dict) or type(values.get("step")) is not int:
                raise RunError(
                    f"{path}: line {number} must be a JSON object with an integer `step`; "
                    "delete that line"
                )
            yield values
