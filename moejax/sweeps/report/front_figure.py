"""The figure of what two metrics of settings trade, with the front that no other setting beats."""

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from moejax.inspection.figures.style import GREY, ORANGE, STYLE, Drawing, new_figure


@dataclasses.dataclass(frozen=True)
class Front:
    """Settings by two metrics, both of which are to be low.

    Attributes:
      x: of each setting, finite.
      y: of each setting, finite.
      errors: standard errors of `y`, drawn as bars; NaN where there is none.
      is_front: no other setting is as low in both and lower in one.
      numbers: of the settings; those of the front are written next to it.
    """

    x: Float[np.ndarray, "S"]
    y: Float[np.ndarray, "S"]
    errors: Float[np.ndarray, "S"]
    is_front: Bool[np.ndarray, "S"]
    numbers: Sequence[int]


def draw_front(front: Front, *, xlabel: str, ylabel: str) -> Drawing:
    """Draws what two metrics trade.

    Args:
      front: the settings.
      xlabel: quantity and unit.
      ylabel: quantity and unit.
    """
    x = front.x
    y = front.y
    is_other = ~front.is_front
    order = _along_front(front)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.7)
        axes.errorbar(
            x,
            y,
            yerr=front.errors,
            ls="none",
            color=GREY,
            elinewidth=0.8,
            alpha=0.6,
            zorder=1.5,
        )
        axes.plot(x[is_other], y[is_other], "o", color=GREY, ms=4, alpha=0.6, label="others")
        axes.step(x[order], y[order], "-", where="post", color=ORANGE, lw=1, zorder=2.5)
        axes.plot(
            x[order],
            y[order],
            "D",
            color=ORANGE,
            ms=6,
            mec="white",
            mew=0.7,
            zorder=3,
            label="on the front",
        )
        _number_settings(axes, front, order)
        figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.1)
        axes.margins(0.09)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return Drawing.from_figure(figure)


def _along_front(front: Front) -> np.ndarray:
    """Returns the indices of the settings on the front, in the order of `x`."""
    of_front = np.flatnonzero(front.is_front)
    x_of_front = front.x[of_front]
    return of_front[np.argsort(x_of_front, kind="stable")]


def _number_settings(axes: Axes, front: Front, order: np.ndarray) -> None:
    """Writes the numbers of settings on the front, without those too close to the one before."""
    width = np.ptp(front.x) or 1
    height = np.ptp(front.y) or 1
    last: tuple[float, float] | None = None
    for i in order:
        x = front.x[i]
        y = front.y[i]
        here = (float(x / width), float(y / height))
        if last is not None and _are_close(last, here):
            continue
        axes.annotate(
            str(front.numbers[i]),
            (x, y),
            xytext=(5, 4),
            textcoords="offset points",
            zorder=4,
        )
        last = here


def _are_close(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Returns whether numbers at two places, in parts of the figure, would touch."""
    x, y = one
    other_x, other_y = other
    # A number is wider than it is high.
    across = abs(other_x - x) * 3
    along = abs(other_y - y) * 2
    return max(across, along) <= 0.2
