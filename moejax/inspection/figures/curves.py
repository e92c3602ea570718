"""Figures of curves over training steps, or over what these cost.

Titles are left to the page, where they can be read, searched and scaled.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.inspection.figures.axes import AXES
from moejax.inspection.figures.style import (
    GREY,
    LINES,
    ORANGE,
    STYLE,
    Drawing,
    label_steps,
    new_figure,
    short_number,
    tick_at,
)

MAX_POINTS = 600  # per curve: more cannot be distinguished
MARKERS: dict[str, Any] = {
    "color": ORANGE,
    "marker": "o",
    "ms": 4.5,
    "mec": "white",
    "mew": 0.7,
    "ls": "none",
    "zorder": 3,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
      label: for the legend, which a chart with a single curve does without.
      steps: x, in steps or in another of `axes.AXES`.
      values: y; NaN leaves a gap.
      points: draw markers above the lines instead of a line: few values, such as evaluations.
    """

    label: str
    steps: Int[np.ndarray, "S"] | Float[np.ndarray, "S"]
    values: Float[np.ndarray, "S"]
    points: bool = False


def draw_curves(
    curves: Sequence[Curve],
    ylabel: str,
    *,
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    axis: str = "steps",
) -> Drawing:
    """Draws curves over training steps, or over what these cost.

    Args:
      curves: at most four lines, and any points.
      ylabel: quantity and unit.
      reference: a level to compare with, and its name.
      from_zero: start the y axis at 0.
      axis: of `AXES`, what the curves' `steps` are.

    Returns:
      An SVG data URI.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.45)
        lines = iter(LINES)
        for curve in curves:
            if curve.points:
                axes.plot(curve.steps, curve.values, label=curve.label, **MARKERS)
            else:
                color, dash = next(lines)
                _draw_line(axes, curve, color, dash)
        if reference is not None:
            level, name = reference
            axes.axhline(level, color=GREY, lw=1, ls=(0, (2, 2)), label=name)
        if len(curves) > 1 or reference is not None:
            figure.legend(loc="outside upper left", ncols=3, borderaxespad=0.1, columnspacing=1.2)
        if from_zero:
            is_flat = not any(np.nan_to_num(curve.values).any() for curve in curves)
            axes.set_ylim(0, 1 if is_flat else None)
        _label_values(axes, curves)
        axes.set_ylabel(ylabel)
        label_steps(axes, AXES[axis])
        if axis == "steps" and all(curve.points for curve in curves):
            all_steps = np.concatenate([curve.steps for curve in curves])
            tick_at(axes, all_steps)
        return Drawing.from_figure(figure)


def _draw_line(axes: Axes, curve: Curve, color: str, dash: str) -> None:
    """Draws a line over the axis, so that a line at 0 shows."""
    num_finite = np.isfinite(curve.values).sum()
    is_alone = num_finite == 1  # a line through one point shows nothing
    steps, values = downsample(curve.steps, curve.values)
    axes.plot(
        steps,
        values,
        color=color,
        ls=dash,
        marker="o" if is_alone else None,
        label=curve.label,
        clip_on=False,
        zorder=2.6,
    )


def _label_values(axes: Axes, curves: Sequence[Curve]) -> None:
    """Labels counts with whole numbers, and large values in short."""
    values = np.concatenate([curve.values for curve in curves])
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    are_whole = np.array_equal(finite, finite.round())
    largest = np.abs(finite).max()
    if are_whole:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if largest >= 10_000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short_number(y)))


def only_value(values: Iterable[np.ndarray]) -> float | None:
    """Returns the value that all curves have throughout; None if they have several, or none.

    A sentence says it better than a chart.

    Args:
      values: of each curve; what is not finite says nothing.
    """
    found: set[float] = set()
    for values_S in values:
        is_finite_S = np.isfinite(values_S)
        found.update(values_S[is_finite_S].tolist())
    return found.pop() if len(found) == 1 else None


def downsample(
    x: Int[np.ndarray, "S"] | Float[np.ndarray, "S"],
    values: Float[np.ndarray, "S"],
    points: int = MAX_POINTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the ends, and the extremes of each stretch, so that a spike is still seen.

    Args:
      x: increasing.
      values: y; NaN where there is none.
      points: how many to keep at most.

    Returns:
      Some of the points, in order.
    """
    num_points = len(x)
    if num_points <= points:
        return x, values
    is_nan = np.isnan(values)
    low = np.where(is_nan, math.inf, values)
    high = np.where(is_nan, -math.inf, values)
    kept = [0, num_points - 1]
    num_stretches = points // 2 - 1
    for stretch in np.array_split(np.arange(num_points), num_stretches):
        lowest = np.argmin(low[stretch])
        highest = np.argmax(high[stretch])
        kept += [stretch[lowest], stretch[highest]]
    kept_S = np.unique(kept)
    return x[kept_S], values[kept_S]
