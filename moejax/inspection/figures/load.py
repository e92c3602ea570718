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
    DEAD,
    GREY,
    ORANGE,
    STYLE,
    Drawing,
    heat_colors,
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
    is_positive_CE = ratio_CE > 0
    log_CE = np.full_like(ratio_CE, np.nan)
    np.log2(ratio_CE, out=log_CE, where=is_positive_CE)
    height = np.clip(1.45 + 0.055 * num_experts, 2.0, 4.6)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(float(height))
        colors = heat_colors("RdBu_r", bad=DEAD)
        mesh = heat_map(axes, log_CE.T, edges, cmap=colors, norm=Normalize(-2, 2))
        axes.set_ylabel("expert")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_steps(axes)
        ratio_bar(figure, axes, mesh, "load / uniform load")
        return Drawing.from_figure(figure)


def max_columns(num_experts: int) -> int:
    """Returns how many columns a heat map of that many experts has at most."""
    most_by_cells = max(1, MAX_CELLS // num_experts)
    return min(MAX_COLUMNS, most_by_cells)


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
    is_dead_E = ratio_E == 0
    dead_e = experts_E[is_dead_E]
    zeros_e = np.zeros(len(dead_e))
    top = max(1.5, 1.08 * ratio_E.max())
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1.9)
        heights, edges = _bars_and_gaps(ratio_E)
        axes.stairs(heights, edges, fill=True, color=BLUE)
        axes.axhline(1, color=GREY, lw=1, ls=(0, (2, 2)))
        axes.plot(dead_e, zeros_e, "x", **CROSSES)
        axes.set_xlim(-0.7, num_experts - 0.3)
        axes.set_ylim(0, top)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("expert")
        axes.set_ylabel("load / uniform load")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return Drawing.from_figure(figure)


def _bars_and_gaps(ratio_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns heights and edges of one path, however many experts: bars, and gaps of height 0."""
    expert_E = np.arange(len(ratio_E))
    edges_E2 = expert_E[:, None] + [-0.4, 0.4]
    gaps_E = np.zeros_like(ratio_E)
    heights_E2 = np.stack([ratio_E, gaps_E], axis=1)
    heights = heights_E2.ravel()
    return heights[:-1], edges_E2.ravel()


def load_ratio(counts_SE: Int[np.ndarray, "S E"]) -> Float[np.ndarray, "S E"]:
    """Returns each expert's load over the uniform load.

    1 for all is perfect balance, and E is the maximum. A row without any assignment has the ratio 0
    everywhere.
    """
    num_experts = counts_SE.shape[1]
    total_S1 = counts_SE.sum(axis=1, keepdims=True)
    safe_total_S1 = np.maximum(total_S1, 1)
    return counts_SE * num_experts / safe_total_S1
