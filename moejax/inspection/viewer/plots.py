"""Plots of the page of `moejax view`: curves of several runs, and the load of a run's experts.

What is drawn and how to read it are the report's (`figures/run.py`). A curve has the colour of its
run; dashes or dots tell the metrics of a plot apart. In dark mode, the page inverts plots.
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
LABEL_COLOR = "#374151"
MAX_LAYER_TICKS = 16
SHORT_NUMBER = "0.[00]a"  # of ticks: 12k in place of 12,000
MIN_SHORTENED = 10_000  # the least of the largest values of a plot whose ticks are shortened


def charts_of(runs: Iterable[LiveRun]) -> tuple[Chart, ...]:
    """Returns the charts to draw of some runs.

    Entropies are compared with uniform routing where the runs agree on it.
    """
    widths = {run.num_experts for run in runs}
    widths.discard(0)  # dense runs
    width = max(widths, default=1)
    routing = figures.routing_charts(width)
    if len(widths) != 1:
        routing = _without_references(routing)
    return (*figures.LOSS_CHARTS, *routing, *figures.SPEED_CHARTS)


def _without_references(charts: Iterable[Chart]) -> tuple[Chart, ...]:
    return tuple(dataclasses.replace(chart, reference=None) for chart in charts)


def columns(run: LiveRun, key: str, axis: str) -> dict[str, np.ndarray]:
    """Returns one metric of one run: columns `step`, `x` and `y`, of points that can be told apart.

    Args:
      run: the run.
      key: the metric.
      axis: one of `AXES`.
    """
    series = run.metrics.points
    all_steps, all_values = series(key)
    steps, values = figures.downsample(all_steps, all_values)
    record = run.run
    flops_per_token = record.flops_per_token if record else None
    x = place(axis, steps, series, flops_per_token)
    return {
        "step": steps,
        "x": x,
        "y": values,
    }


@dataclasses.dataclass(frozen=True)
class RunCurve:
    """A metric of one run in a plot.

    Attributes:
      name: of the run, as the plot was given it.
      run: the run.
      key: the metric.
      place: of the metric in its chart.
      source: the points.
    """

    name: str
    run: LiveRun
    key: str
    place: int
    source: ColumnDataSource


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
        self._curves: list[RunCurve] = []
        for name, run in runs.items():
            self._curves += self._curves_of(name, run)
        self.plot = self._new_plot() if self._curves else None

    def _curves_of(self, name: str, run: LiveRun) -> list[RunCurve]:
        """Returns a curve for each metric of the chart that the run has logged."""
        found = []
        for i, (key, _) in enumerate(self.chart.keys):
            if key in run.metrics.series:
                points = columns(run, key, self._axis)
                source = ColumnDataSource(points)
                found.append(RunCurve(name, run, key, i, source))
        return found

    @property
    def caption(self) -> str:
        """How to tell the metrics of the chart apart; empty if there is one."""
        keys = self.chart.keys
        if len(keys) == 1:
            return ""
        places = {curve.key: curve.place for curve in self._curves}
        marks = []
        for i in places.values():
            key, label = keys[i]
            mark = "dots" if _is_points(key) else DASHES[i]
            marks.append(f"{mark}: {label}")
        listed = "; ".join(marks)
        return f"{listed}.".capitalize()

    def update(self, changed: Iterable[str]) -> None:
        """Draws again what some runs have logged since."""
        names = set(changed)
        for curve in self._curves:
            if curve.name in names:
                curve.source.data = columns(curve.run, curve.key, self._axis)

    def _new_plot(self) -> figure:
        chart = self.chart
        bounds: dict[str, Any] = {"start": 0} if chart.from_zero else {}
        plot = _figure(230, x_range=DataRange1d(range_padding=0.03), y_range=DataRange1d(**bounds))
        plot.xaxis.axis_label = AXES[self._axis]
        plot.yaxis.axis_label = chart.ylabel
        plot.xaxis.formatter = NumeralTickFormatter(format=SHORT_NUMBER)
        largest = max(_largest(curve.source.data["y"]) for curve in self._curves)
        if largest >= MIN_SHORTENED:
            plot.yaxis.formatter = NumeralTickFormatter(format=SHORT_NUMBER)
        lines = [_draw(plot, curve) for curve in self._curves]
        if chart.reference is not None:
            level, _ = chart.reference
            plot.add_layout(_level_line(level))
        tooltips = [
            ("run", "$name"),
            ("step", "@step{0,0}"),
            (chart.ylabel, "@y{0.[0000]}"),
        ]
        plot.add_tools(HoverTool(renderers=lines, tooltips=tooltips))
        return plot


def _level_line(level: float) -> Span:
    """Returns the dotted line of a chart's reference."""
    return Span(location=level, dimension="width", line_color=GREY, line_dash="2 2")


def _draw(plot: figure, curve: RunCurve) -> Any:
    style: dict[str, Any] = {
        "source": curve.source,
        "color": curve.run.color,
        "name": curve.run.name,
    }
    if _is_points(curve.key):
        return plot.scatter("x", "y", size=7, line_color=WHITE, line_width=0.7, **style)
    if len(curve.source.data["x"]) == 1:  # a line through one point shows nothing
        return plot.scatter("x", "y", size=5, **style)
    return plot.line("x", "y", line_width=2, line_dash=DASHES[curve.place], **style)


