"""What pairs of axes of a sweep do together, for its page.

A figure is drawn only where two axes depart from two separate effects by more than noise.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two axes of a figure.

    Attributes:
      along: the axis that lines run along.
      lines: the axis whose levels are lines.
      both: what they do together.
    """

    along: str
    lines: str
    both: Interaction

    @property
    def departure(self) -> Difference:
        """The largest departure from two separate effects."""
        return self.both.departure

    @property
    def rank(self) -> tuple[bool, float]:
        """Orders pairs: those told apart from noise first, then by the size of the departure."""
        return (not self.departure.is_told_apart, -abs(self.departure.mean))


def interactions(arms: pd.DataFrame, axes: Names) -> Markup:
    """Returns how far each pair of axes departs from two separate effects."""
    if not axes:
        return html.paragraph(ONE_SETTING)
    names = distinct_axes(arms)
    if len(names) < 2:
        return html.paragraph("Fewer than two axes have more than one level.")
    if has_one_seed(arms):
        return html.paragraph(ONE_SEED, "warning")
    pairs, num_sparse = _find_pairs(arms, names)
    told_apart = [pair for pair in pairs if pair.departure.is_told_apart]
    drawn = [_draw(arms, pair, axes) for pair in told_apart[:MAX_PAIRS]]
    return html.render(
        "sweep/interactions",
        sparse=count(num_sparse, "pair") if num_sparse else "",
        is_noise=bool(pairs) and not told_apart,
        table=_table(pairs, axes),
        figures=grid(drawn),
    )


def _find_pairs(arms: pd.DataFrame, names: list[str]) -> tuple[list[Pair], int]:
    """Returns the pairs of axes that can be judged, in the order of their rank.

    Returns:
      The pairs, and how many others have too few cells or too many levels.
    """
    loss = loss_of(arms)
    pairs = []
    num_sparse = 0
    for one, other in itertools.combinations(names, 2):
        along, lines = _order(arms, one, other)
        has_room = _num_levels(arms, along) <= MAX_LEVELS and _num_levels(arms, lines) <= MAX_LINES
        both = interaction(arms, loss, along, lines) if has_room else None
        if both is None:
            num_sparse += 1
        else:
            pairs.append(Pair(along, lines, both))
    pairs.sort(key=lambda pair: pair.rank)
    return pairs, num_sparse


def _order(arms: pd.DataFrame, one: str, other: str) -> tuple[str, str]:
    """Chooses which of two axes lines run along, and which has a line for each level.

    Numbers are along the axis, names are lines; of two of a kind, the one with more levels is along
    the axis.
    """
    rank_of_one = _rank_along(arms, one)
    rank_of_other = _rank_along(arms, other)
    along, lines = one, other
    if rank_of_one < rank_of_other:
        along, lines = other, one
    if _num_levels(arms, lines) > MAX_LINES:
        along, lines = lines, along
    return along, lines


def _rank_along(arms: pd.DataFrame, axis: str) -> tuple[bool, int]:
    """Returns how well lines run along an axis, highest for the best."""
    scale = scale_of(arms[axis])
    num_levels = len(scale.levels)
    has_numbers = not scale.is_named
    is_line = has_numbers and num_levels > 1
    return is_line, num_levels


def _num_levels(arms: pd.DataFrame, axis: str) -> int:
    return len(levels_of(arms[axis]))


def _draw(arms: pd.DataFrame, pair: Pair, axes: Names) -> Markup:
    loss = loss_of(arms)
    metric, *_ = METRICS[loss]
    unit = unit_of(loss)
    means = pair.both.means
    along = axes[pair.along]
    lines = axes[pair.lines]
    order = levels_of(arms[pair.lines])
    image = draw_interaction(means, along, lines, unit, order)
    alt = _interaction_in_words(means, along, lines, metric)
    title = f"{along} by {lines}"
    caption = _departure(pair.both)
    return figure(title, caption, image, alt=alt)


def _table(pairs: list[Pair], axes: Names) -> Markup:
    if not pairs:
        return html.EMPTY
    rows = []
    for pair in pairs:
        name = f"{axes[pair.along]} by {axes[pair.lines]}"
        departure = difference_in_words(pair.departure)
        rows.append([name, departure, _verdict(pair.departure)])
    head = ["pair", "largest departure", "told apart from 0"]
    return table(head, rows, "numbers")


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
    value = cells[lowest]
    level_along, level_of_line = map(level_name, lowest)
    return (
        f"Mean {metric} by {along}, a line for each {lines}; lowest {value:.4g} at "
        f"{level_along} and {level_of_line}"
    )
