"""Sections of a run's report on its health: alarms, and each MoE layer over time."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.config.sections.alarms import RULES
from moejax.inspection import html
from moejax.inspection.figures import layers as layer_figures
from moejax.inspection.figures.layers import draw_layers, last_values, worst_layer
from moejax.inspection.figures.run import only_value
from moejax.inspection.html import Markup
from moejax.inspection.report.page import details, figure, grid, number, table
from moejax.inspection.runs.run import Run
from moejax.training.health.alarms import active, name_layers, read_alarms
from moejax.training.run_directory.routing_log import RoutingHistory

MAX_ALARMS = 100  # listed, the newest
MAX_OPEN_ALARMS = 12  # lines of a history that is open from the start
LAST_ENTRIES = 64  # among which the last finite value of a metric is looked for

Worst = Callable[[np.ndarray], float]
"""Reduces the layers' values of a metric to the worst one."""


@dataclasses.dataclass(frozen=True)
class LayerChart:
    """A metric of `routing/layers`.

    Attributes:
      name: of the metric.
      title: with its unit.
      reading: how to read it.
      worst: picks the worst value of the layers; None where none is bad.
    """

    name: str
    title: str
    reading: str
    worst: Worst | None

    @property
    def is_entropy(self) -> bool:
        """Whether uniform routing is the metric's reference, and not zero."""
        return self.name in ("entropy", "load_entropy")


LAYER_CHARTS = (
    LayerChart(
        "max_violation",
        "MaxVio",
        "Busiest expert over the mean load, less 1. Good: below about 0.5.",
        np.nanmax,
    ),
    LayerChart(
        "load_entropy",
        "Load entropy, nats",
        "How evenly tokens spread. Good: close to ln E.",
        np.nanmin,
    ),
    LayerChart(
        "entropy",
        "Router entropy, nats",
        "How undecided the router is about a token. 0: it explores no more.",
        np.nanmin,
    ),
    LayerChart(
        "dropped",
        "Dropped, share of choices",
        "Choices that found no slot. Good: 0.",
        np.nanmax,
    ),
    LayerChart(
        "logit_max",
        "Largest router logit",
        "In magnitude. Growing without end precedes instability.",
        np.nanmax,
    ),
    LayerChart(
        "top_prob",
        "Top probability",
        "Of a token's first choice, in the mean. 1: the router is certain.",
        None,
    ),
)


def alarms(run: Run) -> Markup:
    """Returns the alarms that are on at the end, and a history of all."""
    lines = read_alarms(run.workdir)
    layers_by_rule: dict[str, list[int]] = {}
    for rule, layer in active(lines):
        layers_by_rule.setdefault(rule, []).append(layer)
    holding = {rule: name_layers(sorted(layers)) for rule, layers in layers_by_rule.items()}
    thresholds = run.config.get("alarms", {})
    history = _alarm_history(lines) if lines else html.EMPTY
    return html.render(
        "report/alarms",
        holding=holding,
        rules=_rules_that_are_on(thresholds),
        history=history,
    )


def _rules_that_are_on(thresholds: Mapping[str, Any]) -> list[str]:
    """Returns the rules of alarms with a threshold other than 0."""
    found = []
    for rule in RULES:
        threshold = thresholds.get(rule)
        if isinstance(threshold, int | float) and threshold:
            found.append(f"{rule} ({number(threshold)})")
    return found


def _alarm_history(lines: Sequence[Mapping[str, Any]]) -> Markup:
    rows = []
    for line in lines[-MAX_ALARMS:]:
        layers = [int(layer) for layer in line["layers"]]
        row = (
            f"{line['step']:,}",
            line["rule"],
            line["state"],
            name_layers(layers),
            line.get("reading", ""),
        )
        rows.append(row)
    listed = table(("step", "rule", "", "where", "what was seen"), rows, "events")
    if len(lines) > MAX_ALARMS:
        listed = html.paragraph(f"The newest {MAX_ALARMS} of {len(lines):,} lines.") + listed
    is_open = len(lines) <= MAX_OPEN_ALARMS
    return details(f"History: {len(lines):,} lines", listed, is_open=is_open)


