"""What the axes of a sweep do: differences of levels, of pairs of axes, and of settings.

Everything is a difference between arms of the same seed, see
`moejax/inspection/analysis/differences.py`. All functions are pure: frames in, numbers out.
"""

import collections
import dataclasses
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
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

Place = tuple[Hashable, Hashable]
"""A cell and a seed."""


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
        reference = key_of(self.reference)
        return tuple(level for level in self.levels if key_of(level.level) != reference)

    @property
    def num_seeds(self) -> int:
        """The most seeds that a difference is over."""
        num_seeds = [level.difference.num_seeds for level in self.others]
        return max(num_seeds, default=0)


def axis_effect(arms: pd.DataFrame, metric: str, axis: str) -> AxisEffect:
    """Compares the levels of an axis, in pairs of arms that are equal but for it.

    Args:
      arms: at an equal fraction of the schedule, from `sweep_tables.at_fraction`, in the order
        of the sweep.
      metric: a column of it.
      axis: a column `override/KEY` of it.
    """
    with_any_level = with_metric(arms, metric)
    together = tuple(changes_with(with_any_level, axis))
    known = with_any_level[~_has_level(with_any_level, axis, None)]
    num_unset = len(with_any_level) - len(known)
    if known.empty:
        return AxisEffect(None, (), together, num_unset)
    cells = _other_axes(known, {axis, *together})
    levels = levels_of(known[axis])
    measured = {}
    for level in levels:
        of_level = known[_has_level(known, axis, level)]
        measured[key_of(level)] = measured_by_cell(of_level, metric, cells)
    # The reference is the first level of the sweep, not the lowest.
    reference = known[axis].iloc[0]
    of_reference = measured[key_of(reference)]
    found = []
    for level in levels:
        own = measured[key_of(level)]
        mean = _mean_of_cells(own)
        difference = mean_difference(pair_up(of_reference, own))
        found.append(Level(level, mean, difference))
    return AxisEffect(reference, tuple(found), together, num_unset)


def _other_axes(arms: pd.DataFrame, ignored: Collection[str]) -> list[str]:
    """Returns the axes whose levels make the cells: pairs are equal in all of them."""
    return [name for name in axes_of(arms) if name not in ignored]


