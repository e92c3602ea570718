"""Figures of the load of one layer's experts: over time, and at the end.

Loads are in ColorBrewer's red-blue, which colour-blind readers can distinguish.
"""

from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from moejax.inspection.figures.columns import sum_columns
from moejax.inspection.figures.style import (
    BLUE,
    COLORS,
    DEAD,
    GREY,
    ORANGE,
    STYLE,
    Drawing,
    heat_map,
    label_steps,
    new_figure,
    ratio_bar,
)

CROSSES: dict[str, Any] = {"color": ORANGE, "ms": 6, "mew": 1.8, "clip_on": False, "zorder": 3}
MAX_COLUMNS = 200  # of a heat map,
MAX_CELLS = 8_000  # and of its columns times experts: noise does not compress


def draw_load_over_time(steps: Int[np.ndarray, "S"], counts_SE: Int[np.ndarray, "S E"]) -> Drawing:
    """Draws one layer's load over time as a heat map: an expert a row, its load as colour.

    Args:
      steps: end of each logging interval; at least one.
      counts_SE: assignments to each expert in each interval; long histories are summed over
        neighbouring intervals.

    Returns:
      An SVG data URI. White is a uniform load; the scale is logarithmic, so half and twice are
      equally strong; black is an expert that got nothing.
    """
    num_experts = counts_SE.shape[1]
    num_columns = max_columns(num_experts)
    edges, counts_CE = sum_columns(steps, counts_SE, num_columns)
    ratio_CE = load_ratio(counts_CE)
    log_CE = np.full_like(ratio_CE, np.nan)
    np.log2(ratio_CE, out=log_CE, where=ratio_CE > 0)
    with matplotlib.rc_context(STYLE):
        height = float(np.clip(1.45 + 0.055 * num_experts, 2.0, 4.6))
        figure, axes = new_figure(height)
        colors = matplotlib.colormaps["RdBu_r"].resampled(COLORS).with_extremes(bad=DEAD)
        mesh = heat_map(axes, log_CE.T, edges, cmap=colors, norm=Normalize(-2, 2))
        axes.set_ylabel("expert")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_steps(axes)
        ratio_bar(figure, axes, mesh, "load / uniform load")
        return Drawing.from_figure(figure)


def max_columns(num_experts: int) -> int:
    """Returns how many columns a heat map of that many experts has at most."""
    return min(MAX_COLUMNS, max(1, MAX_CELLS // num_experts))


def draw_final_load(counts_E: Int[np.ndarray, "E"]) -> Drawing:
    """Draws one layer's load as bars, over the uniform load; a cross marks an unused expert.

    Args:
      counts_E: assignments to each expert over the last part of the run.

    Returns:
      An SVG data URI.
    """
    (ratio_E,) = load_ratio(counts_E[None])
    num_experts = len(ratio_E)
    experts_E = np.arange(num_experts)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1.9)
        # One path, however many experts: bars, and between them gaps of height 0.
        edges = (experts_E[:, None] + [-0.4, 0.4]).ravel()
        heights = np.stack([ratio_E, np.zeros_like(ratio_E)], axis=1).ravel()
        axes.stairs(heights[:-1], edges, fill=True, color=BLUE)
        axes.axhline(1, color=GREY, lw=1, ls=(0, (2, 2)))
        dead = experts_E[ratio_E == 0]
        axes.plot(dead, np.zeros(len(dead)), "x", **CROSSES)
        axes.set_xlim(-0.7, num_experts - 0.3)
        axes.set_ylim(0, max(1.5, 1.08 * ratio_E.max()))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("expert")
        axes.set_ylabel("load / uniform load")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return Drawing.from_figure(figure)


def load_ratio(counts_SE: Int[np.ndarray, "S E"]) -> Float[np.ndarray, "S E"]:
    """Returns each expert's load over the uniform load.

    1 for all is perfect balance, and E is the maximum. A row without any assignment has the ratio 0
    everywhere.
    """
    num_experts = counts_SE.shape[1]
    total_S1 = np.maximum(counts_SE.sum(axis=1, keepdims=True), 1)
    return counts_SE * num_experts / total_S1
