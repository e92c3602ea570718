"""Where the levels of a sweep's axis stand in a figure, and what they are called.

Numbers stand at their value, or at its logarithm if they span a decade or more; names, truth
values, and numbers that span decades and include 0, stand side by side.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, NullLocator

from moejax.inspection.figures.style import legend_name, short_number
from moejax.sweeps.tables import is_number, key_of, levels_of

DECADE = 10.0
MAX_NAMED = 7  # levels with a tick each; of more, round numbers
MIN_GAP = 0.09  # between ticks, of the axis
MAX_LETTERS = 20
ROUNDING = 1e-9  # of places


@dataclasses.dataclass(frozen=True)
class Scale:
    """The places of an axis's levels.

    Attributes:
      levels: in order.
      kind: "linear", "log", or "categorical": side by side.
    """

    levels: tuple[Any, ...]
    kind: str

    @property
    def is_named(self) -> bool:
        """Whether some level is no number, so that labels are long."""
        return not all(map(is_number, self.levels))

    def places(self, values: Iterable[Any]) -> Float[np.ndarray, "S"]:
        """Returns the place of each value; NaN for one that is not set."""
        index = {key_of(level): float(i) for i, level in enumerate(self.levels)}
        return np.array([self._place(value, index) for value in values], np.float64)

    def _place(self, value: Any, index: Mapping[Any, float]) -> float:
        key = key_of(value)
        if key not in index:
            return math.nan
        if self.kind == "categorical":
            return index[key]
        if self.kind == "log":
            return math.log10(value)
        return float(value)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns places and labels that do not overlap: those of the levels if there are few."""
        places = self.places(self.levels).tolist()
        names = map(level_name, self.levels)
        of_levels = list(zip(places, names, strict=True))
        if self.kind == "categorical":
            step = math.ceil(len(places) / (2 * MAX_NAMED))
            return of_levels[::step]
        low = min(places)
        high = max(places)
        gap = MIN_GAP * (high - low)
        if len(places) <= MAX_NAMED:
            return _apart(of_levels, gap)
        return _apart(self._round_ticks(low, high), gap)

    def _round_ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """Returns round numbers between two places."""
        if self.kind == "log":
            return [(place, level_name(10**place)) for place in _round_powers(low, high)]
        locator = MaxNLocator(5)
        found = []
        for value in locator.tick_values(low, high):
            place = float(value)
            if low <= place <= high:
                found.append((place, level_name(place)))
        return found

    def label(self, axis: Axis) -> None:
        """Puts the ticks on a figure's axis."""
        ticks = self.ticks()
        places = [place for place, _ in ticks]
        names = [name for _, name in ticks]
        axis.set_ticks(places, labels=names)
        axis.set_minor_locator(NullLocator())


def _apart(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Returns the first tick, and then each that is no closer than a gap to the last one kept."""
    kept: list[tuple[float, str]] = []
    last = -math.inf
    for place, name in ticks:
        if place - last >= gap:
            kept.append((place, name))
            last = place
    return kept


def _round_powers(low: float, high: float) -> list[float]:
    """Returns logarithms of round numbers; more digits where the decades alone are few ticks."""
    first_decade = math.floor(low)
    last_decade = math.floor(high + ROUNDING)
    decades = range(first_decade, last_decade + 1)
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = []
        for decade in decades:
            for digit in digits:
                place = decade + math.log10(digit)
                if low - ROUNDING <= place <= high + ROUNDING:
                    found.append(place)
        if len(found) > 2:
            break
    return found


def scale_of(values: Iterable[Any]) -> Scale:
    """Returns the scale that fits an axis's values."""
    levels = levels_of(values)
    return Scale(tuple(levels), _kind(levels))


def _kind(levels: Sequence[Any]) -> str:
    """Returns the kind of the scale that fits levels in order."""
    if not levels or not all(map(is_number, levels)):
        return "categorical"
    positive = [level for level in levels if level > 0]
    if not positive or positive[-1] / positive[0] < DECADE:
        return "linear"
    # Numbers that span decades and include 0 have no place on a logarithmic scale.
    return "log" if len(positive) == len(levels) else "categorical"


def level_name(level: Any, most: int = MAX_LETTERS) -> str:
    """Returns a level's name in a figure: a short number, or the beginning of a long name."""
    if key_of(level) is None:
        return "not set"
    if is_number(level):
        if abs(level) >= 10_000:
            return short_number(level)
        rounded = float(f"{level:.4g}")
        return f"{rounded:g}"
    name = legend_name(str(level)) or "(empty)"
    return name if len(name) <= most else f"{name[: most - 1]}…"
