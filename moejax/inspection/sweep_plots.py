"""The figures of a sweep's page with their words: effects, interactions, all settings, fronts."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from moejax.inspection import html
from moejax.inspection.page import figure, grid, table
from moejax.inspection.sweep_figures import MAX_LINES, draw_effect, draw_front, draw_interaction, draw_parallel
from moejax.inspection.sweep_scale import level_name, scale_of
from moejax.inspection.sweep_settings import METRICS, NUMBER, arms_in_words, mean_and_error
from moejax.inspection.sweep_tables import (
    LOSS,
    Effect,
    interaction,
    is_balanced,
    key_of,
    levels_of,
    main_effect,
    pareto_front,
)
from moejax.inspection.sweep_tables import strength as strength_of

STEP_TIME = "step_s"
EFFECT_METRICS = (LOSS, "tail/moe/max_violation", "tail/moe/dropped", STEP_TIME)
TRADED = ("tail/moe/dropped", STEP_TIME)
MAX_AXES = 10  # in the figure of all settings
MAX_PAIRS = 12  # of axes, those that interact most
MAX_LEVELS = 16  # along the axis of a pair: of more, a line follows noise
MIN_FILLED = 0.5  # of a pair's cells
MAX_ALT_LEVELS = 12
ONE_SETTING = "<p>No axis has more than one level among the arms that are compared.</p>"

Names = Mapping[str, str]
"""From columns of axes that differ to short names."""


def unit_of(metric: str) -> str:
    """Name and unit of a metric, for a figure."""
    name, unit = METRICS[metric]
    return f"{name} ({unit})"


def effects(settings: pd.DataFrame, axes: Names, packs: str) -> str:
    """A figure for each axis and each metric that is not the same in all settings; `packs` is of `pack_note`."""
    if not axes:
        return ONE_SETTING
    parts = [
        "<p>Each point is a setting's mean over its seeds, ± one standard error (none if there is one seed).</p>"
        if len(axes) == 1
        else "<p>Each point is the mean over all cells of the other axes, each of the same weight, ± one standard "
        "error over those cells: it holds what the other axes do, so levels can differ although bars overlap. A level "
        "with one cell has the standard error over the cell's seeds, if there are several.</p>"
    ]
    for axis, name in axes.items():
        drawn, note = [], ""
        for metric in EFFECT_METRICS:
            effect = main_effect(settings, metric, axis)
            if len(effect.table) < 2 or not _varies(settings[metric]):
                continue
            note = note or _note(effect)
            image = draw_effect(effect, name, unit_of(metric))
            reading = packs if metric == STEP_TIME else ""
            drawn.append(figure(METRICS[metric][0], reading, image, alt=_effect_in_words(effect, name, metric)))
        if drawn:
            parts.append(f"<h3><code>{html.text(axis.partition('/')[2])}</code></h3>{note}{grid(drawn)}")
    return "".join(parts) if len(parts) > 1 else "<p>No metric differs between levels.</p>"


def count(n: int, thing: str) -> str:
    """`1 setting`, `2 settings`."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _varies(values: pd.Series) -> bool:
    known = values.dropna()
    return len(known) > 1 and float(np.ptp(known)) > 1e-9 * float(known.abs().max())  # more than means are rounded


def _note(effect: Effect) -> str:
    said = []
    if not effect.is_balanced:
        said.append(
            "Its levels do not have the same cells of the other axes, so differences hold some of what those do."
        )
    if effect.num_unset:
        said.append(f"{count(effect.num_unset, 'setting')} without it left out.")
    return f"<p>{' '.join(said)}</p>" if said else ""


def _effect_in_words(effect: Effect, name: str, metric: str) -> str:
    rows = list(effect.table.itertuples(index=False))
    listed = "; ".join(f"{level_name(r.level)}: {mean_and_error(r.mean, r.se)}" for r in rows[:MAX_ALT_LEVELS])
    more = f"; and {len(rows) - MAX_ALT_LEVELS} more levels" if len(rows) > MAX_ALT_LEVELS else ""
    return f"Mean {METRICS[metric][0]} by {name}: {listed}{more}"


def interactions(settings: pd.DataFrame, axes: Names) -> str:
    """A figure of the loss for each pair of axes with enough cells, those that interact most first."""
    if not axes:
        return ONE_SETTING
    if len(axes) < 2:
        return "<p>Fewer than two axes have more than one level.</p>"
    found, num_sparse = [], 0
    for pair in itertools.combinations(axes, 2):
        along, lines = _order(settings, *pair)
        means = interaction(settings, LOSS, along, lines).dropna(how="all").dropna(axis="columns", how="all")
        if (
            not (2 <= len(means) <= MAX_LEVELS and 2 <= means.shape[1] <= MAX_LINES)
            or means.notna().to_numpy().mean() < MIN_FILLED
        ):
            num_sparse += 1
            continue
        found.append((strength_of(means), along, lines, means))
    found.sort(key=lambda item: math.inf if math.isnan(item[0]) else -item[0])
    drawn = [
        figure(
            f"{html.text(axes[along])} by {html.text(axes[lines])}",
            _departure(size, is_balanced(settings, LOSS, [along, lines])),
            draw_interaction(means, axes[along], axes[lines], unit_of(LOSS)),
            alt=_interaction_in_words(means, axes[along], axes[lines]),
        )
        for size, along, lines, means in found[:MAX_PAIRS]
    ]
    said = [
        "Lines that are not parallel: the effect of one axis depends on the other. Cells are means over all others."
    ]
    if num_sparse:
        said.append(f"Not drawn: {count(num_sparse, 'pair')} with too few cells or too many levels.")
    if len(found) > MAX_PAIRS:
        said.append(f"Of {len(found)} pairs, the {MAX_PAIRS} that depart most are drawn.")
    return f"<p>{' '.join(said)}</p>{grid(drawn)}"


