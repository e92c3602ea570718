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
        return math.log10(value) if self.kind == "log" else float(value)

    def ticks(self) -> list[tuple[float, str]]:
        """Returns places and labels that do not overlap: those of the levels if there are few."""
        places = self.places(self.levels).tolist()
        named = [level_name(level) for level in self.levels]
        found = list(zip(places, named, strict=True))
        if self.kind == "categorical":
            step = math.ceil(len(places) / (2 * MAX_NAMED))
            return found[::step]
        if len(self.levels) > MAX_NAMED:
            found = self._round_ticks(min(places), max(places))
        gap = MIN_GAP * (max(places) - min(places))
        kept = found[:1]
        for place, name in found[1:]:
            last, _ = kept[-1]
            if place - last >= gap:
                kept.append((place, name))
        return kept

    def _round_ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """Returns round numbers between two places."""
        if self.kind == "log":
            return [(place, level_name(10**place)) for place in _round_powers(low, high)]
        found = []
        for value in MaxNLocator(5).tick_values(low, high):
            place = float(value)
            if low <= place <= high:
                found.append((place, level_name(place)))
        return found

    def label(self, axis: Axis) -> None:
        """Puts the ticks on a figure's axis."""
        ticks = self.ticks()
        axis.set_ticks([place for place, _ in ticks], labels=[name for _, name in ticks])
        axis.set_minor_locator(NullLocator())


def _round_powers(low: float, high: float) -> list[float]:
    """Returns logarithms of round numbers; more digits where the decades alone are few ticks."""
    decades = range(math.floor(low), math.floor(high + ROUNDING) + 1)
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
    if not levels or not all(map(is_number, levels)):
        return "categorical"
    lowest, highest = levels[0], levels[-1]
    if lowest > 0:
        return "log" if highest / lowest >= DECADE else "linear"
    # Numbers that span decades and include 0 have no place on a logarithmic scale.
    positive = [level for level in levels if level > 0]
    spans_decades = bool(positive) and highest / positive[0] >= DECADE
    return "categorical" if spans_decades else "linear"


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
