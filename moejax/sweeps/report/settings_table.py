"""The table of a sweep's settings: axes, matched leaves, means over seeds, differences from one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.html import Markup
from moejax.sweeps.report.effects import compare_settings
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.report.settings import (
    METRICS,
    NUMBER,
    arms_in_words,
    constants_in_words,
    difference_in_words,
    is_dense,
    is_partial,
    pack_sizes,
    reference_setting,
    value_in_words,
    varies,
)
from moejax.sweeps.tables import MATCHED, OVERRIDE, SEED, is_number, key_of, levels_of, loss_of

EXPECTED_BY_CHANCE = 0.05  # share of 95 % intervals that leave out 0 though nothing differs

Row = Mapping[Any, Any]
"""A setting: a row of `numbered_settings`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the table.

    Attributes:
      text: what it shows.
      number: what the table is sorted by; None sorts by the text.
      is_strong: whether it stands out.
    """

    text: str = ""
    number: float | None = None
    is_strong: bool = False


@dataclasses.dataclass(frozen=True)
class Head:
    """The title of a column, with its unit below."""

    name: str
    unit: str = ""


Column = tuple[Head, Sequence[Cell]]
"""A title, and a cell for each setting."""


def settings_table(
    settings: pd.DataFrame,
    compared: pd.DataFrame,
    matched: Sequence[str],
    planned: Sequence[Mapping[str, Any]],
) -> Markup:
    """Returns the table with its introduction.

    Args:
      settings: of `numbered_settings`.
      compared: the arms it was made from.
      matched: columns of matched leaves, which stand next to the axes.
      planned: entries of all arms in `sweep.json`.
    """
    loss = loss_of(compared)
    rows: list[Row] = settings.to_dict("records")
    reference = reference_setting(rows, planned)
    columns = [_metric_column(rows, loss)]  # in sight, however many axes there are
    told_apart = ""
    if len(rows) > 1:
        arms = [row["arms"] for row in rows]
        differences = compare_settings(compared, loss, reference["arms"], arms)
        columns.append(_difference_column(rows, differences, reference))
        told_apart = _told_apart(reference, rows, differences)
    columns.append(_arms_column(rows))
    columns += [_axis_column(rows, axis) for axis in _axes(settings)]
    columns += [_matched_column(rows, compared, name) for name in matched]
    others = [metric for metric in METRICS if metric != loss]
    columns += [_metric_column(rows, metric) for metric in others if varies(settings[metric])]
    return html.render(
        "sweep/settings",
        is_partial=bool(is_partial(settings).any()),
        has_packs=max(pack_sizes(compared), default=1) > 1,
        constants=constants_in_words(settings, others, "settings"),
        told_apart=told_apart,
        heads=[head for head, _ in columns],
        rows=_table_rows(rows, columns),
    )


def _table_rows(rows: Sequence[Row], columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Returns what the template shows of each setting."""
    found = []
    for i, row in enumerate(rows):
        of_setting = {
            "number": row[NUMBER],
            "cells": [cells[i] for _, cells in columns],
            "arms": " ".join(row["arms"]),
        }
        found.append(of_setting)
    return found


def _axes(settings: pd.DataFrame) -> list[str]:
    names = [str(name) for name in settings.columns]
    return [name for name in names if name.startswith(OVERRIDE) and name != SEED]


def _metric_column(rows: Sequence[Row], metric: str) -> Column:
    return Head(*METRICS[metric]), [_metric_cell(row, metric) for row in rows]


def _metric_cell(row: Row, metric: str) -> Cell:
    mean = float(row[metric])
    error = float(row[f"{metric}/se"])
    if math.isnan(mean):
        return Cell()
    return Cell(value_in_words(metric, mean, error), mean)


def _difference_column(
    rows: Sequence[Row], differences: Sequence[Difference], reference: Row
) -> Column:
    cells = []
    for row, difference in zip(rows, differences, strict=True):
        if row[NUMBER] == reference[NUMBER]:
            cells.append(Cell("0", 0))
        elif not difference.num_pairs:
            cells.append(Cell())
        else:
            shown = difference_in_words(difference)
            cells.append(Cell(shown, difference.mean, is_strong=difference.is_told_apart))
    return Head(f"difference from {reference[NUMBER]}", "95 % interval"), cells


def _arms_column(rows: Sequence[Row]) -> Column:
    return Head("arms", "done"), [Cell(arms_in_words(row), len(row["arms"])) for row in rows]


def _axis_column(rows: Sequence[Row], axis: str) -> Column:
    return Head(axis.removeprefix(OVERRIDE)), [_level_cell(row[axis]) for row in rows]


def _matched_column(rows: Sequence[Row], compared: pd.DataFrame, name: str) -> Column:
    """Returns a matched leaf; it has one value a setting, as matching does not look at seeds."""
    of_arm = dict(zip(compared["arm"], compared[name], strict=True))
    cells = []
    for row in rows:
        levels = levels_of(of_arm[arm] for arm in row["arms"])
        if len(levels) == 1:
            cell = _level_cell(levels[0])
        else:
            names = map(level_name, levels)
            cell = Cell(", ".join(names))
        cells.append(cell)
    leaf = name.removeprefix(MATCHED)
    return Head(leaf, "matched"), cells


def _level_cell(level: Any) -> Cell:
    if key_of(level) is None:
        return Cell()
    if not is_number(level):
        return Cell(str(level))
    text = f"{level:g}" if isinstance(level, float) else str(level)
    return Cell(text, level)


def _told_apart(reference: Row, rows: Sequence[Row], differences: Sequence[Difference]) -> str:
    """Says how many settings differ from the reference by more than seeds do."""
    number = reference[NUMBER]
    num_others = len(rows) - 1
    kind = "the dense control" if is_dense(reference) else "the first of the sweep that is compared"
    what = f"Differences are from setting {number}, {kind}"
    num_seeds = []
    for row, difference in zip(rows, differences, strict=True):
        if row[NUMBER] != number:
            num_seeds.append(difference.num_seeds)
    if max(num_seeds) < 2:
        return (
            f"{what}. No two of its arms and another setting's have seeds in common, or one seed "
            "alone: nothing can be said about whether a difference is more than noise. Give each "
            "point several seeds (--seeds=3)."
        )
    num_told_apart = sum(difference.is_told_apart for difference in differences)
    expected = EXPECTED_BY_CHANCE * num_others
    return (
        f"{what}, between arms of the same seed, with Student's interval over "
        f"{_range_in_words(num_seeds)} seeds: it leaves out 0 for {num_told_apart} of {num_others} "
        f"settings, {expected:.2g} of which would be expected by chance alone."
    )


def _range_in_words(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(high) if low == high else f"{low} to {high}"
