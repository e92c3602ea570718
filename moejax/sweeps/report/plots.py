"""The parts of a sweep's page that show settings as one: all settings at once, and fronts."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from moejax.inspection import html
from moejax.inspection.html import Markup
from moejax.inspection.report.page import figure, grid, table
from moejax.sweeps.report.figures import draw_parallel
from moejax.sweeps.report.front_figure import Front, draw_front
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.report.settings import METRICS, NUMBER, arms_in_words, mean_and_error, varies
from moejax.sweeps.tables import key_of, loss_of, pareto_front

STEP_TIME = "step_s"
TRADED = ("tail/moe/dropped", STEP_TIME)
MAX_AXES = 10  # in the figure of all settings
ALL_MAY_BE_NOISE = "There is one seed: all that is seen here may be noise."
ONE_SETTING = "No axis has more than one level among the arms that are compared."

Names = Mapping[str, str]
"""From columns of axes that differ to short names."""


def unit_of(metric: str) -> str:
    """Returns name and unit of a metric, for a figure."""
    name, unit = METRICS[metric]
    return f"{name} ({unit})"


def count(n: int, thing: str) -> str:
    """Returns a number of things: `1 setting`, `2 settings`."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def parallel(settings: pd.DataFrame, axes: Names, is_one_seed: bool) -> Markup:
    """Returns all settings as lines through their levels."""
    if not axes:
        return html.paragraph(ONE_SETTING)
    loss = loss_of(settings)
    if not varies(settings[loss]):
        return html.paragraph("All settings have the same loss.")
    loss_name, _ = METRICS[loss]
    shown = dict(itertools.islice(axes.items(), MAX_AXES))
    known = settings[np.isfinite(settings[loss])]
    image = draw_parallel(known, shown, loss, loss_name)
    noise = "The table of settings says which of them are told apart from noise."
    reading = [
        "A line is a setting; dark is a low loss, and the thick line setting 1.",
        ALL_MAY_BE_NOISE if is_one_seed else noise,
    ]
    if len(shown) < len(axes):
        reading.append(f"{len(shown)} of {len(axes)} axes are shown.")
    return figure(
        "Settings and their loss",
        " ".join(reading),
        image,
        alt=_parallel_in_words(settings, shown, loss_name),
        kind="wide true-colors",
    )


def _parallel_in_words(settings: pd.DataFrame, shown: Names, loss_name: str) -> str:
    """Says what `parallel` draws, and the levels of the best setting."""
    best = settings.iloc[0]
    levels = []
    for axis, name in shown.items():
        level = level_name(best[axis])
        levels.append(f"{name} {level}")
    at_best = ", ".join(levels)
    names = ", ".join(shown.values())
    return (
        f"{len(settings)} settings as lines through {names} and {loss_name}; setting 1: {at_best}"
    )


def fronts(settings: pd.DataFrame, axes: Names, packs: str, is_one_seed: bool) -> Markup:
    """Returns loss against what it may cost, and the settings that no other beats in both.

    Args:
      settings: of `numbered_settings`.
      axes: names of those on which arms differ.
      packs: of `pack_note`.
      is_one_seed: whether all arms have the same seed.
    """
    if not axes:
        return html.paragraph(ONE_SETTING)
    loss = loss_of(settings)
    has_loss = np.isfinite(settings[loss])
    drawn: list[Markup] = []
    tables: list[Markup] = []
    notes: list[str] = []
    noise = ALL_MAY_BE_NOISE if is_one_seed else ""
    for metric in TRADED:
        name, _ = METRICS[metric]
        has_both = np.isfinite(settings[metric]) & has_loss
        known = settings[has_both]
        num_without = len(settings) - len(known)
        notes += _notes_on_front(known[metric], name, num_without)
        if not varies(known[metric]):
            continue
        traded = (loss, metric)
        is_front = pareto_front(known, list(traded))
        front = known[is_front]
        front = front.sort_values(metric, kind="stable")
        of_packs = packs if metric == STEP_TIME else ""
        image = _draw_front(known, is_front, front, traded, notes=[noise, of_packs])
        drawn.append(image)
        listed = _front_table(front, axes, traded)
        tables.append(html.render("sweep/front", name=name, table=listed))
    return html.render(
        "sweep/fronts",
        notes=notes,
        figures=grid(drawn),
        tables=html.join(tables),
    )


def _notes_on_front(values: pd.Series, name: str, num_without: int) -> list[str]:
    """Says which settings a figure leaves out, or why there is no figure.

    Args:
      values: of the metric, in the settings that have it.
      name: of the metric.
      num_without: settings that lack it.
    """
    if values.empty:
        return [f"No setting has a {name}."]
    notes = []
    if num_without:
        left_out = count(num_without, "setting")
        notes.append(f"Left out of a figure: {left_out} without {name}.")
    if not varies(values):
        value = mean_and_error(float(values.iloc[0]), math.nan)
        notes.append(f"All settings have the same {name}, {value}: there is nothing to trade.")
    return notes


def _draw_front(
    known: pd.DataFrame,
    is_front: np.ndarray,
    front: pd.DataFrame,
    traded: tuple[str, str],
    *,
    notes: list[str],
) -> Markup:
    """Draws the loss against a metric.

    Args:
      known: settings with finite values of both.
      is_front: which of them are on the front.
      front: those, in the order of the metric.
      traded: the loss and the metric.
      notes: to add to how the figure reads; empty ones are left out.
    """
    loss, metric = traded
    name, _ = METRICS[metric]
    loss_name, _ = METRICS[loss]
    errors = known[f"{loss}/se"]
    image = draw_front(
        Front(
            x=known[metric].to_numpy(np.float64),
            y=known[loss].to_numpy(np.float64),
            errors=errors.to_numpy(np.float64),
            is_front=is_front,
            numbers=[int(number) for number in known[NUMBER]],
        ),
        xlabel=unit_of(metric),
        ylabel=unit_of(loss),
    )
    reading = ["Both are to be low."]
    if not errors.isna().all():
        reading.append("Bars are standard errors of the loss over seeds.")
    reading += [note for note in notes if note]
    listed = ", ".join(map(str, front[NUMBER]))
    alt = (
        f"{loss_name.capitalize()} against {name} of {len(known)} settings; on the front are the "
        f"settings {listed}"
    )
    return figure(f"Loss against {name}", " ".join(reading), image, alt=alt)


def _front_table(front: pd.DataFrame, axes: Names, traded: tuple[str, str]) -> Markup:
    """Returns the settings that no other beats in both metrics, with their levels."""
    rows = []
    for row in front.to_dict("records"):
        cells = [str(row[NUMBER]), arms_in_words(row)]
        for axis in axes:
            cells.append(_level_or_empty(row[axis]))
        for metric in traded:
            mean = row[metric]
            error = row[f"{metric}/se"]
            cells.append(mean_and_error(mean, error))
        rows.append(cells)
    metrics = [METRICS[metric][0] for metric in traded]
    head = ["setting", "arms", *axes.values(), *metrics]
    return table(head, rows, "numbers")


def _level_or_empty(level: Any) -> str:
    return "" if key_of(level) is None else level_name(level)
