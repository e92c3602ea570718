"""Curves of several runs in one plot, and the load of a run's experts, for the page of `moejax view`.

What is drawn and how it reads is the report's (`figures/run.py`); a curve's colour is its run's,
its dash or its dots tell the metrics of a plot apart. In the dark, the page inverts plots.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    ResetTool,
)
from bokeh.models.annotations import ColorBar, Span
from bokeh.plotting import figure
from jaxtyping import Int

from moejax.inspection.figures import run as figures
from moejax.inspection.figures.axes import AXES, place
from moejax.inspection.figures.colors import load_colors
from moejax.inspection.figures.run import Chart
from moejax.inspection.figures.style import DEAD, GREY, RATIO_TICKS
from moejax.inspection.viewer.run_folder import LiveRun

DASHES = ("solid", "dashed", "dotdash", "dotted")  # of a chart's metrics
WHITE = "#ffffff"


def charts_of(runs: Iterable[LiveRun]) -> tuple[Chart, ...]:
    """The charts to draw of some runs; entropies are compared with uniform routing where the runs agree on it."""
    widths = {run.num_experts for run in runs} - {0}
    routing = figures.routing_charts(max(widths, default=1))
    if len(widths) != 1:
        routing = tuple(dataclasses.replace(chart, reference=None) for chart in routing)
    return (*figures.LOSS_CHARTS, *routing, *figures.SPEED_CHARTS)


def columns(run: LiveRun, key: str, axis: str) -> dict[str, np.ndarray]:
    """One metric of one run, thinned to what can be told apart: columns `step`, `x` and `y`.

    Args:
      run: the run.
      key: the metric.
      axis: one of `AXES`.
    """
    steps, values = figures.downsample(*run.metrics.points(key))
    x = place(axis, steps, run.metrics.points, run.run.flops_per_token if run.run else None)
    return {"step": steps, "x": x, "y": values}


class CurvePlot:
    """One chart of several runs.

    Args:
      chart: what to draw.
      runs: by name, those to draw.
      axis: one of `AXES`.

    Attributes:
      plot: the figure; None if no run has a metric of the chart.
    """

    def __init__(self, chart: Chart, runs: Mapping[str, LiveRun], axis: str):
        self.chart = chart
        self._axis = axis
        keys = [(key, i) for i, (key, _) in enumerate(chart.keys)]
        self._drawn = [
            (name, run, key, i)
            for name, run in runs.items()
            for key, i in keys
            if key in run.metrics.series
        ]
        self._sources = {
            (name, key): ColumnDataSource(columns(run, key, axis))
            for name, run, key, _ in self._drawn
        }
        self.plot = self._new_plot() if self._drawn else None

    @property
    def caption(self) -> str:
        """How to tell the metrics of the chart apart; empty if there is one."""
        shown = {key: i for _, _, key, i in self._drawn}
        if len(self.chart.keys) == 1:
            return ""
        marks = [
            f"{'dots' if _is_points(key) else DASHES[i]}: {self.chart.keys[i][1]}"
            for key, i in shown.items()
        ]
        return f"{'; '.join(marks)}.".capitalize()

    def update(self, changed: Iterable[str]) -> None:
        """Draws again what some runs have logged since."""
        names = set(changed)
        for name, run, key, _ in self._drawn:
            if name in names:
                self._sources[name, key].data = columns(run, key, self._axis)

    def _new_plot(self) -> figure:
        plot = _figure(
            230, x_range=DataRange1d(range_padding=0.03), y_range=DataRange1d(**self._bounds())
        )
        plot.xaxis.axis_label, plot.yaxis.axis_label = AXES[self._axis], self.chart.ylabel
        plot.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")
        if max(_largest(source.data["y"]) for source in self._sources.values()) >= 10_000:
            plot.yaxis.formatter = NumeralTickFormatter(format="0.[00]a")
        lines = [self._draw(plot, *drawn) for drawn in self._drawn]
        if self.chart.reference is not None:
            plot.add_layout(
                Span(
                    location=self.chart.reference[0],
                    dimension="width",
                    line_color=GREY,
                    line_dash="2 2",
                )
            )
        tooltips = [("run", "$name"), ("step", "@step{0,0}"), (self.chart.ylabel, "@y{0.[0000]}")]
        plot.add_tools(HoverTool(renderers=lines, tooltips=tooltips))
        return plot

    def _draw(self, plot: figure, name: str, run: LiveRun, key: str, i: int) -> Any:
        source = self._sources[name, key]
        if _is_points(key):
            return plot.scatter(
                "x",
                "y",
                source=source,
                size=7,
                color=run.color,
                line_color=WHITE,
                line_width=0.7,
                name=run.name,
            )
        if len(source.data["x"]) == 1:  # a line through one point shows nothing
            return plot.scatter("x", "y", source=source, size=5, color=run.color, name=run.name)
        return plot.line(
            "x",
            "y",
            source=source,
            color=run.color,
            line_width=2,
            line_dash=DASHES[i],
            name=run.name,
        )

    def _bounds(self) -> dict[str, Any]:
        return {"start": 0} if self.chart.from_zero else {}


def constant(chart: Chart, runs: Mapping[str, LiveRun]) -> float | None:
    """The one value that the chart's metrics have had in all runs, twice or more in one of them; else None."""
    values = [run.metrics.points(key)[1] for run in runs.values() for key, _ in chart.keys]
    is_repeated = any(len(values_S) > 1 for values_S in values)
    return figures.only_value(values) if is_repeated else None