def with_metric(arms: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns the arms whose metric is finite; none if it is no column."""
    if metric not in arms:
        return arms.iloc[:0]
    return arms[np.isfinite(arms[metric])]


def _has_level(arms: pd.DataFrame, axis: str, level: Any) -> Bool[np.ndarray, "S"]:
    """Returns for each arm whether it has this level of an axis; None: whether it has none."""
    key = key_of(level)
    return np.array([key_of(value) == key for value in arms[axis]], bool)


def _mean_of_cells(measured: Measured) -> float:
    """Returns the mean over cells, each of them a mean over the seeds that it has."""
    cells, seeds = places_of(measured)
    if not cells:
        return math.nan
    table_CS = as_table(measured, cells, seeds)
    means = [np.nanmean(row_S) for row_S in table_CS]
    return float(np.mean(means))


def measured_by_cell(arms: pd.DataFrame, metric: str, cells: Sequence[str]) -> Measured:
    """Returns a metric by the levels of some axes, and by seed.

    Arms that agree in all of these are averaged.
    """
    values_at: dict[Place, list[float]] = collections.defaultdict(list)
    for row in arms.to_dict("records"):
        cell = _cell_of(row, cells)
        seed = row["seed"]
        values_at[cell, seed].append(row[metric])
    means: dict[Place, float] = {}
    for place, values in values_at.items():
        mean = np.mean(values)
        means[place] = float(mean)
    return means


def _cell_of(row: Mapping[Any, Any], axes: Sequence[str]) -> tuple[Hashable, ...]:
    """Returns the levels of an arm on some axes, as keys."""
    return tuple(key_of(row[axis]) for axis in axes)


def changes_with(arms: pd.DataFrame, axis: str) -> list[str]:
    """Returns the axes whose level follows from this axis's level.

    An example is the score of a router that is set with the router. Only an axis most of whose
    levels come with several settings can show that: of a random draw every level comes once, and
    all else would follow from it.
    """
    return _followers(_level_codes(arms), axis)


def distinct_axes(arms: pd.DataFrame) -> list[str]:
    """Returns the axes on which arms differ; of those that always change together, the first."""
    codes = _level_codes(arms)
    followers = {axis: _followers(codes, axis) for axis in codes}
    kept: list[str] = []
    for axis, following in followers.items():
        # Axes that follow from each other always change together.
        twins = [other for other in following if axis in followers[other]]
        is_new = set(twins).isdisjoint(kept)
        if is_new:
            kept.append(axis)
    return kept


def _level_codes(arms: pd.DataFrame) -> pd.DataFrame:
    """Returns the settings: a row each, with a number for the level of each axis that differs."""
    columns = {}
    for axis in axes_of(arms):
        numbers: dict[Hashable, int] = {}
        codes = []
        for value in arms[axis]:
            codes.append(numbers.setdefault(key_of(value), len(numbers)))
        columns[axis] = codes
    return pd.DataFrame(columns).drop_duplicates()


def _followers(codes: pd.DataFrame, axis: str) -> list[str]:
    """Returns the axes that have one level for each level of an axis."""
    if axis not in codes:
        return []
    num_settings = codes[axis].value_counts()
    num_levels = len(num_settings)
    num_repeated = int((num_settings > 1).sum())
    if 2 * num_repeated <= num_levels:
        return []
    found = []
    for name in codes:
        if name != axis:
            num_pairs = len(codes[[axis, name]].drop_duplicates())
            if num_pairs == num_levels:
                found.append(name)
    return found


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
    """Measures whether the effect of one axis depends on another.

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
    rows = levels_of(known[one])
    columns = levels_of(known[other])
    measured = _measured_by_levels(known, metric, one, other)
    is_there_IJ = np.zeros((len(rows), len(columns)), bool)
    for place, found in measured.items():
        is_there_IJ[place] = bool(found)
    kept_rows, kept_columns = _complete_levels(is_there_IJ)
    if len(kept_rows) < 2 or len(kept_columns) < 2:
        return None
    values_IJCS = _without_holes(_stack(measured, kept_rows, kept_columns))
    num_cells = values_IJCS.shape[2]
    if not num_cells:
        return None
    values_IJS = values_IJCS.mean(axis=2)
    row_levels = [rows[i] for i in kept_rows]
    column_levels = [columns[j] for j in kept_columns]
    means = pd.DataFrame(
        values_IJS.mean(axis=2),
        index=pd.Index(row_levels, dtype=object),
        columns=pd.Index(column_levels, dtype=object),
    )
    is_whole = means.shape == is_there_IJ.shape
    departure = _largest_departure(values_IJS, num_cells)
    return Interaction(means, departure, is_whole)


def _without_holes(values_IJCS: Float[np.ndarray, "I J C S"]) -> Float[np.ndarray, "I J c s"]:
    """Returns the cells and seeds that all levels have; no cell where there are none."""
    is_known_CS = np.isfinite(values_IJCS).all(axis=(0, 1))
    kept_cells, kept_seeds = whole_block(is_known_CS)
    of_cells_IJcS = values_IJCS[:, :, kept_cells]
    return of_cells_IJcS[..., kept_seeds]


def _measured_by_levels(
    known: pd.DataFrame, metric: str, one: str, other: str
) -> dict[tuple[int, int], Measured]:
    """Returns a metric for each pair of levels of two axes, by their numbers."""
    followers = changes_with(known, one) + changes_with(known, other)
    cells = _other_axes(known, {one, other, *followers})
    rows = levels_of(known[one])
    columns = levels_of(known[other])
    found = {}
    for i, row in enumerate(rows):
        of_row = known[_has_level(known, one, row)]
        for j, column in enumerate(columns):
            arms = of_row[_has_level(of_row, other, column)]
            found[i, j] = measured_by_cell(arms, metric, cells)
    return found


def _complete_levels(is_there_IJ: Bool[np.ndarray, "I J"]) -> tuple[list[int], list[int]]:
    """Chooses the rows and columns of a table without holes.

    These are the rows without a hole with all columns, or the columns without a hole with all rows,
    whichever has more cells.
    """
    num_rows, num_columns = is_there_IJ.shape
    is_full_I = is_there_IJ.all(axis=1)
    is_full_J = is_there_IJ.all(axis=0)
    full_rows = np.flatnonzero(is_full_I).tolist()
    full_columns = np.flatnonzero(is_full_J).tolist()
    num_cells_by_row = len(full_rows) * num_columns
    num_cells_by_column = num_rows * len(full_columns)
    if num_cells_by_row >= num_cells_by_column:
        return full_rows, list(range(num_columns))
    return list(range(num_rows)), full_columns


def _stack(
    measured: Mapping[tuple[int, int], Measured],
    rows: Sequence[int],
    columns: Sequence[int],
) -> Float[np.ndarray, "I J C S"]:
    """Returns the values of some rows and columns, over the same cells and seeds everywhere."""
    cells, seeds = places_of(*measured.values())
    tables = []
    for i in rows:
        tables_of_row = [as_table(measured[i, j], cells, seeds) for j in columns]
        tables.append(tables_of_row)
    return np.array(tables)


def _largest_departure(values_IJS: Float[np.ndarray, "I J S"], num_cells: int) -> Difference:
    """Returns the largest departure of a cell from the sum of two separate effects."""
    num_rows, num_columns, num_seeds = values_IJS.shape
    departures_IJS = values_IJS - _separate_effects(values_IJS)
    means_IJ = departures_IJS.mean(axis=2)
    largest = np.abs(means_IJ).argmax()
    i, j = np.unravel_index(largest, means_IJ.shape)
    departures_S = departures_IJS[i, j]
    # Its sign depends on which cell it is, and says nothing.
    sign = -1 if departures_S.mean() < 0 else 1
    unsigned_1S = sign * departures_S[None]
    num_looks = _num_departures(num_rows) * _num_departures(num_columns)
    found = mean_difference(unsigned_1S, num_looks)
    num_pairs = num_cells * num_seeds
    return dataclasses.replace(found, num_pairs=num_pairs)


def _separate_effects(values_IJS: Float[np.ndarray, "I J S"]) -> Float[np.ndarray, "I J S"]:
    """Returns what the values would be if neither axis changed what the other does."""
    by_row_I1S = values_IJS.mean(axis=1, keepdims=True)
    by_column_1JS = values_IJS.mean(axis=0, keepdims=True)
    overall_11S = values_IJS.mean(axis=(0, 1), keepdims=True)
    sums_IJS = by_row_I1S + by_column_1JS
    return sums_IJS - overall_11S


def _num_departures(num_levels: int) -> int:
    """Returns how many levels depart on their own: two depart by the same, with opposite signs."""
    return 1 if num_levels == 2 else num_levels


def compare_settings(
    arms: pd.DataFrame, metric: str, reference: Sequence[str], settings: Sequence[Sequence[str]]
) -> list[Difference]:
    """Returns the difference of each setting from one of them, over the seeds that both have.

    Args:
      arms: at an equal fraction of the schedule.
      metric: a column.
      reference: ids of the arms of the setting that is compared with.
      settings: ids of the arms of each setting.
    """
    known = with_metric(arms, metric)
    ids_known = known["arm"]
    seed_of = dict(zip(ids_known, known["seed"], strict=True))
    value_of = dict(zip(ids_known, known[metric], strict=True))

    def measured(ids: Sequence[str]) -> Measured:
        """Returns the metric of a setting by seed; a setting is one cell."""
        found: dict[Place, float] = {}
        for arm in ids:
            if arm in value_of:
                seed = seed_of[arm]
                found["", seed] = float(value_of[arm])
        return found

    of_reference = measured(reference)
    differences = []
    for ids in settings:
        pairs = pair_up(of_reference, measured(ids))
        differences.append(mean_difference(pairs))
    return differences
