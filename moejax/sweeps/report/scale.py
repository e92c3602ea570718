"""Where the levels of a sweep's axis stand in a figure, and what they are called.

Numbers stand at their value, or at its logarithm if they span a decade or more; names, truth
values, and numbers that span decades and include 0, stand side by side.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
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
        """Of each value; NaN for one that is not set."""
        index = {key_of(level): float(i) for i, level in enumerate(self.levels)}
        return np.array([self._place(value, index) for value in values], np.float64)

    def _place(self, value: Any, index: dict[Any, float]) -> float:
        key = key_of(value)
        if key not in index:
            return math.nan
        if self.kind == "categorical":
            return index[key]
        return math.log10(value) if self.kind == "log" else float(value)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels that do not run into one another: of the levels if there are few."""
        places = self.places(self.levels)
        if self.kind == "categorical":
            step = -(-len(places) // (2 * MAX_NAMED))
            return [
                (float(x), level_name(v))
                for x, v in zip(places[::step], self.levels[::step], strict=True)
            ]
        if len(self.levels) <= MAX_NAMED:
            found = [(float(x), level_name(v)) for x, v in zip(places, self.levels, strict=True)]
        else:
            found = [
                (x, level_name(10**x if self.kind == "log" else x)) for x in self._round(places)
            ]
        gap, kept = MIN_GAP * float(np.ptp(places)), found[:1]
        for place, name in found[1:]:
            if place - kept[-1][0] >= gap:
                kept.append((place, name))
        return kept

    def _round(self, places: np.ndarray) -> list[float]:
        low, high = float(places.min()), float(places.max())
        if self.kind == "log":
            decades = range(math.floor(low), math.floor(high + 1e-9) + 1)
            for digits in (
                (1,),
                (1, 3),
                (1, 2, 5),
            ):  # more of them where a few decades are few ticks
                found = [decade + math.log10(digit) for decade in decades for digit in digits]
                found = [x for x in found if low - 1e-9 <= x <= high + 1e-9]
                if len(found) > 2:
                    break
            return found
        return [float(x) for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high]

    def label(self, axis: Axis) -> None:
        """Puts the ticks on a figure's axis."""
        ticks = self.ticks()
        axis.set_ticks([x for x, _ in ticks], labels=[name for _, name in ticks])
        axis.set_minor_locator(NullLocator())


def scale_of(values: Iterable[Any]) -> Scale:
    """The scale that fits an axis's values."""
    levels = levels_of(values)
    return Scale(tuple(levels), _kind(levels))


def _kind(levels: Sequence[Any]) -> str:
    if not levels or not all(map(is_number, levels)):
        return "categorical"
    if levels[0] > 0:
        return "log" if levels[-1] / levels[0] >= DECADE else "linear"
    positive = [level for level in levels if level > 0]
    return "categorical" if positive and positive[-1] / positive[0] >= DECADE else "linear"


def level_name(level: Any, most: int = MAX_LETTERS) -> str:
    """A level in a figure: a short number, or the beginning of a long name."""
    if key_of(level) is None:
        return "not set"
    if is_number(level):
        return short_number(level) if abs(level) >= 10_000 else f"{float(f'{level:.4g}'):g}"
    name = legend_name(str(level)) or "(empty)"
    return name if len(name) <= most else f"{name[: most - 1]}…"
