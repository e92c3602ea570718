"""Tables of a sweep's rows: equal fractions of the schedule, means over seeds, Pareto fronts.

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
    "arm", "config_hash", "status", "error", "seed", "steps", "steps_planned", "fraction",
    "evaluations",
)  # fmt: skip
TEXTS = (
    "arm", "config_hash", "status", "error", "git_commit", "versions", "device", "command",
    "alarm_rules", "evaluations",
)  # fmt: skip
OF_THE_END = ("final/", "best/", "tail/", "median/", "tokens", "flops_total", "wall_s")
"""Prefixes of the columns that describe an arm's end, and no earlier step."""
AT_FRACTION = ("at/step", "at/eval/loss", "at/eval/bits_per_byte")


def frame_of(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns rows as a table: a column for every key of any row, and at least those of `COLUMNS`.

    Axes, matched leaves and texts keep their values as they are, of whatever kinds, and have None
    where an arm has no value. All other columns are numbers: NaN where a row has no number, or one
    that is not finite.
    """
    names = dict.fromkeys(COLUMNS)
    for row in rows:
        names |= dict.fromkeys(row)
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
    """Returns the columns of the raw axes, seeds excluded, on which rows differ."""
    return [
        axis for axis in _setting_axes(frame) if frame[axis].map(key_of).nunique(dropna=False) > 1
    ]


def _setting_axes(frame: pd.DataFrame) -> list[str]:
    """Returns the columns of the raw axes, seeds excluded."""
    return [str(name) for name in frame.columns if str(name).startswith(OVERRIDE) and name != SEED]


def loss_of(arms: pd.DataFrame) -> str:
    """Returns the column by which arms are compared.

    That is the loss in nats per token, or bits per byte where the tokens of the arms differ.
    """
    keys = [axis.removeprefix(OVERRIDE) for axis in axes_of(arms)]
    return BITS if token_keys(keys) else LOSS


def key_of(value: Any) -> Hashable:
    """Returns a key that is equal for equal levels, and None for a level that is not set.

    4 and 4.0 are one level, True and 1 are two.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bool, np.bool_)):
        return ("bool", bool(value))
    if isinstance(value, (int, float, str)):
        return value
    return ("json", json.dumps(value, default=str))


def levels_of(values: Iterable[Any]) -> list[Any]:
    """Returns the different levels that are set.

    Numbers are first, in increasing order; others are in the order of their appearance.
    """
    by_key: dict[Hashable, Any] = {}
    for value in values:
        by_key.setdefault(key_of(value), value)
    by_key.pop(None, None)
    numbers = []
    others = []
    for level in by_key.values():
        if is_number(level):
            numbers.append(level)
        else:
            others.append(level)
    return sorted(numbers) + others


def is_number(value: Any) -> bool:
    """Whether a level is a finite number that a float can hold; True and False are no numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return bool(abs(value) <= sys.float_info.max)


def at_fraction(frame: pd.DataFrame, fraction: float = 1.0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the arms that can be compared at one fraction of their schedule, and the others.

    At 1 those are the arms that are done and whose last evaluation is finite. Below, those with a
    finite evaluation within half a step of that fraction, whatever became of them later.

    Args:
      frame: of `frame_of`.
      fraction: of the planned steps, above 0 and at most 1.

    Returns:
      The compared arms with the columns `at/step`, `at/eval/loss` and `at/eval/bits_per_byte` (NaN
      where the record has no value); below a fraction of 1 without the columns that describe an
      arm's end. And `arm`, `status`, `fraction` and `reason` of those that are left out.

    Raises:
      ValueError: another fraction.
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} must be above 0 and at most 1, which is the end of the schedule"
        )
    is_compared, values, reasons = [], [], []
    for row in frame.to_dict("records"):
        found = _evaluation_at_end(row) if fraction == 1 else _evaluation_at(row, fraction)
        is_compared.append(not isinstance(found, str))
        if isinstance(found, str):
            reasons.append(found)
        else:
            values.append(found)
    is_compared_R = np.array(is_compared, bool)

    left_out = frame.loc[~is_compared_R, ["arm", "status", "fraction"]].copy()
    left_out["reason"] = pd.Series(reasons, left_out.index, dtype=object)

    compared = frame[is_compared_R].copy()
    if fraction < 1:
        of_the_end = [name for name in frame.columns if str(name).startswith(OF_THE_END)]
        compared = compared.drop(columns=of_the_end)
    values_R3 = np.array(values, np.float64).reshape(-1, len(AT_FRACTION))
    compared[list(AT_FRACTION)] = values_R3
    return compared.reset_index(drop=True), left_out.reset_index(drop=True)


def _evaluation_at_end(row: Mapping[Any, Any]) -> tuple[float, float, float] | str:
    """Returns the last step with its loss and bits per byte, or why an arm has no final loss."""
    if row["status"] != "done":
        reason = row["status"]
        if not math.isnan(row["fraction"]):
            reason += f" at {row['fraction']:.0%} of its schedule"
        if row["error"]:
            reason += f": {row['error']}"
        return reason
    loss = row.get(LOSS, math.nan)
    bits = row.get(BITS, math.nan)
    if math.isnan(loss):
        return "its last evaluation is not finite or absent"
    return row["steps"], loss, bits


def _evaluation_at(row: Mapping[Any, Any], fraction: float) -> tuple[float, float, float] | str:
    """Returns the step at a fraction below 1 with its loss and bits per byte, or why not."""
    wanted = fraction * row["steps_planned"]
    evaluations = json.loads(row["evaluations"] or "[]")
    for _, step, loss, *bits in evaluations:
        if abs(step - wanted) > 0.5:
            continue
        if loss is None:
            return "its evaluation there is not finite"
        bits_per_byte = bits[0] if bits else None  # older records have none
        return step, loss, _as_number(bits_per_byte)
    return f"no evaluation at {fraction:g} of its schedule (step {wanted:g})"


def setting_key(overrides: Mapping[str, Any]) -> Hashable:
    """Returns a key that is equal for overrides that differ in nothing but their seed.

    Args:
      overrides: values by dotted key; a value of None is not set.
    """
    levels = set()
    for key, value in overrides.items():
        level = key_of(value)
        if level is not None and key != SEED.removeprefix(OVERRIDE):
            levels.add((key, level))
    return frozenset(levels)


def settings_of(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Returns a row for each setting, with means of metrics over its seeds.

    Args:
      frame: arms, all at an equal fraction of the schedule: from `at_fraction`.
      metrics: columns; one that the frame lacks is NaN throughout.

    Returns:
      The raw axes (also those with one level) but the seed, `arms` (a tuple), and of each metric
      its mean, under its own name, with its standard error `METRIC/se` (sample deviation over the
      root of n; NaN of a single value) and `METRIC/n`, the number of arms that have the metric. In
      the order of the frame.
    """
    axes = _setting_axes(frame)
    numbers = _setting_numbers(frame, axes)
    by_setting = numbers.groupby(numbers)
    rows_by_setting = list(by_setting.indices.values())
    is_first = ~numbers.duplicated().to_numpy()
    settings = frame.loc[is_first, axes].reset_index(drop=True)
    arms = []
    for rows in rows_by_setting:
        arms.append(tuple(frame["arm"].iloc[rows]))
    settings["arms"] = pd.Series(arms, dtype=object)
    columns = [settings]
    for metric in metrics:
        values = frame[metric] if metric in frame else pd.Series(math.nan, frame.index)
        columns.append(_summarize_metric(metric, values, rows_by_setting))
    return pd.concat(columns, axis=1)


