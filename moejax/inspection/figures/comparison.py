"""Figures of several runs: one metric against steps or what they cost, and the load of experts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from moejax.inspection.figures.axes import AXES, place
from moejax.inspection.figures.curves import downsample
from moejax.inspection.figures.load import load_ratio
from moejax.inspection.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    Drawing,
    label_steps,
    legend_name,
    new_figure,
    tick_at,
)
from moejax.inspection.runs.run import Run

# Okabe and Ito (2008), with a darker yellow.
COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#8c6d1f", "#111111")
DASHES = ("-", "--")
MARKERS: dict[str, Any] = {
    "ms": 3.5,
    "mec": "white",
    "mew": 0.5,
    "zorder": 2.6,
    "clip_on": False,
}
MAX_POINTS = 160  # of a curve
MAX_STEPS = 64  # experts drawn as steps; more are a curve
CSS = ("solid", "dashed")
MAX_RUNS = len(COLORS) * len(DASHES)


@dataclasses.dataclass(frozen=True)
class LineStyle:
    """How a run is drawn in every figure.

    Attributes:
      color: of its lines.
      dash: matplotlib's name.
      css: the same in a page.
    """

    color: str
    dash: str
    css: str


def line_styles(labels: Sequence[str]) -> dict[str, LineStyle]:
    """Returns a style for each of at most `MAX_RUNS` runs, no two the same."""
    found = {}
    for i, label in enumerate(labels):
        turn, index = divmod(i, len(COLORS))
        found[label] = LineStyle(
            color=COLORS[index],
            dash=DASHES[turn],
            css=CSS[turn],
        )
    return found


def series_against(
    run: Run,
    key: str,
    against: str,
) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """Returns a metric of a run against steps, tokens, arithmetic or time; see `axes.place`.

    Args:
      run: an open run.
      key: metric name.
      against: of `AXES`.

    Returns:
      x and y; empty where the run has no such metric, or did not log where it was.
    """
    steps, values = run.series(key)
    x = place(against, steps, run.series, run.flops_per_token)
    is_known = np.isfinite(x)
    if not is_known.any():
        return np.zeros(0), np.zeros(0)
    return x, values


def draw_runs(
    runs: Mapping[str, Run],
    key: str,
    ylabel: str,
    *,
    against: str = "steps",
    from_zero: bool = False,
    legend: bool = True,
) -> Drawing | None:
    """Draws one metric of several runs, such as `eval/loss` of dense and MoE models.

    Args:
      runs: by label, at most `MAX_RUNS`.
      key: metric name; evaluations have markers.
      ylabel: quantity and unit.
      against: of `AXES`: "steps", "tokens", "compute" (FLOPs of training) or "time".
      from_zero: start the y axis at 0.
      legend: name the runs; a page that names them once does without.

    Returns:
      None if no run has the metric.
    """
    curves = {label: series_against(run, key, against) for label, run in runs.items()}
    if not any(np.isfinite(values).any() for _, values in curves.values()):
        return None
    is_measured = key.startswith("eval/")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.55 + _legend_height(len(runs), legend))
        for label, style in line_styles(list(runs)).items():
            x, values = curves[label]
            if x.size:
                _draw_curve(axes, x, values, _line_options(style, label), is_measured)
        label_steps(axes, AXES[against])
        if against == "steps" and is_measured:
            tick_at(axes, np.concatenate([x for x, _ in curves.values()]))
        axes.set_ylabel(ylabel)
        if from_zero:
            axes.set_ylim(bottom=0)
        if legend:
            figure.legend(loc="outside upper left", ncols=1, borderaxespad=0.1)
        return Drawing.from_figure(figure)


def _draw_curve(
    axes: Axes,
    x: np.ndarray,
    values: np.ndarray,
    options: dict[str, Any],
    is_measured: bool,
) -> None:
    """Draws a metric of one run, with markers where it was measured or is one point."""
    x, values = downsample(x, values, points=MAX_POINTS)
    num_finite = np.isfinite(values).sum()
    has_markers = is_measured or num_finite == 1
    marker = "o" if has_markers else None
    axes.plot(x, values, marker=marker, **MARKERS, **options)


def _legend_height(num_runs: int, has_legend: bool) -> float:
    """Returns the inches of a legend with a line for each run."""
    return 0.17 * num_runs if has_legend else 0


def _line_options(style: LineStyle, label: str) -> dict[str, Any]:
    """Returns matplotlib's options of a run's line."""
    return {
        "color": style.color,
        "ls": style.dash,
        "label": legend_name(label),
    }


def draw_sorted_load(
    counts: Mapping[str, Int[np.ndarray, "E"]],
    *,
    legend: bool = True,
) -> Drawing:
    """Draws the load of one layer's experts in several runs, the busiest expert first.

    Loads are over the uniform load. Experts of different runs have nothing in common but their
    rank; the x axis is the share of experts, so that runs with different numbers of them compare. A
    steep curve is an uneven load.

    Args:
      counts: assignments to each expert by run, all runs of the comparison: the order gives the
        styles; an empty array draws no line.
      legend: name the runs.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.3 + _legend_height(len(counts), legend))
        for label, style in line_styles(list(counts)).items():
            if counts[label].size:
                _draw_load(axes, counts[label], _line_options(style, label))
        axes.axhline(1, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("experts, the busiest first")
        axes.set_ylabel("load / uniform load")
        if legend:
            figure.legend(loc="outside upper left", ncols=1, borderaxespad=0.1)
        return Drawing.from_figure(figure)


def _draw_load(axes: Axes, counts_E: Int[np.ndarray, "E"], options: dict[str, Any]) -> None:
    """Draws the loads of a run as steps, or of many experts as a curve."""
    (ratio_E,) = load_ratio(counts_E[None])
    rising_E = np.sort(ratio_E)
    falling_E = rising_E[::-1]
    num_experts = len(falling_E)
    if num_experts <= MAX_STEPS:
        edges = np.linspace(0, 1, num_experts + 1)
        axes.stairs(falling_E, edges, baseline=None, lw=1.5, **options)
        return
    place_E = np.arange(num_experts)
    middle_E = (place_E + 0.5) / num_experts
    x, values = downsample(middle_E, falling_E, MAX_POINTS)
    axes.plot(x, values, lw=1.5, **options)
