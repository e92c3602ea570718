"""What each axis of a sweep does, for its page: differences of its levels from the first.

A figure is drawn only where an interval says how much of a difference may be noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.html import Markup
from moejax.inspection.report.page import figure, grid, table
from moejax.sweeps.report.effects import AxisEffect, Level, axis_effect, distinct_axes
from moejax.sweeps.report.figures import draw_effect
from moejax.sweeps.report.plots import ONE_SETTING, STEP_TIME, Names, count
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.report.settings import (
    METRICS,
    constants_in_words,
    difference_in_words,
    mean_and_error,
    varies,
)
from moejax.sweeps.tables import OVERRIDE, key_of, levels_of, loss_of

EFFECT_METRICS = ("tail/moe/max_violation", "tail/moe/dropped", STEP_TIME)  # next to the loss
MAX_EFFECT_LEVELS = 24  # of an axis: of more, hardly one comes twice
ONE_SEED = (
    "The arms have one seed: nothing can be said about whether a difference is more than noise, "
    "and none is drawn. Give each point several seeds (--seeds=3)."
)
IN_PAIRS = (
    "Arms are compared in pairs that are equal but for the axis and have the same seed. A "
    "difference is the mean over such pairs, with Student's 95 % interval over seeds: noise that "
    "all cells of a seed share is in it, however many cells there are. Grey: the interval holds "
    "0, so the difference may be noise. Of 20 settings that differ in nothing, one would be told "
    "apart by chance."
)

Effects = Mapping[str, AxisEffect]
"""The effect of one axis on each metric."""


def has_one_seed(arms: pd.DataFrame) -> bool:
    """Returns whether no two arms differ in their seed."""
    return arms["seed"].nunique() < 2


def effects(arms: pd.DataFrame, axes: Names, packs: str) -> Markup:
    """Returns the difference of each level of an axis from the first, by metric.

    Args:
      arms: that are compared.
      axes: names of those on which arms differ.
      packs: of `pack_note`.
    """
    if not axes:
        return html.paragraph(ONE_SETTING)
    wanted = (loss_of(arms), *EFFECT_METRICS)
    metrics = [metric for metric in wanted if varies(arms.get(metric))]
    intro = html.paragraph(IN_PAIRS)
    if has_one_seed(arms):
        intro = html.paragraph(ONE_SEED, "warning")
    same_in_all = constants_in_words(arms, EFFECT_METRICS, "arms")
    constants = html.paragraph(same_in_all)
    sections = []
    for axis in distinct_axes(arms):
        content = _axis_content(arms, axis, axes, metrics, packs)
        name = axis.removeprefix(OVERRIDE)
        sections.append(html.render("sweep/axis", name=name, content=content))
    return intro + constants + html.join(sections)


def _axis_content(
    arms: pd.DataFrame, axis: str, axes: Names, metrics: Sequence[str], packs: str
) -> Markup:
    num_levels = len(levels_of(arms[axis]))
    if num_levels > MAX_EFFECT_LEVELS:
        return html.paragraph(
            f"{num_levels} levels are too many to compare each with one; see the settings."
        )
    found = {}
    for metric in metrics:
        effect = axis_effect(arms, metric, axis)
        if any(level.difference.num_pairs for level in effect.others):
            found[metric] = effect
    if not found:
        return html.paragraph(
            "No two arms of one seed differ in it alone, so its effect is unknown; see the "
            "settings."
        )
    first = next(iter(found.values()))  # the loss, if that has an effect
    return html.render(
        "sweep/effect",
        notes=_notes(first, axes),
        num_seeds=first.num_seeds if loss_of(arms) in found else 0,
        seeds=count(first.num_seeds, "seed"),
        told_apart=_told_apart(first),
        figures=grid(_figures(found, axes[axis], packs)),
        table=_effect_table(found),
    )


def _figures(found: Effects, axis: str, packs: str) -> list[Markup]:
    drawn = []
    for metric, effect in found.items():
        if effect.num_seeds > 1:
            name, unit = METRICS[metric]
            image = draw_effect(effect, axis, f"difference, {unit}")
            reading = packs if metric == STEP_TIME else ""
            alt = _effect_in_words(effect, axis, name)
            drawn.append(figure(name, reading, image, alt=alt))
    return drawn


def _notes(effect: AxisEffect, axes: Names) -> list[str]:
    """Says what the levels are compared with, and what is left out."""
    reference = level_name(effect.reference)
    notes = [f"Compared with {reference}, the first of the sweep that is compared."]
    if effect.changes_with:
        names = ", ".join(axes[axis] for axis in effect.changes_with)
        notes.append(f"With it changes {names}.")
    num_left_out = sum(level.difference.num_left_out for level in effect.others)
    if num_left_out:
        pairs = count(num_left_out, "pair")
        notes.append(f"{pairs} left out, as their cells lack a seed that others have.")
    if effect.num_unset:
        arms = count(effect.num_unset, "arm")
        notes.append(f"{arms} without it left out.")
    return notes


def _told_apart(effect: AxisEffect) -> list[str]:
    """Returns the levels that differ by more than seeds do."""
    found = []
    for level in effect.others:
        if level.difference.is_told_apart:
            found.append(_level_in_words(level))
    return found


def _level_in_words(level: Level) -> str:
    """Returns a level and its difference from the reference."""
    name = level_name(level.level)
    return f"{name}: {difference_in_words(level.difference)}"


def _effect_table(found: Effects) -> Markup:
    """Returns means and differences of all metrics by level."""
    first = next(iter(found.values()))
    head = ["level", "pairs"]
    for metric in found:
        head += [METRICS[metric][0], "difference"]
    rows = []
    for level in first.levels:
        is_reference = key_of(level.level) == key_of(first.reference)
        pairs = "" if is_reference else _pairs_in_words(level.difference)
        cells = [level_name(level.level), pairs]
        for effect in found.values():
            cells += _metric_cells(effect, level.level)
        rows.append(cells)
    return table(head, rows, "numbers")


def _metric_cells(effect: AxisEffect, level: Any) -> list[str]:
    """Returns mean and difference of a level.

    Of a metric that the first level lacks, another level is the reference.
    """
    key = key_of(level)
    level_at = {key_of(known.level): known for known in effect.levels}
    if key not in level_at:
        return ["", ""]
    own = level_at[key]
    mean = mean_and_error(own.mean, math.nan)
    if key == key_of(effect.reference):
        return [mean, "reference"]
    return [mean, difference_in_words(own.difference)]


def _pairs_in_words(difference: Difference) -> str:
    if not difference.num_pairs:
        return "none"
    seeds = count(difference.num_seeds, "seed")
    return f"{difference.num_pairs} of {seeds}"


def _effect_in_words(effect: AxisEffect, axis: str, metric: str) -> str:
    parts = []
    for level in effect.others:
        if level.difference.num_seeds > 1:
            parts.append(_level_in_words(level))
    reference = level_name(effect.reference)
    listed = "; ".join(parts)
    return f"Difference in {metric} from {axis} {reference}: {listed}"
