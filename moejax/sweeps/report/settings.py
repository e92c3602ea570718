"""A sweep's settings: numbered by loss, with one of them as reference, and values in words."""

import collections
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moejax.inspection.analysis.differences import Difference
from moejax.inspection.figures.style import short_number
from moejax.sweeps.tables import BITS, LOSS, OVERRIDE, loss_of, setting_key, settings_of

METRICS: Mapping[str, tuple[str, str]] = {
    LOSS: ("eval loss", "nats per token"),
    BITS: ("bits per byte", "bits"),
    "tail/moe/max_violation": ("MaxVio", "busiest / mean - 1"),
    "tail/moe/dropped": ("drop rate", "share"),
    "step_s": ("step time", "s"),
    "median/perf/tokens_per_s": ("tokens per second", "tokens/s"),
    "params_total": ("parameters", "in total"),
    "params_active": ("active", "parameters of a token"),
    "flops_per_token": ("FLOPs per token", "FLOPs"),
}
"""Columns of the table: name and unit of each."""

METRIC_KEYS = tuple(METRICS)
COUNTS = ("params_total", "params_active", "flops_per_token")
NUMBER, PLANNED = "number", "planned"
ROUNDING = 1e-9  # of a value: means of equal values differ by less


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """Returns names of columns of axes: the leaf, with its section where two have the same leaf."""
    num_axes = collections.Counter(map(_leaf, axes))
    names = {}
    for axis in axes:
        leaf = _leaf(axis)
        is_unique = num_axes[leaf] == 1
        names[axis] = leaf if is_unique else axis.removeprefix(OVERRIDE)
    return names


def _leaf(axis: str) -> str:
    key = axis.removeprefix(OVERRIDE)
    _, _, leaf = key.rpartition(".")
    return leaf


