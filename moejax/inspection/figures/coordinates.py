"""The figure of a coordinate check: sizes of activations and updates along each axis."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from moejax.inspection.coordinates.check import Line
from moejax.inspection.coordinates.measure import PLACES
from moejax.inspection.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    Drawing,
    log_axis,
)

COLORS = dict(zip(PLACES, (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", GREY), strict=True))
MARKERS = dict(zip(PLACES, "osD^vP", strict=True))
AXES = {"width": "width", "experts": "experts", "top_k": "experts per token"}
WHAT = {
    "activation": "size before the first step",
    "update": "change by the steps",
}


def draw_coordinates(lines: Sequence[Line]) -> Drawing:
    """Draws a row of charts for activations and one for updates, a column for each axis.

    Lines that are not flat are dashed.
    """
    axes_names = list(dict.fromkeys(line.axis for line in lines))
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
        figure = Figure(
            figsize=(2.9 * len(axes_names) + 1.3, 5.0), dpi=144, facecolor="none", layout=layout
        )
        charts = figure.subplots(len(WHAT), len(axes_names), squeeze=False, sharey="row")
        for line in lines:
            row = list(WHAT).index(line.what)
            chart = charts[row][axes_names.index(line.axis)]
            chart.plot(
                line.sizes,
                line.values,
                MARKERS[line.place] + ("-" if line.is_flat else "--"),
                color=COLORS[line.place],
                ms=4,
                label=line.place.replace("_", " "),
            )
            log_axis(chart.xaxis, line.sizes)
        for column, name in enumerate(axes_names):
            charts[-1][column].set_xlabel(AXES[name])
        for row, words in enumerate(WHAT.values()):
            log_axis(charts[row][0].yaxis)
            charts[row][0].set_ylabel(words)
        by_label: dict[str, Any] = {}
        for chart in charts.flat:
            handles, labels = chart.get_legend_handles_labels()
            by_label |= dict(zip(labels, handles, strict=True))
        figure.legend(
            [*by_label.values()],
            [*by_label],
            loc="outside upper left",
            ncols=len(PLACES),
            fontsize=8,
        )
        return Drawing.from_figure(figure)
