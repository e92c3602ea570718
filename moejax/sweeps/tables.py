"""What the rows of a sweep say: comparisons at an equal fraction of the schedule, means over seeds, fronts.

A row is an arm. Columns `override/KEY` are the raw axes, what the sweep itself set; arms that agree
in all of them but `train.seed` are one setting, measured once for each seed. All functions are
pure: frames in, frames out.
"""

import json
import math
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moejax.inspection.runs.token_keys import token_keys

OVERRIDE, MATCHED = "override/", "matched/"
SEED = "override/train.seed"
LOSS, BITS = "final/eval/loss", "final/eval/bits_per_byte"
COLUMNS = (
    "arm",
    "config_hash",
    "status",
    "error",
    "seed",
    "steps",
    "steps_planned",
    "fraction",
    "evaluations",
)
TEXTS = ("arm", "config_hash", "status", "error", "git_commit", "versions", "device", "command", "alarm_rules",
         "evaluations")  # fmt: skip
OF_THE_END = ("final/", "best/", "tail/", "median/", "tokens", "flops_total", "wall_s")
"""How columns begin that no earlier step has."""


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a table: a column for every key of any row, and at least those of `COLUMNS`.

    Axes and matched leaves keep their values as they are, of whatever kinds, and None where an
    arm has none; texts too. All other columns are numbers: NaN where a row has none, or one that
    is not finite.
    """
    names = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name in TEXTS or name.startswith((OVERRIDE, MATCHED)):
            columns[name] = pd.Series(values, dtype=object)
        else:
            columns[name] = pd.Series([_as_number(value) for value in values], dtype=np.float64)
    return pd.DataFrame(columns)


def _as_number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def axes_of(frame: pd.DataFrame) -> list[str]:
    """The raw axes, seeds excluded, on which rows differ; columns of the frame."""
    axes = [str(name) for name in frame.columns if str(name).startswith(OVERRIDE) and name != SEED]
    return [axis for axis in axes if len({key_of(value) for value in frame[axis]}) > 1]


def loss_of(arms: pd.DataFrame) -> str:
    """The column by which arms are compared: the loss in nats per token, or bits per byte where their tokens differ."""
    return BITS if token_keys(axis.removeprefix(OVERRIDE) for axis in axes_of(arms)) else LOSS


def key_of(value: Any) -> Hashable:
    """Equal for equal levels: 4 and 4.0 are one, True and 1 are two; None for a level that is not set."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bool, np.bool_)):
        return ("bool", bool(value))
    if isinstance(value, (int, float, str)):
        return value
    return ("json", json.dumps(value, default=str))


def levels_of(values: Iterable[Any]) -> list[Any]:
    """The different levels that are set: numbers first and increasing, others in the order of their appearance."""
    found: dict[Hashable, Any] = {}
    for value in values:
        found.setdefault(key_of(value), value)
    levels = [value for key, value in found.items() if key is not None]
    numbers = sorted(value for value in levels if is_number(value))
    return numbers + [value for value in levels if not is_number(value)]


