"""What the axes of a sweep do: each level against a reference, pairs of axes together, settings against one of them.

Everything is a difference between arms of the same seed, see `sweep_differences`. All functions are
pure: frames in, numbers out.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from moejax.inspection.analysis.differences import (
    Difference,
    Measured,
    as_table,
    mean_difference,
    pair_up,
    places_of,
    whole_block,
)
from moejax.sweeps.tables import axes_of, key_of, levels_of


@dataclasses.dataclass(frozen=True)
class Level:
    """A level of an axis.

    Attributes:
      level: its value.
      mean: of the metric, over its settings, each of the same weight.
      difference: from the reference level; without pairs that of nothing.
    """

    level: Any
    mean: float
    difference: Difference


@dataclasses.dataclass(frozen=True)
class AxisEffect:
    """A metric by level of one axis, against the level that comes first in the sweep.

    Attributes:
      reference: the level that the others are compared with; None where no arm has a level.
      levels: all of them, in order.
      changes_with: axes whose levels follow from this one's: differences are those of all together.
      num_unset: arms without this axis, which are left out.
    """

    reference: Any
    levels: tuple[Level, ...]
    changes_with: tuple[str, ...]
    num_unset: int

    @property
    def others(self) -> tuple[Level, ...]:
        """All levels but the reference."""
        return tuple(
            level for level in self.levels if key_of(level.level) != key_of(self.reference)
        )

    @property
    def num_seeds(self) -> int:
        """The most seeds that a difference is over."""
        return max((level.difference.num_seeds for level in self.others), default=0)


def axis_effect(arms: pd.DataFrame, metric: str, axis: str) -> AxisEffect:
    """Compares the levels of an axis, in pairs of arms that are equal but for it.

    Args:
      arms: at an equal fraction of the schedule, from `sweep_tables.at_fraction`, in the order
        of the sweep.
      metric: a column of it.
      axis: a column `override/KEY` of it.
    """
    known = with_metric(arms, metric)
    together = changes_with(known, axis)
    is_set = np.array([key_of(level) is not None for level in known[axis]], bool)
    num_unset, known = int((~is_set).sum()), known[is_set]
    if known.empty:
        return AxisEffect(None, (), tuple(together), num_unset)
    cells = [name for name in axes_of(known) if name not in (axis, *together)]
    keys = pd.Series([key_of(level) for level in known[axis]], known.index, dtype=object)
    measured = {
        key: measured_by_cell(of_level, metric, cells)
        for key, of_level in known.groupby(keys, sort=False)
    }
    reference = known[axis].iloc[0]
    found = []
    for level in levels_of(known[axis]):
        key = key_of(level)
        difference = mean_difference(pair_up(measured[key_of(reference)], measured[key]))
        found.append(Level(level, _mean_of_cells(measured[key]), difference))
    return AxisEffect(reference, tuple(found), tuple(together), num_unset)


def with_metric(arms: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The arms whose metric is finite; none if it is no column."""
    return arms[np.isfinite(arms[metric])] if metric in arms else arms.iloc[:0]


def _has_level(arms: pd.DataFrame, axis: str, level: Any) -> Bool[np.ndarray, "S"]:
    return np.array([key_of(value) == key_of(level) for value in arms[axis]], bool)


def _mean_of_cells(measured: Measured) -> float:
    cells, seeds = places_of(measured)
    return (
        float(np.mean([np.nanmean(row_S) for row_S in as_table(measured, cells, seeds)]))
        if cells
        else math.nan
    )


def measured_by_cell(arms: pd.DataFrame, metric: str, cells: Sequence[str]) -> Measured:
    """A metric by the levels of some axes, and seed; arms that agree in all of these are averaged."""
    found: dict[tuple[Hashable, Hashable], list[float]] = {}
    for row in arms.to_dict("records"):
        cell = tuple(key_of(row[axis]) for axis in cells)
        found.setdefault((cell, row["seed"]), []).append(row[metric])
    return {place: float(np.mean(values)) for place, values in found.items()}


def changes_with(arms: pd.DataFrame, axis: str) -> list[str]:
    """The axes whose level follows from this axis's level, as the score of a router that is set with the router.

    Only an axis most of whose levels come with several settings can show that: of a draw at random
    every level comes once, and all else would follow from it.
    """
    return _followers(_level_codes(arms), axis)


def distinct_axes(arms: pd.DataFrame) -> list[str]:
    """The axes on which arms differ, but one alone of those that always change together: the first."""
    codes = _level_codes(arms)
    followers = {axis: _followers(codes, axis) for axis in codes}
    kept: list[str] = []
    for axis in followers:
        if not any(axis in followers[first] and first in followers[axis] for first in kept):
            kept.append(axis)
    return kept


def _level_codes(arms: pd.DataFrame) -> pd.DataFrame:
    """The settings: a row each, with a number for each level of the axes on which arms differ."""
    columns = {}
    for axis in axes_of(arms):
        numbers: dict[Hashable, int] = {}
        columns[axis] = [numbers.setdefault(key_of(value), len(numbers)) for value in arms[axis]]
    return pd.DataFrame(columns).drop_duplicates()


def _followers(codes: pd.DataFrame, axis: str) -> list[str]:
    if axis not in codes:
        return []
    num_settings = codes[axis].value_counts()
    if 2 * int((num_settings > 1).sum()) <= len(num_settings):
        return []
    others = [name for name in codes if name != axis]
    return [
        name for name in others if len(codes[[axis, name]].drop_duplicates()) == len(num_settings)
    ]