def numbered_settings(
    compared: pd.DataFrame, metrics: Sequence[str], planned: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """Returns the settings, numbered from 1 as tables and figures name them.

    The lowest loss (see `loss_of`) comes first. Settings of which some arms are not compared come
    last: their loss is a mean over the arms that survived.

    Args:
      compared: of `sweep_tables.at_fraction`.
      metrics: columns of it, that of the loss among them.
      planned: entries of all arms in `sweep.json`.

    Returns:
      What `settings_of` does, with `number`, and `planned`: how many arms of the setting
      there were to be.
    """
    settings = settings_of(compared, metrics)
    settings[PLANNED] = _planned_arms(settings, planned)
    losses = settings[loss_of(compared)]
    order = np.lexsort((losses, is_partial(settings)))  # the last key is the first to sort by
    settings = settings.iloc[order]
    settings = settings.reset_index(drop=True)
    numbers = range(1, len(settings) + 1)
    settings.insert(0, NUMBER, numbers)
    return settings


def _planned_arms(settings: pd.DataFrame, planned: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns for each setting how many arms there were to be, at least those that there are."""
    keys = [setting_key(entry["overrides"]) for entry in planned]
    num_planned = collections.Counter(keys)
    counts = []
    for row in settings.to_dict("records"):
        num_arms = len(row["arms"])
        key = setting_key(_overrides(row))
        num_arms_planned = num_planned[key]
        counts.append(max(num_arms, num_arms_planned))
    return counts


def is_partial(settings: pd.DataFrame) -> np.ndarray:
    """Returns for each setting whether some of its arms are not compared."""
    num_arms = settings["arms"].map(len)
    has_missing = settings[PLANNED] > num_arms
    return has_missing.to_numpy(bool)


def _overrides(row: Mapping[Any, Any]) -> dict[str, Any]:
    columns = [name for name in row if name.startswith(OVERRIDE)]
    return {name.removeprefix(OVERRIDE): row[name] for name in columns}


def varies(values: pd.Series | None) -> bool:
    """Returns whether a metric is there and differs by more than means are rounded."""
    if values is None:
        return False
    known = values.dropna()
    if len(known) < 2:
        return False
    spread, largest = float(np.ptp(known)), float(known.abs().max())
    return spread > ROUNDING * largest


def constants_in_words(table: pd.DataFrame, metrics: Collection[str], rows: str) -> str:
    """Names metrics that are the same in all rows, which need neither a column nor a figure.

    Args:
      table: some of its rows may lack a metric.
      metrics: keys of `METRICS` to look at.
      rows: what the table's rows are.
    """
    in_all: list[str] = []
    in_some: list[str] = []
    for metric in METRICS:
        if metric not in metrics or metric not in table:
            continue
        values = table[metric].dropna()
        if values.empty or varies(values):
            continue
        name, _ = METRICS[metric]
        value = value_in_words(metric, float(values.iloc[0]))
        said = f"{name} {value}"
        if len(values) == len(table):
            in_all.append(said)
        else:
            in_some.append(f"{said} ({len(values)} of {len(table)})")
    sentences = []
    if in_all:
        sentences.append(f"The same in all {rows}: {', '.join(in_all)}.")
    if in_some:
        sentences.append(f"The same in the {rows} that have it: {', '.join(in_some)}.")
    return " ".join(sentences)


def reference_setting(
    rows: Sequence[Mapping[Any, Any]], planned: Sequence[Mapping[str, Any]]
) -> Mapping[Any, Any]:
    """Returns the setting that the others are compared with.

    This is the dense control, or without one the first of the sweep. It is chosen before anything
    is measured: the best of many would owe part of its lead to chance.

    Args:
      rows: of `numbered_settings`, at least one.
      planned: entries of all arms in `sweep.json`.
    """
    dense = [row for row in rows if is_dense(row)]
    candidates = dense or rows
    place_of = {}
    for place, entry in enumerate(planned):
        arm = entry["id"]
        place_of[arm] = place
    last = len(place_of)

    def first_place(row: Mapping[Any, Any]) -> int:
        places = [place_of.get(arm, last) for arm in row["arms"]]
        return min(places)

    return min(candidates, key=first_place)


def is_dense(row: Mapping[Any, Any]) -> bool:
    """Returns whether a setting is a dense control."""
    return row.get(f"{OVERRIDE}moe.num_experts") == 0


def arms_in_words(row: Mapping[Any, Any]) -> str:
    """Says of how many arms a setting is the mean: `3`, or `1 of 3` if not all are compared."""
    num_arms = len(row["arms"])
    num_planned = row[PLANNED]
    if num_arms == num_planned:
        return str(num_arms)
    return f"{num_arms} of {num_planned}"


def pack_note(compared: pd.DataFrame) -> str:
    """Explains step times of arms in packs of different sizes; nothing if there is one size."""
    sizes = pack_sizes(compared)
    if len(sizes) < 2:
        return ""
    return (
        f"Arms trained in packs of {sizes[0]} to {sizes[-1]}, and the time of an arm is its pack's "
        "over their number: part of a difference is that of the packs."
    )


def pack_sizes(compared: pd.DataFrame) -> list[int]:
    """Returns the sizes of the packs that arms trained in, ascending."""
    if "packed" not in compared:
        return []
    return sorted({int(size) for size in compared["packed"].dropna()})


def difference_in_words(difference: Difference) -> str:
    """Returns a mean and its 95 % interval, if there is one, as `+0.012 (-0.030 to +0.054)`.

    Nothing without a pair.
    """
    if not difference.num_pairs:
        return ""
    mean = difference.mean
    if math.isnan(difference.se):
        return _signed(mean, 3)
    if _is_rounding(difference.se, mean):
        return f"{_signed(mean, 4)} (in every seed)"
    places = _places(difference.high - mean)
    low = f"{difference.low:+,.{places}f}"
    high = f"{difference.high:+,.{places}f}"
    return f"{mean:+,.{places}f} ({low} to {high})"


def value_in_words(metric: str, mean: float, error: float = math.nan) -> str:
    """Returns a value of a metric: a short number for counts, else with its error."""
    return short_number(mean) if metric in COUNTS else mean_and_error(mean, error)


def mean_and_error(mean: float, error: float) -> str:
    """Returns a mean with its standard error to two digits, and itself to as many places.

    The mean is alone if there is no error, or the seeds agree except for rounding.
    """
    has_error = not math.isnan(error) and not _is_rounding(error, mean)
    if has_error:
        places = _places(error)
        return f"{mean:,.{places}f} ± {error:,.{places}f}"
    if abs(mean) >= 10_000:
        return f"{mean:,.0f}"
    return f"{_rounded(mean, 4):g}"


def _is_rounding(error: float, mean: float) -> bool:
    """Returns whether an error is no more than equal values differ by."""
    return error <= ROUNDING * abs(mean)


def _signed(value: float, digits: int) -> str:
    return f"{_rounded(value, digits):+g}"


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _places(error: float) -> int:
    """Returns how many decimal places show two digits of an error."""
    if not math.isfinite(error):  # of values near the largest that a float holds
        return 0
    decade = math.floor(math.log10(error))  # of the first digit; the second is one place on
    return min(6, max(0, 1 - decade))