def layers_over_time(run: Run) -> Markup:
    """Returns a figure per metric, with a line or a row for each layer, and the last values."""
    routing = run.routing
    if routing is None or not routing.num_entries or not routing.attributes["metrics"]:
        return html.paragraph("No metrics of single layers are logged.")
    layers = routing.layers.tolist()
    drawn: list[Markup] = []
    constants: list[str] = []
    for chart, values_SN in _layer_metrics(routing):
        value = only_value([values_SN.ravel()])
        if value is not None:
            name = chart.title.partition(",")[0].lower()
            constants.append(f"{name} {number(value)}")
            continue
        reference = None
        if chart.is_entropy:
            reference = (math.log(run.num_choices), "uniform: ln E")
        image = draw_layers(
            routing.steps,
            values_SN,
            layers,
            chart.title,
            worst=chart.worst,
            reference=reference,
            from_zero=not chart.is_entropy,
        )
        worst = worst_in_words(values_SN, layers, chart.worst)
        drawn.append(
            figure(chart.title, chart.reading, image, value=worst, kind=figure_class(layers))
        )
    return html.render(
        "report/layers",
        constants=constants,
        figures=grid(drawn),
        last_values=_last_values(routing),
    )


def _layer_metrics(routing: RoutingHistory) -> list[tuple[LayerChart, np.ndarray]]:
    """Returns the charts whose metric has a finite value, with its values `[S, N]`."""
    names = list(routing.attributes["metrics"])
    charts = [chart for chart in LAYER_CHARTS if chart.name in names]
    metrics_M = [names.index(chart.name) for chart in charts]
    # Only the metrics that are drawn are kept of each block: a long log has many others.
    blocks_SNM = [block_SNM[:, :, metrics_M] for block_SNM in routing.blocks("layers")]
    values_SNM = np.concatenate(blocks_SNM)
    values_MSN = np.moveaxis(values_SNM, 2, 0)
    found = []
    for chart, values_SN in zip(charts, values_MSN, strict=True):
        has_values = np.isfinite(values_SN).any()
        if has_values:
            values_SN = values_SN.astype(np.float64)
            found.append((chart, values_SN))
    return found


def _last_values(routing: RoutingHistory) -> Markup:
    """Returns a table of the last finite value of every metric, by layer."""
    names = list(routing.attributes["metrics"])
    num_entries = min(routing.num_entries, LAST_ENTRIES)
    last_SNM = routing.read("layers", -num_entries).astype(np.float64)
    last_MSN = np.moveaxis(last_SNM, 2, 0)
    columns_MN = [last_values(last_SN).tolist() for last_SN in last_MSN]
    rows_NM = zip(*columns_MN, strict=True)
    rows = []
    for layer, values_M in zip(routing.layers, rows_NM, strict=True):
        cells = map(_number_or_empty, values_M)
        rows.append([str(layer), *cells])
    listed = table(["layer", *names], rows, "numbers")
    return details("Last finite values of every metric, by layer", listed)


def _number_or_empty(value: float) -> str:
    return "" if math.isnan(value) else number(value)


def worst_in_words(values_SN: np.ndarray, layers: Sequence[int], worst: Worst | None) -> str:
    """Names the layer whose last value is the worst; nothing where no value is bad."""
    if worst is None:
        return ""
    n = worst_layer(values_SN, worst)
    if n is None:
        return ""
    last_N = last_values(values_SN)
    value = number(float(last_N[n]))
    return f"worst: layer {layers[n]}, {value}"


def figure_class(layers: Sequence[int]) -> str:
    """Returns the class of figures that keep their colours on a dark page: heat maps."""
    return "true-colors" if len(layers) > layer_figures.MAX_LINES else ""
