"""The figures of a sweep's page that show whole settings, with their words: all settings at once, and fronts."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from moejax.inspection import html
from moejax.inspection.report.page import figure, grid, table
from moejax.sweeps.report.figures import draw_front, draw_parallel
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.report.settings import METRICS, NUMBER, arms_in_words, mean_and_error, varies
from moejax.sweeps.tables import key_of, loss_of, pareto_front

STEP_TIME = "step_s"
TRADED = ("tail/moe/dropped", STEP_TIME)
MAX_AXES = 10  # in the figure of all settings
ALL_MAY_BE_NOISE = " There is one seed: all that is seen here may be noise."
ONE_SETTING = "<p>No axis has more than one level among the arms that are compared.</p>"

Names = Mapping[str, str]
"""From columns of axes that differ to short names."""


def unit_of(metric: str) -> str:
    """Name and unit of a metric, for a figure."""
    name, unit = METRICS[metric]
    return f"{name} ({unit})"


def count(n: int, thing: str) -> str:
    """`1 setting`, `2 settings`."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def parallel(settings: pd.DataFrame, axes: Names, is_one_seed: bool) -> str:
    """All settings as lines through their levels."""
    if not axes:
        return ONE_SETTING
    loss = loss_of(settings)
    if not varies(settings[loss]):
        return "<p>All settings have the same loss.</p>"
    shown = dict(list(axes.items())[:MAX_AXES])
    best = settings.iloc[0]
    at_best = ", ".join(f"{name} {level_name(best[axis])}" for axis, name in shown.items())
    through = f"{', '.join(shown.values())} and {METRICS[loss][0]}"
    alt = f"{len(settings)} settings as lines through {through}; setting 1: {at_best}"
    image = draw_parallel(settings[np.isfinite(settings[loss])], shown, loss, METRICS[loss][0])
    some = "" if len(shown) == len(axes) else f" {len(shown)} of {len(axes)} axes are shown."
    noise = (
        ALL_MAY_BE_NOISE
        if is_one_seed
        else " The table of settings says which of them are told apart from noise."
    )
    reading = f"A line is a setting; dark is a low loss, and the thick line setting 1.{noise}{some}"
    return figure("Settings and their loss", reading, image, alt=alt, kind="wide true-colors")


def fronts(settings: pd.DataFrame, axes: Names, packs: str, is_one_seed: bool) -> str:
    """Loss against what it may cost, and the settings that no other beats in both; `packs` is of `pack_note`."""
    if not axes:
        return ONE_SETTING
    loss = loss_of(settings)
    drawn, tables, said = [], [], []
    for metric in TRADED:
        name = METRICS[metric][0]
        known = settings[np.isfinite(settings[metric]) & np.isfinite(settings[loss])]
        if not len(known):
            said.append(f"No setting has a {name}.")
            continue
        num_without = len(settings) - len(known)
        if num_without:
            said.append(f"Left out of a figure: {count(num_without, 'setting')} without {name}.")
        if not varies(known[metric]):
            value = mean_and_error(float(known[metric].iloc[0]), math.nan)
            said.append(f"All settings have the same {name}, {value}: there is nothing to trade.")
            continue
        is_front = pareto_front(known, [loss, metric])
        numbers = [int(n) for n in known[NUMBER]]
        image = draw_front(
            known[metric].to_numpy(np.float64), known[loss].to_numpy(np.float64), is_front, numbers, unit_of(metric),
            unit_of(loss), errors=known[f"{loss}/se"].to_numpy(np.float64),
        )  # fmt: skip
        front = known[is_front].sort_values(metric, kind="stable")
        listed = ", ".join(map(str, front[NUMBER]))
        of_loss = METRICS[loss][0].capitalize()
        alt = f"{of_loss} against {name} of {len(known)} settings; on the front are the settings {listed}"
        bars = (
            ""
            if known[f"{loss}/se"].isna().all()
            else " Bars are standard errors of the loss over seeds."
        )
        bars += ALL_MAY_BE_NOISE * is_one_seed
        reading = f"Both are to be low.{bars}{f' {packs}' if metric == STEP_TIME else ''}"
        drawn.append(figure(f"Loss against {name}", reading, image, alt=alt))
        tables.append(
            f"<h3>On the front of loss and {name}</h3>" + _front_table(front, axes, (loss, metric))
        )
    text = (
        "<p>On the front are settings that no other beats in one without losing in the other. Means over seeds are "
        "compared, so which of two settings is on the front may be noise. "
        f"{' '.join(said)}</p>"
    )
    return text + (grid(drawn) if drawn else "") + "".join(tables)


def _front_table(front: pd.DataFrame, axes: Names, traded: tuple[str, str]) -> str:
    rows = [
        [
            str(row[NUMBER]),
            arms_in_words(row),
            *(
                html.text("" if key_of(row[axis]) is None else level_name(row[axis]))
                for axis in axes
            ),
            *(html.text(mean_and_error(row[key], row[f"{key}/se"])) for key in traded),
        ]
        for row in front.to_dict("records")
    ]
    names = [html.text(name) for name in axes.values()]
    return table(["setting", "arms", *names, *(METRICS[key][0] for key in traded)], rows, "numbers")