@dataclasses.dataclass(frozen=True)
class Interaction:
    """A metric by the levels of two axes.

    Attributes:
      means: the first axis's levels are the index, the second's the columns; over the same cells
        and seeds everywhere.
      departure: the largest departure of a cell of the table from the sum of two separate effects,
        without its sign, with the interval that all departures of the table keep together.
      is_whole: whether the table has all levels; those with holes are left out.
    """

    means: pd.DataFrame
    departure: Difference
    is_whole: bool


def interaction(arms: pd.DataFrame, metric: str, one: str, other: str) -> Interaction | None:
    """Whether the effect of one axis depends on another.

    Args:
      arms: at an equal fraction of the schedule.
      metric: a column.
      one: the axis whose levels are the index.
      other: the axis whose levels are the columns.

    Returns:
      None where two levels of each, in all combinations and with the same cells and seeds,
      are not there.
    """
    known = with_metric(arms, metric)
    ignored = {one, other, *changes_with(known, one), *changes_with(known, other)}
    cells = [name for name in axes_of(known) if name not in ignored]
    rows, columns = levels_of(known[one]), levels_of(known[other])
    measured = {}
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        of_both = known[_has_level(known, one, rows[i]) & _has_level(known, other, columns[j])]
        measured[i, j] = measured_by_cell(of_both, metric, cells)
    is_there = np.array(
        [[bool(measured[i, j]) for j in range(len(columns))] for i in range(len(rows))], bool
    )
    kept_rows, kept_columns = _whole_levels(is_there.reshape(len(rows), len(columns)))
    if min(len(kept_rows), len(kept_columns)) < 2:
        return None
    values_IJCS = _stack(measured, kept_rows, kept_columns)
    kept_cells, kept_seeds = whole_block(np.isfinite(values_IJCS).all(axis=(0, 1)))
    values_IJS = values_IJCS[:, :, kept_cells][..., kept_seeds].mean(axis=2)
    if not kept_cells.size:
        return None
    means = pd.DataFrame(
        values_IJS.mean(axis=2),
        index=pd.Index([rows[i] for i in kept_rows], dtype=object),
        columns=pd.Index([columns[j] for j in kept_columns], dtype=object),
    )
    is_whole = means.shape == (len(rows), len(columns))
    return Interaction(means, _largest_departure(values_IJS, len(kept_cells)), is_whole)


def _whole_levels(is_there_IJ: Bool[np.ndarray, "I J"]) -> tuple[list[int], list[int]]:
    """The rows without a hole with all columns, or the columns without a hole with all rows, whichever is more."""
    rows = np.flatnonzero(is_there_IJ.all(axis=1)).tolist()
    columns = np.flatnonzero(is_there_IJ.all(axis=0)).tolist()
    num_rows, num_columns = is_there_IJ.shape
    if len(rows) * num_columns >= num_rows * len(columns):
        return rows, list(range(num_columns))
    return list(range(num_rows)), columns


def _stack(
    measured: dict[tuple[int, int], Measured], rows: Sequence[int], columns: Sequence[int]
) -> Float[np.ndarray, "I J C S"]:
    cells, seeds = places_of(*measured.values())
    return np.array([[as_table(measured[i, j], cells, seeds) for j in columns] for i in rows])


def _largest_departure(values_IJS: Float[np.ndarray, "I J S"], num_cells: int) -> Difference:
    sums_IJS = (
        values_IJS.mean(axis=1, keepdims=True)
        + values_IJS.mean(axis=0, keepdims=True)
        - values_IJS.mean(axis=(0, 1), keepdims=True)
    )
    departures_IJS = values_IJS - sums_IJS
    num_rows, num_columns, num_seeds = values_IJS.shape
    i, j = np.unravel_index(np.abs(departures_IJS.mean(axis=2)).argmax(), (num_rows, num_columns))
    num_looks = num_rows * num_columns
    num_looks //= 2 if num_rows == 2 else 1  # the two rows depart by the same with opposite signs
    num_looks //= 2 if num_columns == 2 else 1
    sign = -1 if departures_IJS[i, j].mean() < 0 else 1  # it depends on the cell and says nothing
    found = mean_difference(sign * departures_IJS[i, j][None], num_looks)
    return dataclasses.replace(found, num_pairs=num_cells * num_seeds)


def compare_settings(
    arms: pd.DataFrame, metric: str, reference: Sequence[str], settings: Sequence[Sequence[str]]
) -> list[Difference]:
    """The difference of each setting from one of them, over the seeds that both have.

    Args:
      arms: at an equal fraction of the schedule.
      metric: a column.
      reference: ids of the arms of the setting that is compared with.
      settings: ids of the arms of each setting.
    """
    known = with_metric(arms, metric)
    by_arm = dict(zip(known["arm"], zip(known["seed"], known[metric], strict=True), strict=True))
    measured: list[dict[tuple[Hashable, Hashable], float]] = []
    for ids in (reference, *settings):
        found = [by_arm[arm] for arm in ids if arm in by_arm]
        measured.append({("", seed): float(value) for seed, value in found})
    return [mean_difference(pair_up(measured[0], other)) for other in measured[1:]]