def _summarize_metric(
    metric: str, values: pd.Series, rows_by_setting: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Returns the mean, the standard error and the number of a metric's values by setting."""
    values_R = values.to_numpy(np.float64)
    # Not pandas' mean: it adds the values in another order, so that last digits would differ.
    summaries = [_summarize(values_R[rows]) for rows in rows_by_setting]
    types = {
        metric: np.float64,
        f"{metric}/se": np.float64,
        f"{metric}/n": np.int64,
    }
    return pd.DataFrame(summaries, columns=list(types)).astype(types)


def _setting_numbers(frame: pd.DataFrame, axes: Sequence[str]) -> pd.Series:
    """Returns the number of each arm's setting; settings are numbered as they appear."""
    keys_by_axis = []
    for axis in axes:
        keys_by_axis.append([key_of(level) for level in frame[axis]])
    known: dict[Hashable, int] = {}
    numbers = []
    for row in range(len(frame)):
        setting = tuple(keys[row] for keys in keys_by_axis)
        number = known.setdefault(setting, len(known))
        numbers.append(number)
    return pd.Series(numbers, dtype=np.int64)


def _summarize(values: np.ndarray) -> tuple[float, float, int]:
    """Returns the mean, the standard error and the number of the values that are finite."""
    finite = values[np.isfinite(values)]
    n = len(finite)
    mean = error = math.nan
    with np.errstate(over="ignore"):  # of values near the largest that a float can hold
        if n:
            mean = float(finite.mean())
        if n > 1:
            deviation = float(finite.std(ddof=1))
            error = deviation / math.sqrt(n)
    return mean, error, n


def over_seeds(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns one metric by setting.

    Its columns are the raw axes but the seed, `n`, `mean`, `se` (NaN if n is 1) and `arms`.

    Args:
      frame: arms at an equal fraction of the schedule.
      metric: a column.
    """
    found = settings_of(frame, [metric])
    names = {
        metric: "mean",
        f"{metric}/se": "se",
        f"{metric}/n": "n",
    }
    columns = [*_setting_axes(found), "n", "mean", "se", "arms"]
    return found.rename(columns=names)[columns]


def pareto_front(settings: pd.DataFrame, metrics: Sequence[str]) -> np.ndarray:
    """Returns which rows no other row beats: none is as low in all metrics and lower in one.

    Args:
      settings: a table with the metrics, all to be minimised.
      metrics: columns of it.

    Returns:
      A bool for each row; False for rows that lack one of the metrics. Of equal rows, all or
      none are True.
    """
    values_RM = settings[list(metrics)].to_numpy(np.float64)
    is_known_R = np.isfinite(values_RM).all(axis=1)

    is_on_front_R = is_known_R.copy()
    for r, row_M in enumerate(values_RM):
        is_as_low_R = (values_RM <= row_M).all(axis=1)
        is_lower_R = (values_RM < row_M).any(axis=1)
        beats_row_R = is_as_low_R & is_lower_R & is_known_R
        if beats_row_R.any():
            is_on_front_R[r] = False
    return is_on_front_R