def signature(chart: Chart, runs: Mapping[str, LiveRun]) -> tuple[Any, ...]:
    """Changes when the chart needs other curves: a run has its first values of a metric, or its second ones."""
    lengths = [(name, key, len(run.metrics.series.get(key, ((), ()))[0])) for name, run in runs.items()
               for key, _ in chart.keys]  # fmt: skip
    return tuple((name, key, min(length, 2)) for name, key, length in lengths)


def load_plot(counts_NE: Int[np.ndarray, "N E"], layers: Sequence[int]) -> figure:
    """A heat map of load over uniform load: a layer a row, an expert a column, half and twice equally strong.

    Args:
      counts_NE: assignments to each expert of each MoE layer.
      layers: model layer of each row.
    """
    N, E = counts_NE.shape
    ratio_NE = figures.load_ratio(counts_NE)
    log_NE = np.log2(ratio_NE, out=np.full_like(ratio_NE, np.nan), where=ratio_NE > 0)
    plot = _figure(
        int(np.clip(110 + 24 * N, 170, 620)), x_range=(-0.5, E - 0.5), y_range=(N - 0.5, -0.5)
    )
    ticks = (-2, -1, 0, 1, 2)
    mapper = LinearColorMapper(palette=load_colors(figures.COLORS), low=-2, high=2, nan_color=DEAD)
    data = {"log": [log_NE.astype(np.float32)], "ratio": [ratio_NE.astype(np.float32)]}
    data |= {"layer": [np.repeat(np.array(layers, np.int32)[:, None], E, axis=1)]}
    place: dict[str, Any] = {"x": -0.5, "y": -0.5, "dw": E, "dh": N, "color_mapper": mapper}
    image = plot.image("log", source=ColumnDataSource(data), **place)
    plot.add_tools(
        HoverTool(
            renderers=[image],
            tooltips=[("layer", "@layer"), ("expert", "$x{0}"), ("load", "@ratio{0.00}")],
        )
    )
    plot.xaxis.axis_label, plot.yaxis.axis_label = "expert", "layer"
    plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    shown = np.unique(np.linspace(0, N - 1, min(N, 16)).round().astype(int)).tolist()
    plot.yaxis.ticker = FixedTicker(ticks=shown)
    plot.yaxis.major_label_overrides = {n: str(layers[n]) for n in shown}
    plot.grid.visible = False
    names = dict(RATIO_TICKS)
    bar = ColorBar(color_mapper=mapper, ticker=FixedTicker(ticks=list(ticks)), width=10, padding=4, bar_line_color=None,
                   major_label_overrides={tick: names[tick] for tick in ticks}, background_fill_color=None)  # fmt: skip
    plot.add_layout(bar, "right")
    return plot


def _figure(height: int, **ranges: Any) -> figure:
    """An empty plot as wide as its place; a finger moves the page, not the plot."""
    plot = figure(
        height=height, sizing_mode="stretch_width", tools=[BoxZoomTool(), ResetTool()], active_drag=None,
        toolbar_location="above", background_fill_color=WHITE, border_fill_color=WHITE, outline_line_color=None,
        **ranges,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.toolbar_inner = True
    plot.grid.grid_line_color = "#e5e7eb"
    plot.axis.axis_line_color = None  # so that a curve at 0 shows
    plot.axis.major_tick_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_color = plot.axis.major_label_text_color = "#374151"
    plot.xaxis.ticker, plot.yaxis.ticker = (
        BasicTicker(desired_num_ticks=5),
        BasicTicker(desired_num_ticks=5),
    )
    return plot


def _is_points(key: str) -> bool:
    return key.startswith("eval/")


def _largest(values: Any) -> float:
    return float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