def constant(chart: Chart, runs: Mapping[str, LiveRun]) -> float | None:
    """Returns the one value that the chart's metrics have had in all runs.

    None if there are several, or if no run has had it twice.
    """
    found = []
    for run in runs.values():
        for key, _ in chart.keys:
            _, values_S = run.metrics.points(key)
            found.append(values_S)
    is_repeated = any(len(values_S) > 1 for values_S in found)
    return figures.only_value(found) if is_repeated else None


def signature(chart: Chart, runs: Mapping[str, LiveRun]) -> tuple[Any, ...]:
    """Returns what changes when the chart needs other curves.

    That is when a run has its first values of a metric, or its second ones.
    """
    found = []
    for name, run in runs.items():
        for key, _ in chart.keys:
            steps, _ = run.metrics.series.get(key, ((), ()))
            num_values = min(len(steps), 2)
            found.append((name, key, num_values))
    return tuple(found)


def load_plot(counts_NE: Int[np.ndarray, "N E"], layers: Sequence[int]) -> figure:
    """Returns a heat map of load over uniform load: a layer a row, an expert a column.

    Half and twice the uniform load have equally strong colours.

    Args:
      counts_NE: assignments to each expert of each MoE layer.
      layers: model layer of each row.
    """
    N, E = counts_NE.shape
    height = int(np.clip(110 + 24 * N, 170, 620))
    colors = load_colors(figures.COLORS)
    mapper = LinearColorMapper(palette=colors, low=-2, high=2, nan_color=DEAD)
    # Cells are centred on their indices; the first layer is at the top.
    plot = _figure(height, x_range=(-0.5, E - 0.5), y_range=(N - 0.5, -0.5))
    place: dict[str, Any] = {
        "x": -0.5,
        "y": -0.5,
        "dw": E,
        "dh": N,
        "color_mapper": mapper,
    }
    source = _load_source(counts_NE, layers)
    image = plot.image("log", source=source, **place)
    tooltips = [("layer", "@layer"), ("expert", "$x{0}"), ("load", "@ratio{0.00}")]
    plot.add_tools(HoverTool(renderers=[image], tooltips=tooltips))
    plot.grid.visible = False
    plot.xaxis.axis_label = "expert"
    plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    _label_layers(plot, layers)
    plot.add_layout(_color_bar(mapper), "right")
    return plot


def _label_layers(plot: figure, layers: Sequence[int]) -> None:
    """Labels the rows of a heat map with their model layers."""
    axis = plot.yaxis
    shown = _ticks_of_layers(len(layers))
    axis.axis_label = "layer"
    axis.ticker = FixedTicker(ticks=shown)
    axis.major_label_overrides = {n: str(layers[n]) for n in shown}


def _load_source(counts_NE: np.ndarray, layers: Sequence[int]) -> ColumnDataSource:
    """Returns an image of the load, with the values that a pointer shows of a cell.

    Colours go by the logarithm; an expert without a token has none.
    """
    ratio_NE = figures.load_ratio(counts_NE)
    nan_NE = np.full_like(ratio_NE, np.nan)
    log_NE = np.log2(ratio_NE, out=nan_NE, where=ratio_NE > 0)
    layers_N = np.array(layers, np.int32)
    layer_NE = np.repeat(layers_N[:, None], counts_NE.shape[1], axis=1)
    data = {
        "log": [log_NE.astype(np.float32)],
        "ratio": [ratio_NE.astype(np.float32)],
        "layer": [layer_NE],
    }
    return ColumnDataSource(data)


def _ticks_of_layers(num_layers: int) -> list[int]:
    """Returns the rows that are labelled, evenly spaced."""
    num_ticks = min(num_layers, MAX_LAYER_TICKS)
    rows = np.linspace(0, num_layers - 1, num_ticks)
    rounded = rows.round().astype(int)
    return np.unique(rounded).tolist()


def _color_bar(mapper: LinearColorMapper) -> ColorBar:
    names = dict(RATIO_TICKS)
    ticks = [-2, -1, 0, 1, 2]  # powers of 2
    return ColorBar(
        color_mapper=mapper,
        ticker=FixedTicker(ticks=ticks),
        major_label_overrides={tick: names[tick] for tick in ticks},
        width=10,
        padding=4,
        bar_line_color=None,
        background_fill_color=None,
    )


def _figure(height: int, **ranges: Any) -> figure:
    """Returns an empty plot as wide as its place; a finger moves the page, not the plot."""
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools=[BoxZoomTool(), ResetTool()],
        active_drag=None,
        toolbar_location="above",
        background_fill_color=WHITE,
        border_fill_color=WHITE,
        outline_line_color=None,
        **ranges,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.toolbar_inner = True
    plot.grid.grid_line_color = "#e5e7eb"
    plot.axis.axis_line_color = None  # so that a curve at 0 shows
    plot.axis.major_tick_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.axis_label_text_color = LABEL_COLOR
    plot.axis.major_label_text_color = LABEL_COLOR
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=5)
    plot.yaxis.ticker = BasicTicker(desired_num_ticks=5)
    return plot


def _is_points(key: str) -> bool:
    return key.startswith("eval/")


def _largest(values: Any) -> float:
    """Returns the largest magnitude, 0 where no value is finite."""
    if not np.isfinite(values).any():
        return 0.0
    return float(np.nanmax(np.abs(values)))
