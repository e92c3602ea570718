"""The section of a sweep's page on learning rates that were found for each setting."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from moejax.inspection import html
from moejax.inspection.figures.style import STYLE, Drawing, log_axis, new_figure
from moejax.inspection.html import Markup
from moejax.inspection.report.page import figure, grid, number, table
from moejax.sweeps.arms import describe
from moejax.sweeps.fair import FRACTION
from moejax.sweeps.report.figures import COLORS, DASHES, MARKERS

MAX_LINES = len(COLORS)

MAX_TICKS = 9
"""Rates that are written at the axis; of more, about four places."""

Rows = Sequence[Mapping[str, Any]]
"""Of `store.fair_rates.read_rates`."""


def fair_section(rows: Rows) -> Markup:
    """Returns losses of the trials over learning rates, and what was chosen."""
    explained = html.paragraph(
        f"Each setting was tried at several rates, with {FRACTION:g} of the steps and one seed. "
        "Its arms have the rate at which the parabola through the best trial and its neighbours "
        "is lowest."
    )
    shown = rows[:MAX_LINES]
    reading = "A line is a setting; the large mark is the rate that was chosen."
    if len(rows) > MAX_LINES:
        reading += f" The first {MAX_LINES} of {len(rows)} settings are shown."
    drawn = figure("Loss over learning rate", reading, draw_rates(shown), alt=_in_words(shown))
    listed = table(
        ("setting", "chosen", "rates that were tried", "losses", ""),
        [_row(row) for row in rows],
        "events",
    )
    return explained + grid([drawn]) + listed


def _row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    note = "" if row["is_bracketed"] else "the last rate that was tried"
    rates = ", ".join(f"{rate:g}" for rate in row["rates"])
    losses = ", ".join("-" if math.isnan(loss) else number(loss) for loss in row["losses"])
    return (describe(row["overrides"]), f"{row['learning_rate']:g}", rates, losses, note)


def _in_words(rows: Rows) -> str:
    chosen = [f"{describe(row['overrides'])}: {row['learning_rate']:g}" for row in rows]
    return f"chosen learning rates: {'; '.join(chosen)}"


def draw_rates(rows: Rows) -> Drawing:
    """Draws the losses of each setting's trials over the learning rate."""
    with matplotlib.rc_context(STYLE):
        drawn, axes = new_figure(3.0)
        for number_of_line, row in enumerate(rows):
            rates = np.array(row["rates"])
            losses = np.array(row["losses"])
            color = COLORS[number_of_line]
            axes.plot(
                rates,
                losses,
                MARKERS[number_of_line] + DASHES[number_of_line],
                color=color,
                ms=4,
                label=describe(row["overrides"]),
            )
            is_known = np.isfinite(losses)
            if is_known.any():
                at_choice = np.interp(
                    np.log(row["learning_rate"]), np.log(rates[is_known]), losses[is_known]
                )
                axes.plot([row["learning_rate"]], [at_choice], "|", color=color, ms=16, mew=2)
        tried = sorted({rate for row in rows for rate in row["rates"]})
        log_axis(axes.xaxis, tried if len(tried) <= MAX_TICKS else ())
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss of trials")
        axes.legend(fontsize=7)
        return Drawing.from_figure(drawn)
