"""Figures of several runs: one metric of all against steps or what they cost, and how evenly experts are loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.ticker import PercentFormatter

from moejax.inspection.figures.axes import AXES, place
from moejax.inspection.figures.run import downsample, load_ratio
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

COLORS = (
    BLUE,
    ORANGE,
    GREEN,
    PURPLE,
    "#E69F00",
    "#56B4E9",
    "#8c6d1f",
    "#111111",
)  # Okabe and Ito; yellow is darkened
DASHES = ("-", "--")
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
    """A look for each of at most `MAX_RUNS` runs, no two the same."""
    found = {}
    for i, label in enumerate(labels):
        turn = i // len(COLORS)
        found[label] = LineStyle(COLORS[i % len(COLORS)], DASHES[turn], CSS[turn])
    return found


def series_against(
    run: Run, key: str, against: str
) -> tuple[Float[np.ndarray, "S"], Float[np.ndarray, "S"]]:
    """A metric of a run against steps, tokens, arithmetic or time; see `axes.place`.

    Args:
      run: an open run.
      key: metric name.
      against: of `AXES`.

    Returns:
      x and y; empty where the run has no such metric, or does not tell where it was.
    """
    steps, values = run.series(key)
    x = place(against, steps, run.series, run.flops_per_token)
    if not np.isfinite(x).any():
        return np.zeros(0), np.zeros(0)
    return x, values


def draw_runs(
    runs: Mapping[str, Run], key: str, ylabel: str, *, against: str = "steps", from_zero: bool = False,
    legend: bool = True,
) -> Drawing | None:  # fmt: skip
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
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.55 + (0.17 * len(runs) if legend else 0))
        for label, look in line_styles(list(runs)).items():
            x, values = curves[label]
            if not x.size:
                continue
            x, values = downsample(x, values, points=MAX_POINTS)
            marker = "o" if key.startswith("eval/") or np.isfinite(values).sum() == 1 else None
            axes.plot(
                x, values, color=look.color, ls=look.dash, marker=marker, ms=3.5, mec="white", mew=0.5,
                label=legend_name(label), zorder=2.6, clip_on=False,
            )  # fmt: skip
        label_steps(axes, AXES[against])
        if against == "steps" and key.startswith("eval/"):
            tick_at(axes, np.concatenate([x for x, _ in curves.values()]))
        axes.set_ylabel(ylabel)
        if from_zero:
            axes.set_ylim(bottom=0)
        if legend:
            figure.legend(loc="outside upper left", ncols=1, borderaxespad=0.1)
        return Drawing.from_figure(figure)


def draw_sorted_load(counts: Mapping[str, Int[np.ndarray, "E"]], *, legend: bool = True) -> Drawing:
    """Draws the load of one layer's experts in several runs, over the uniform load, the busiest expert first.

    Experts of different runs have nothing in common but their rank; the x axis is the share of
    experts, so that runs with different numbers of them compare. A steep curve is an uneven load.

    Args:
      counts: assignments to each expert by run, all runs of the comparison: the order gives the
        looks; an empty array draws no line.
      legend: name the runs.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.3 + (0.17 * len(counts) if legend else 0))
        for label, look in line_styles(list(counts)).items():
            if counts[label].size:
                ratio_E = np.sort(load_ratio(counts[label][None])[0])[::-1]
                style: dict[str, Any] = {
                    "color": look.color,
                    "ls": look.dash,
                    "lw": 1.5,
                    "label": legend_name(label),
                }
                if len(ratio_E) <= MAX_STEPS:
                    axes.stairs(
                        ratio_E, np.linspace(0, 1, len(ratio_E) + 1), baseline=None, **style
                    )
                else:
                    axes.plot(
                        *downsample(
                            (np.arange(len(ratio_E)) + 0.5) / len(ratio_E), ratio_E, MAX_POINTS
                        ),
                        **style,
                    )
        axes.axhline(1, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("experts, the busiest first")
        axes.set_ylabel("load / uniform load")
        if legend:
            figure.legend(loc="outside upper left", ncols=1, borderaxespad=0.1)
        return Drawing.from_figure(figure)
