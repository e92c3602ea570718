"""What pairs of axes of a sweep do together, for its page.

A figure is drawn only where two axes depart from two separate effects by more than noise.
"""

import itertools

import pandas as pd

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.html import Markup
from moejax.inspection.report.page import figure, grid, table
from moejax.sweeps.report.effect_plots import ONE_SEED, has_one_seed
from moejax.sweeps.report.effects import Interaction, distinct_axes, interaction
from moejax.sweeps.report.figures import MAX_LINES, draw_interaction
from moejax.sweeps.report.plots import ONE_SETTING, Names, count, unit_of
from moejax.sweeps.report.scale import level_name, scale_of
from moejax.sweeps.report.settings import METRICS, difference_in_words
from moejax.sweeps.tables import levels_of, loss_of

MAX_PAIRS = 12  # of axes, drawn
MAX_LEVELS = 16  # along the axis of a pair: of more, a line follows noise

Found = tuple[str, str, Interaction]
"""The axis that lines run along, the axis whose levels are lines, and what both do together."""


def interactions(arms: pd.DataFrame, axes: Names) -> Markup:
    """Returns how far each pair of axes departs from two separate effects."""
    if not axes:
        return html.paragraph(ONE_SETTING)
    names = distinct_axes(arms)
    if len(names) < 2:
        return html.paragraph("Fewer than two axes have more than one level.")
    if has_one_seed(arms):
        return html.paragraph(ONE_SEED, "warning")
    found, num_sparse = _find_interactions(arms, names)
    told_apart = [item for item in found[:MAX_PAIRS] if item[2].departure.is_told_apart]
    return html.render(
        "sweep/interactions",
        sparse=count(num_sparse, "pair") if num_sparse else "",
        is_noise=bool(found) and not any(both.departure.is_told_apart for _, _, both in found),
        table=_table(found, axes),
        figures=grid(_draw(arms, item, axes) for item in told_apart),
    )


def _find_interactions(arms: pd.DataFrame, names: list[str]) -> tuple[list[Found], int]:
    """Returns pairs of axes, those told apart from noise and the largest departures first.

    Returns:
      The pairs, and how many others have too few cells or too many levels.
    """
    found = []
    pairs = list(itertools.combinations(names, 2))
    for pair in pairs:
        along, lines = _order(arms, *pair)
        num_along, num_lines = len(levels_of(arms[along])), len(levels_of(arms[lines]))
        if num_along <= MAX_LEVELS and num_lines <= MAX_LINES:
            both = interaction(arms, loss_of(arms), along, lines)
            if both is not None:
                found.append((along, lines, both))
    found.sort(key=lambda item: (not item[2].departure.is_told_apart, -abs(item[2].departure.mean)))
    return found, len(pairs) - len(found)


def _order(arms: pd.DataFrame, one: str, other: str) -> tuple[str, str]:
    """Chooses which of two axes lines run along, and which has a line for each level.

    Numbers are along the axis, names are lines; of two of a kind, the one with more levels is along
    the axis.
    """

    def rank(axis: str) -> tuple[bool, int]:
        scale = scale_of(arms[axis])
        return (not scale.is_named and len(scale.levels) > 1, len(scale.levels))

    along, lines = (one, other) if rank(one) >= rank(other) else (other, one)
    if len(levels_of(arms[lines])) > MAX_LINES:
        along, lines = lines, along
    return along, lines


def _draw(arms: pd.DataFrame, found: Found, axes: Names) -> Markup:
    along, lines, both = found
    loss = loss_of(arms)
    order = levels_of(arms[lines])
    image = draw_interaction(both.means, axes[along], axes[lines], unit_of(loss), order)
    alt = _interaction_in_words(both.means, axes[along], axes[lines], METRICS[loss][0])
    return figure(f"{axes[along]} by {axes[lines]}", _departure(both), image, alt=alt)


def _table(found: list[Found], axes: Names) -> Markup:
    if not found:
        return html.EMPTY
    rows = []
    for along, lines, both in found:
        departure = both.departure
        pair = f"{axes[along]} by {axes[lines]}"
        rows.append([pair, difference_in_words(departure), _verdict(departure)])
    return table(["pair", "largest departure", "told apart from 0"], rows, "numbers")


def _departure(both: Interaction) -> str:
    departure = difference_in_words(both.departure)
    said = f"Largest departure from two separate effects: {departure}."
    return said if both.is_whole else f"{said} Levels that lack a combination are left out."


def _verdict(departure: Difference) -> str:
    if departure.num_seeds <= 1:
        return "one seed"
    return "yes" if departure.is_told_apart else "no"


def _interaction_in_words(means: pd.DataFrame, along: str, lines: str, metric: str) -> str:
    cells = means.stack()
    lowest = cells.idxmin()
    where = f"{level_name(lowest[0])} and {level_name(lowest[1])}"
    return (
        f"Mean {metric} by {along}, a line for each {lines}; lowest {cells[lowest]:.4g} at {where}"
    )