def is_number(value: Any) -> bool:
    """Whether a level is a finite number, as a float can hold it; True and False are none."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and bool(abs(value) <= sys.float_info.max)
    )


def at_fraction(frame: pd.DataFrame, fraction: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The arms that can be compared at one fraction of their schedule, and the others.

    At 1 those are the arms that are done and whose last evaluation is finite. Below, those with a
    finite evaluation within half a step of that fraction, whatever became of them later.

    Args:
      frame: of `frame_of`.
      fraction: of the planned steps, above 0 and at most 1.

    Returns:
      The compared arms with the columns `at/step`, `at/eval/loss` and `at/eval/bits_per_byte` (NaN
      where the record does not tell); below a fraction of 1 without the columns that tell of an
      arm's end. And `arm`, `status`, `fraction` and `reason` of those that are left out.

    Raises:
      ValueError: another fraction.
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} must be above 0 and at most 1, which is the end of the schedule"
        )
    evaluated = [_evaluation(row, fraction) for row in frame.to_dict("records")]
    is_compared = np.array([not isinstance(found, str) for found in evaluated], bool)
    left_out = frame.loc[~is_compared, ["arm", "status", "fraction"]].copy()
    left_out["reason"] = pd.Series(
        [x for x in evaluated if isinstance(x, str)], left_out.index, dtype=object
    )
    compared = frame[is_compared].copy()
    if fraction < 1:
        compared = compared.drop(
            columns=[name for name in frame.columns if str(name).startswith(OF_THE_END)]
        )
    kept = [found for found in evaluated if not isinstance(found, str)]
    for i, name in enumerate(("at/step", "at/eval/loss", "at/eval/bits_per_byte")):
        compared[name] = pd.Series([found[i] for found in kept], compared.index, dtype=np.float64)
    return compared.reset_index(drop=True), left_out.reset_index(drop=True)


def _evaluation(row: Mapping[Any, Any], fraction: float) -> tuple[float, float, float] | str:
    """Step, loss and bits per byte, or why there are none."""
    if fraction == 1:
        if row["status"] != "done":
            reached = (
                "" if math.isnan(row["fraction"]) else f" at {row['fraction']:.0%} of its schedule"
            )
            why = f": {row['error']}" if row["error"] else ""
            return f"{row['status']}{reached}{why}"
        loss = row.get(LOSS, math.nan)
        if math.isnan(loss):
            return "its last evaluation is not finite or absent"
        return row["steps"], loss, row.get(BITS, math.nan)
    wanted = fraction * row["steps_planned"]
    for _, step, loss, *bits in json.loads(row["evaluations"] or "[]"):
        if abs(step - wanted) <= 0.5:
            return (
                "its evaluation there is not finite"
                if loss is None
                else (step, loss, _as_number(*(bits or [None])))
            )
    return f"no evaluation at {fraction:g} of its schedule (step {wanted:g})"


def setting_key(overrides: Mapping[str, Any]) -> Hashable:
    """Equal for overrides, by dotted key, that differ in their seed at most; what is None is not set."""
    levels = {
        key: key_of(value) for key, value in overrides.items() if key != SEED.removeprefix(OVERRIDE)
    }
    return frozenset((key, level) for key, level in levels.items() if level is not None)


def settings_of(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A row for each setting, with means of metrics over its seeds.

    Args:
      frame: arms, all at an equal fraction of the schedule: from `at_fraction`.
      metrics: columns; one that the frame lacks is NaN throughout.

    Returns:
      The raw axes (also those with one level) but the seed, `arms` (a tuple), and of each metric
      its mean, under its own name, with its standard error `METRIC/se` (sample deviation over the
      root of n; NaN of a single value) and `METRIC/n`, the number of arms that have the metric. In
      the order of the frame.
    """
    axes = [str(name) for name in frame.columns if str(name).startswith(OVERRIDE) and name != SEED]
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    for i, levels in enumerate(
        zip(*(frame[axis] for axis in axes), strict=True) if axes else [()] * len(frame)
    ):
        groups.setdefault(tuple(key_of(level) for level in levels), []).append(i)
    members = list(groups.values())
    first = [rows[0] for rows in members]
    columns: dict[str, Any] = {
        axis: pd.Series([frame[axis].iloc[i] for i in first], dtype=object) for axis in axes
    }
    columns["arms"] = pd.Series([tuple(frame["arm"].iloc[rows]) for rows in members], dtype=object)
    for metric in metrics:
        values = (
            frame[metric].to_numpy(np.float64) if metric in frame else np.full(len(frame), np.nan)
        )
        summaries = [_summary(values[rows]) for rows in members]
        for i, name in enumerate((metric, f"{metric}/se", f"{metric}/n")):
            columns[name] = pd.Series(
                [summary[i] for summary in summaries], dtype=np.float64 if i < 2 else np.int64
            )
    return pd.DataFrame(columns)


def _summary(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, standard error and number of the values that are finite."""
    values = values[np.isfinite(values)]
    n = len(values)
    with np.errstate(over="ignore"):  # of values near the largest that a float holds
        mean = float(values.mean()) if n else math.nan
        error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return mean, error, n


def over_seeds(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One metric by setting: the raw axes but the seed, `n`, `mean`, `se` (NaN if n is 1) and `arms`.

    Args:
      frame: arms at an equal fraction of the schedule.
      metric: a column.
    """
    found = settings_of(frame, [metric])
    names = {metric: "mean", f"{metric}/se": "se", f"{metric}/n": "n"}
    axes = [name for name in found.columns if str(name).startswith(OVERRIDE)]
    return found.rename(columns=names)[[*axes, "n", "mean", "se", "arms"]]


def pareto_front(settings: pd.DataFrame, metrics: Sequence[str]) -> np.ndarray:
    """Which rows no other row beats: none is as low in all metrics and lower in one.

    Args:
      settings: a table with the metrics, all to be minimised.
      metrics: columns of it.

    Returns:
      A bool for each row; False for rows that lack one of the metrics. Of equal rows, all or
      none are True.
    """
    values_RM = settings[list(metrics)].to_numpy(np.float64)
    is_known_R = np.isfinite(values_RM).all(axis=1)

    def is_beaten(row_M: np.ndarray) -> bool:
        return bool(
            ((values_RM <= row_M).all(axis=1) & (values_RM < row_M).any(axis=1) & is_known_R).any()
        )

    return np.array(
        [known and not is_beaten(row) for row, known in zip(values_RM, is_known_R, strict=True)],
        bool,
    )
