"""Figures of a ladder: losses over compute with their laws, and losses over the size of models."""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from moejax.inspection.figures.style import GREY, STYLE, Drawing, log_axis, new_figure
from moejax.sweeps.ladder.report import FittedLaw, Prediction
from moejax.sweeps.ladder.results import Measurements
from moejax.sweeps.matching import short
from moejax.sweeps.report.figures import COLORS, DASHES, MARKERS

MAX_ARMS = len(COLORS)
"""Drawn in one figure."""


def draw_laws(
    measured: Measurements,
    laws: Mapping[str, FittedLaw],
    predictions: Mapping[str, Prediction],
) -> Drawing:
    """Draws the mean losses of arms over compute, and their laws up to the projection.

    Runs of single seeds are small points. A cross is the top rung as the rungs below predict it.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2)
        for number, arm in enumerate(measured.arms[:MAX_ARMS]):
            color = COLORS[number]
            _draw_runs(axes, measured, arm, color)
            budgets, losses = measured.curve(arm)
            axes.plot(budgets, losses, MARKERS[number], color=color, ms=5, label=arm, zorder=3)
            if arm in laws:
                spread = np.geomspace(measured.budgets[0], 4 * measured.budgets[-1], 60)
                law = laws[arm].law
                predicted = [law.loss(float(budget)) for budget in spread]
                axes.plot(spread, predicted, DASHES[number], color=color, lw=1)
            if arm in predictions:
                found = predictions[arm]
                axes.plot([found.budget], [found.predicted], "x", color=color, ms=8, mew=1.3)
        log_axis(axes.xaxis, measured.budgets)
        log_axis(axes.yaxis)
        axes.set_xlabel("FLOPs of training")
        axes.set_ylabel("validation loss (nats per token)")
        _legend(axes)
        return Drawing.from_figure(figure)


def _draw_runs(axes: Axes, measured: Measurements, arm: str, color: str) -> None:
    for rung, budget in enumerate(measured.budgets):
        values = measured.loss[arm][rung]
        known = values[np.isfinite(values)]
        axes.plot([budget] * known.size, known, ".", color=color, ms=3, alpha=0.5)


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper right", fontsize=8, handlelength=1.2)


def draw_sizes(measured: Measurements) -> Drawing:
    """Draws, for each rung, the losses of arms over their active parameters.

    Where arms differ in size alone, each line is a scan at equal compute, and its lowest point is
    the best size for the budget.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.0)
        for rung, budget in enumerate(measured.budgets[:MAX_ARMS]):
            points = []
            for arm in measured.arms:
                _, losses = measured.curve(arm, [rung])
                if losses:
                    points.append((measured.params_active[arm][rung], losses[0]))
            if points:
                sizes, losses = zip(*sorted(points), strict=True)
                style = MARKERS[rung] + DASHES[rung]
                axes.plot(sizes, losses, style, color=COLORS[rung], ms=4, label=short(budget))
        log_axis(axes.xaxis)
        axes.set_xlabel("active parameters")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend(title="FLOPs", fontsize=8, title_fontsize=8)
        axes.grid(color=GREY, alpha=0.2)
        return Drawing.from_figure(figure)
