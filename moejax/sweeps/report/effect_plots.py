"""What the axes of a sweep do, for its page: differences of each axis, and pairs of axes together.

A figure is drawn only where there is something to be seen beyond noise, or where an interval says
how much of it there is.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.report.page import figure, grid, table
from moejax.sweeps.report.effects import (
    AxisEffect,
    Interaction,
    axis_effect,
    distinct_axes,
    interaction,
)
from moejax.sweeps.report.figures import MAX_LINES, draw_effect, draw_interaction
from moejax.sweeps.report.plots import ONE_SETTING, STEP_TIME, Names, count, unit_of
from moejax.sweeps.report.scale import level_name, scale_of
from moejax.sweeps.report.settings import (
    METRICS,
    constants_in_words,
    difference_in_words,
    mean_and_error,
    varies,
)
from moejax.sweeps.tables import OVERRIDE, key_of, levels_of, loss_of

EFFECT_METRICS = ("tail/moe/max_violation", "tail/moe/dropped", STEP_TIME)  # beside the loss
MAX_EFFECT_LEVELS = 24  # of an axis: of more, hardly one comes twice
MAX_PAIRS = 12  # of axes, drawn
MAX_LEVELS = 16  # along the axis of a pair: of more, a line follows noise
ONE_SEED = (
    '<p class="warning">The arms have one seed: nothing can be said about whether a difference is more than noise, and '
    "none is drawn. Give each point several seeds (--seeds=3).</p>"
)
IN_PAIRS = (
    "<p>Arms are compared in pairs that are equal but for the axis and have the same seed. A difference is the mean "
    "over such pairs, with Student's 95 % interval over seeds: noise that all cells of a seed share is in it, however "
    "many cells there are. Grey: the interval holds 0, so the difference may be noise. Of 20 settings that differ in "
    "nothing, one would be told apart by chance.</p>"
)


def has_one_seed(arms: pd.DataFrame) -> bool:
    """Whether no two arms differ in their seed."""
    return arms["seed"].nunique() < 2


def effects(arms: pd.DataFrame, axes: Names, packs: str) -> str:
    """The difference of each level of an axis from the first, by metric; `packs` is of `pack_note`."""
    if not axes:
        return ONE_SETTING
    metrics = [metric for metric in (loss_of(arms), *EFFECT_METRICS) if varies(arms.get(metric))]
    constants = constants_in_words(arms, EFFECT_METRICS, "arms")
    parts = [
        ONE_SEED if has_one_seed(arms) else IN_PAIRS,
        f"<p>{constants}</p>" if constants else "",
    ]
    parts += [_axis_section(arms, axis, axes, metrics, packs) for axis in distinct_axes(arms)]
    return "".join(parts)


def _axis_section(
    arms: pd.DataFrame, axis: str, axes: Names, metrics: Sequence[str], packs: str
) -> str:
    name = axes[axis]
    head = f"<h3><code>{html.text(axis.removeprefix(OVERRIDE))}</code></h3>"
    num_levels = len(levels_of(arms[axis]))
    if num_levels > MAX_EFFECT_LEVELS:
        return f"{head}<p>{num_levels} levels are too many to compare each with one; see the settings.</p>"
    found = {metric: axis_effect(arms, metric, axis) for metric in metrics}
    found = {metric: effect for metric, effect in found.items() if any(_pairs(effect))}
    if not found:
        return f"{head}<p>No two arms of one seed differ in it alone, so its effect cannot be told; see the settings.</p>"
    drawn = []
    for metric, effect in found.items():
        if effect.num_seeds > 1:
            image = draw_effect(effect, name, f"difference, {METRICS[metric][1]}")
            reading = packs if metric == STEP_TIME else ""
            alt = _effect_in_words(effect, name, metric)
            drawn.append(figure(METRICS[metric][0], reading, image, alt=alt))
    first = next(iter(found.values()))
    said = _note(first, axes) + (_headline(first) if loss_of(arms) in found else "")
    return f"{head}<p>{said}</p>{grid(drawn) if drawn else ''}{_effect_table(found)}"


def _pairs(effect: AxisEffect) -> list[int]:
    return [level.difference.num_pairs for level in effect.others]


def _note(effect: AxisEffect, axes: Names) -> str:
    said = [
        f"Compared with {html.text(level_name(effect.reference))}, the first of the sweep that is compared."
    ]
    if effect.changes_with:
        said.append(
            f"With it changes {html.text(', '.join(axes[name] for name in effect.changes_with))}."
        )
    num_left_out = sum(level.difference.num_left_out for level in effect.others)
    if num_left_out:
        said.append(
            f"{count(num_left_out, 'pair')} left out, as their cells lack a seed that others have."
        )
    if effect.num_unset:
        said.append(f"{count(effect.num_unset, 'arm')} without it left out.")
    return " ".join(said) + " "


def _headline(effect: AxisEffect) -> str:
    """Which levels differ in their loss by more than seeds do."""
    if effect.num_seeds < 2:
        return (
            ""
            if effect.num_seeds == 0
            else "With pairs of one seed, nothing can be said about noise."
        )
    told = [level for level in effect.others if level.difference.is_told_apart]
    over = f"over {count(effect.num_seeds, 'seed')}"
    if not told:
        return f"<strong>No level's loss is told apart from noise {over}.</strong>"
    listed = "; ".join(
        f"{level_name(level.level)}: {difference_in_words(level.difference)}" for level in told
    )
    return f"<strong>Told apart from noise {over}: {html.text(listed)}.</strong>"


def _effect_table(found: Mapping[str, AxisEffect]) -> str:
    """Means and differences of all metrics by level."""
    first = next(iter(found.values()))
    head = ["level", "pairs"]
    for metric in found:
        head += [METRICS[metric][0], "difference"]
    rows = []
    for level in first.levels:
        is_reference = key_of(level.level) == key_of(first.reference)
        cells = [
            html.text(level_name(level.level)),
            "" if is_reference else _pairs_in_words(level.difference),
        ]
        for effect in found.values():
            cells += _metric_cells(effect, level.level)
        rows.append(cells)
    return table(head, rows, "numbers")


def _metric_cells(effect: AxisEffect, level: Any) -> list[str]:
    """Mean and difference of a level; a metric that the first level lacks has another reference."""
    own = next((other for other in effect.levels if key_of(other.level) == key_of(level)), None)
    if own is None:
        return ["", ""]
    is_reference = key_of(level) == key_of(effect.reference)
    difference = "reference" if is_reference else html.text(difference_in_words(own.difference))
    return [html.text(mean_and_error(own.mean, math.nan)), difference]


def _pairs_in_words(difference: Difference) -> str:
    if not difference.num_pairs:
        return "none"
    return f"{difference.num_pairs} of {count(difference.num_seeds, 'seed')}"


def _effect_in_words(effect: AxisEffect, name: str, metric: str) -> str:
    known = [level for level in effect.others if level.difference.num_seeds > 1]
    listed = "; ".join(
        f"{level_name(level.level)}: {difference_in_words(level.difference)}" for level in known
    )
    return (
        f"Difference in {METRICS[metric][0]} from {name} {level_name(effect.reference)}: {listed}"
    )


def interactions(arms: pd.DataFrame, axes: Names) -> str:
    """How far each pair of axes departs from two separate effects; a figure where that is more than noise."""
    if not axes:
        return ONE_SETTING
    names = distinct_axes(arms)
    if len(names) < 2:
        return "<p>Fewer than two axes have more than one level.</p>"
    if has_one_seed(arms):
        return ONE_SEED
    found, num_sparse = [], 0
    for pair in itertools.combinations(names, 2):
        along, lines = _order(arms, *pair)
        is_small = (
            len(levels_of(arms[along])) <= MAX_LEVELS and len(levels_of(arms[lines])) <= MAX_LINES
        )
        both = interaction(arms, loss_of(arms), along, lines) if is_small else None
        if both is None:
            num_sparse += 1
        else:
            found.append((along, lines, both))
    found.sort(key=lambda item: (not item[2].departure.is_told_apart, -abs(item[2].departure.mean)))
    said = [
        "The effect of one axis may depend on another: then the loss is no sum of two effects. The largest departure "
        "from such a sum is given with an interval over seeds that all departures of a pair keep together. Only pairs "
        "whose departure is told apart from 0 are drawn: lines that are not parallel are often noise."
    ]
    if num_sparse:
        said.append(
            f"Not judged: {count(num_sparse, 'pair')} with too few cells or too many levels."
        )
    if found and not any(both.departure.is_told_apart for _, _, both in found):
        said.append(
            "<strong>No pair departs from two separate effects by more than noise.</strong>"
        )
    drawn = [
        figure(
            f"{html.text(axes[along])} by {html.text(axes[lines])}", _departure(both),
            draw_interaction(both.means, axes[along], axes[lines], unit_of(loss_of(arms)), levels_of(arms[lines])),
            alt=_interaction_in_words(both.means, axes[along], axes[lines], METRICS[loss_of(arms)][0]),
        )
        for along, lines, both in found[:MAX_PAIRS]
        if both.departure.is_told_apart
    ]  # fmt: skip
    rows = [
        [
            f"{html.text(axes[along])} by {html.text(axes[lines])}",
            html.text(difference_in_words(both.departure)),
            _told(both.departure),
        ]
        for along, lines, both in found
    ]
    listed = (
        table(["pair", "largest departure", "told apart from 0"], rows, "numbers") if rows else ""
    )
    return f"<p>{' '.join(said)}</p>{listed}{grid(drawn) if drawn else ''}"


def _order(arms: pd.DataFrame, one: str, other: str) -> tuple[str, str]:
    """Numbers along the axis, names as lines; of two of a kind, the one with more levels along the axis."""

    def rank(axis: str) -> tuple[bool, int]:
        scale = scale_of(arms[axis])
        return (not scale.is_named and len(scale.levels) > 1, len(scale.levels))

    along, lines = (one, other) if rank(one) >= rank(other) else (other, one)
    if len(levels_of(arms[lines])) > MAX_LINES:
        along, lines = lines, along
    return along, lines


def _departure(both: Interaction) -> str:
    some = "" if both.is_whole else " Levels that lack a combination are left out."
    return f"Largest departure from two separate effects: {html.text(difference_in_words(both.departure))}.{some}"


def _told(departure: Difference) -> str:
    return ("yes" if departure.is_told_apart else "no") if departure.num_seeds > 1 else "one seed"


def _interaction_in_words(means: pd.DataFrame, along: str, lines: str, metric: str) -> str:
    cells = means.stack()
    lowest = cells.idxmin()
    where = f"{level_name(lowest[0])} and {level_name(lowest[1])}"
    return (
        f"Mean {metric} by {along}, a line for each {lines}; lowest {cells[lowest]:.4g} at {where}"
    )