def _order(settings: pd.DataFrame, one: str, other: str) -> tuple[str, str]:
    """Numbers along the axis, names as lines; of two of a kind, the one with more levels along the axis."""

    def rank(axis: str) -> tuple[bool, int]:
        scale = scale_of(settings[axis])
        return (not scale.is_named and len(scale.levels) > 1, len(scale.levels))

    along, lines = (one, other) if rank(one) >= rank(other) else (other, one)
    if len(levels_of(settings[lines])) > MAX_LINES:
        along, lines = lines, along
    return along, lines


def _departure(size: float, is_fair: bool) -> str:
    shown = "not judged, as too many cells have no setting" if math.isnan(size) else f"{size:.3g} nats"
    note = "" if is_fair else (
        " Its cells are means over different levels of the other axes, so it holds some of what those do."
    )  # fmt: skip
    return f"Largest departure from two separate effects: {shown}.{note}"


def _interaction_in_words(means: pd.DataFrame, along: str, lines: str) -> str:
    cells = means.stack()
    best = cells.idxmin() if len(cells.dropna()) else None
    lowest = f"; lowest {cells[best]:.4g} at {level_name(best[0])} and {level_name(best[1])}" if best else ""
    return f"Mean eval loss by {along}, a line for each {lines}{lowest}"


def parallel(settings: pd.DataFrame, axes: Names) -> str:
    """All settings as lines through their levels."""
    if not axes:
        return ONE_SETTING
    if not _varies(settings[LOSS]):
        return "<p>All settings have the same loss.</p>"
    shown = dict(list(axes.items())[:MAX_AXES])
    best = settings.iloc[0]
    at_best = ", ".join(f"{name} {level_name(best[axis])}" for axis, name in shown.items())
    alt = f"{len(settings)} settings as lines through {', '.join(shown.values())} and eval loss; setting 1: {at_best}"
    image = draw_parallel(settings, shown, LOSS, METRICS[LOSS][0])
    some = "" if len(shown) == len(axes) else f" {len(shown)} of {len(axes)} axes are shown."
    reading = f"A line is a setting; dark is a low loss, and the thick line setting 1.{some}"
    return figure("Settings and their loss", reading, image, alt=alt, kind="wide true-colors")


def fronts(settings: pd.DataFrame, axes: Names, packs: str) -> str:
    """Loss against what it may cost, and the settings that no other beats in both; `packs` is of `pack_note`."""
    if not axes:
        return ONE_SETTING
    drawn, tables, said = [], [], []
    for metric in TRADED:
        name = METRICS[metric][0]
        known = settings[np.isfinite(settings[metric]) & np.isfinite(settings[LOSS])]
        if not len(known):
            said.append(f"No setting has a {name}.")
            continue
        num_without = len(settings) - len(known)
        if num_without:
            said.append(f"Left out of a figure: {count(num_without, 'setting')} without {name}.")
        if not _varies(known[metric]):
            value = mean_and_error(float(known[metric].iloc[0]), math.nan)
            said.append(f"All settings have the same {name}, {value}: there is nothing to trade.")
            continue
        is_front = pareto_front(known, [LOSS, metric])
        numbers = [int(n) for n in known[NUMBER]]
        image = draw_front(
            known[metric].to_numpy(np.float64), known[LOSS].to_numpy(np.float64), is_front, numbers, unit_of(metric),
            unit_of(LOSS),
        )  # fmt: skip
        front = known[is_front].sort_values(metric, kind="stable")
        listed = ", ".join(map(str, front[NUMBER]))
        alt = f"Eval loss against {name} of {len(known)} settings; on the front are the settings {listed}"
        reading = f"Both are to be low. {packs}" if metric == STEP_TIME else "Both are to be low."
        drawn.append(figure(f"Loss against {name}", reading, image, alt=alt))
        tables.append(f"<h3>On the front of loss and {name}</h3>" + _front_table(front, axes, metric))
    text = (
        "<p>On the front are settings that no other beats in one without losing in the other. Means over seeds are "
        f"compared; differences within their standard errors tell nothing. {' '.join(said)}</p>"
    )
    return text + (grid(drawn) if drawn else "") + "".join(tables)


def _front_table(front: pd.DataFrame, axes: Names, metric: str) -> str:
    rows = [
        [
            str(row[NUMBER]),
            arms_in_words(row),
            *(html.text("" if key_of(row[axis]) is None else level_name(row[axis])) for axis in axes),
            *(html.text(mean_and_error(row[key], row[f"{key}/se"])) for key in (LOSS, metric)),
        ]
        for row in front.to_dict("records")
    ]
    names = [html.text(name) for name in axes.values()]
    return table(["setting", "arms", *names, METRICS[LOSS][0], METRICS[metric][0]], rows, "numbers")
