"""Several runs as one HTML page: how they ended, how they differ, how loss and balance went."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.inspection import html
from moejax.inspection.figures.axes import NAMES
from moejax.inspection.figures.comparison import MAX_RUNS, draw_runs, draw_sorted_load, line_styles
from moejax.inspection.figures.run import only_value
from moejax.inspection.html import Markup
from moejax.inspection.report.comparison_seeds import over_seeds
from moejax.inspection.report.comparison_tables import other_tokens, results
from moejax.inspection.report.load import NOT_LOGGED, final_counts
from moejax.inspection.report.page import (
    Section,
    drawn_layers,
    figure,
    grid,
    number,
    render_page,
    table,
    write_page,
)
from moejax.inspection.report.training import model_in_words
from moejax.inspection.runs.comparison import Comparison, compare
from moejax.inspection.runs.names import recipe_name
from moejax.inspection.runs.run import Run, RunError
from moejax.paths import resolve_path

FILE_NAME = "comparison.html"
MAX_TITLE = 70  # characters of a title that names the runs
NO_LEAF = "\u2013"  # a dash


@dataclasses.dataclass(frozen=True)
class RunsChart:
    """A metric that is drawn for all runs together.

    Attributes:
      key: of the metric.
      title: what it is.
      unit: label of the y axis.
      reading: how to read it.
    """

    key: str
    title: str
    unit: str
    reading: str = ""


LOSSES = (
    RunsChart("eval/loss", "Validation loss", "nats per token"),
    RunsChart("loss/lm", "Training loss", "nats per token"),
)
BITS = (RunsChart("eval/bits_per_byte", "Bits per byte", "bits per byte"),)
ROUTING = (
    RunsChart(
        "moe/max_violation",
        "MaxVio",
        "busiest / mean - 1",
        "0 is perfect balance. Good: low.",
    ),
    RunsChart(
        "moe/load_entropy",
        "Load entropy",
        "nats",
        "How evenly tokens spread. Good: close to ln E.",
    ),
    RunsChart(
        "moe/entropy",
        "Router entropy",
        "nats",
        "How undecided the router is about a token; it falls as experts specialise.",
    ),
    RunsChart(
        "moe/dropped",
        "Dropped",
        "share of assignments",
        "Assignments that found their expert full. Good: 0.",
    ),
    RunsChart(
        "moe/dead_experts",
        "Dead experts",
        "experts",
        "Without a token in the interval. Good: 0.",
    ),
    RunsChart(
        "eval/routing_churn",
        "Routing churn",
        "share of a token's experts",
        "No longer visited since the evaluation before.",
    ),
)


def write_comparison(workdirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the comparison of runs.

    Args:
      workdirs: run directories, 2 to `MAX_RUNS`.
      output: the page; None: `comparison.html` in the folder that holds the first run.

    Raises:
      RunError: too few or too many runs, one given twice, or a directory that is none.
    """
    num_runs = len(workdirs)
    if not 2 <= num_runs <= MAX_RUNS:
        raise RunError(
            f"{num_runs} runs were given; a comparison takes 2 to {MAX_RUNS} run directories"
        )
    folders = [resolve_path(workdir) for workdir in workdirs]
    comparison = compare(folders)
    path = folders[0].parent / FILE_NAME if output is None else resolve_path(output)
    document = render_comparison(comparison)
    return write_page(path, document)


def render_comparison(comparison: Comparison) -> str:
    """Renders the page of at most `MAX_RUNS` runs."""
    sections: list[Section] = [
        ("runs", "Runs", _key(comparison) + results(comparison)),
        ("seeds", "Differences over seeds", over_seeds(comparison)),
        ("differences", "Configuration", _differences(comparison)),
        ("losses", "Loss", _losses(comparison)),
    ]
    if not all(run.is_dense for run in comparison.runs.values()):
        sections += [
            ("routing", "Routing health", _routing(comparison)),
            ("load", "Final load", _load(comparison)),
        ]
    return render_page(_title(comparison), _recipes(comparison), sections, kind="comparison")


def _title(comparison: Comparison) -> str:
    """Names the runs that are compared, or says how many there are."""
    labels = list(comparison.runs)
    named = f"{', '.join(labels[:-1])} and {labels[-1]}"
    return named if len(named) <= MAX_TITLE else f"{len(labels)} runs"


def _recipes(comparison: Comparison) -> str:
    """Names the recipes of the runs, each once."""
    names: list[str] = []
    for run in comparison.runs.values():
        name = recipe_name(run.command)
        if name and name not in names:
            names.append(name)
    if not names:
        return "Side by side"
    word = "recipe" if len(names) == 1 else "recipes"
    return f"Side by side; {word} {', '.join(names)}"


def _key(comparison: Comparison) -> Markup:
    """Shows which line is which run, once for all figures."""
    styles = line_styles(list(comparison.runs))
    models = {label: model_in_words(run) for label, run in comparison.runs.items()}
    return html.render("comparison/key", styles=styles, models=models)


def _differences(comparison: Comparison) -> Markup:
    """Returns a table of the leaves in which the runs differ."""
    frame = comparison.differences
    if frame.empty:
        return html.paragraph("The configurations are the same.")
    rows = []
    for leaf, *values in frame.itertuples(name=None):
        cells = map(_leaf, values)
        rows.append([leaf, *cells])
    intro = html.paragraph("The leaves in which the runs differ.")
    head = ["leaf", *frame.columns]
    return intro + table(head, rows, "compared")


def _leaf(value: Any) -> str:
    """Returns a value of a configuration; a dash where a run has no such leaf."""
    if value is None:
        return NO_LEAF
    if value == "":
        value = '""'  # an empty text would not show
    return html.code(value)


def _losses(comparison: Comparison) -> Markup:
    """Returns the losses of all runs, over each of the axes."""
    note = other_tokens(comparison)
    charts = BITS if note else LOSSES
    grids = [_over_each_axis(comparison, chart) for chart in charts]
    if not any(grids):
        return html.paragraph("No losses are logged yet.")
    return html.render(
        "comparison/losses",
        key=_key(comparison),
        note=note,
        figures=html.join(grids),
    )


def _over_each_axis(comparison: Comparison, chart: RunsChart) -> Markup:
    drawn = []
    for axis, name in NAMES.items():
        image = draw_runs(comparison.runs, chart.key, chart.unit, against=axis, legend=False)
        if image is not None:
            title = f"{chart.title} over {name}"
            drawn.append(figure(title, "", image))
    return grid(drawn)


def _routing(comparison: Comparison) -> Markup:
    """Returns charts of the routing; metrics with one value throughout are only named."""
    drawn: list[Markup] = []
    same_in_all: list[str] = []
    same_in_some: list[str] = []
    runs = comparison.runs
    num_runs = len(runs)
    for chart in ROUTING:
        value, num_logging = _only_value(comparison, chart.key)
        if value is not None:
            said = f"{chart.title} {number(value)}"
            if num_logging == num_runs:
                same_in_all.append(said)
            else:
                same_in_some.append(f"{said} ({num_logging} of {num_runs})")
            continue
        image = draw_runs(runs, chart.key, chart.unit, from_zero=True, legend=False)
        if image is not None:
            drawn.append(figure(chart.title, chart.reading, image))
    if not drawn and not same_in_all and not same_in_some:
        return html.paragraph(NOT_LOGGED)
    return html.render(
        "comparison/routing",
        key=_key(comparison),
        figures=grid(drawn),
        same_in_all=same_in_all,
        same_in_some=same_in_some,
    )


def _only_value(comparison: Comparison, key: str) -> tuple[float | None, int]:
    """Returns the one value that a metric has in all runs that log it, and how many those are."""
    logged = []
    for run in comparison.runs.values():
        _, values = run.series(key)
        if values.size:
            logged.append(values)
    return only_value(logged), len(logged)


def _load(comparison: Comparison) -> Markup:
    """Returns the final load of each layer, of all runs together."""
    counts = _final_counts(comparison)
    layers = sorted(set().union(*counts.values()))
    if not layers:
        return html.paragraph(NOT_LOGGED)
    nothing_E = np.zeros(0, np.int64)
    drawn = []
    for i in drawn_layers(len(layers)):
        layer = layers[i]
        of_layer = {label: by_layer.get(layer, nothing_E) for label, by_layer in counts.items()}
        image = draw_sorted_load(of_layer, legend=False)
        drawn.append(figure(f"Layer {layer}", "", image))
    return html.render(
        "comparison/load",
        key=_key(comparison),
        num_drawn=len(drawn),
        num_layers=len(layers),
        figures=grid(drawn),
    )


def _final_counts(comparison: Comparison) -> Mapping[str, Mapping[int, np.ndarray]]:
    """Returns final counts by run and model layer.

    Nothing for dense runs and those that have logged no routing.
    """
    return {label: _counts_by_layer(run) for label, run in comparison.runs.items()}


def _counts_by_layer(run: Run) -> dict[int, np.ndarray]:
    routing = run.routing
    if routing is None or not routing.num_entries:
        return {}
    layers = routing.layers.tolist()
    counts_NE, _ = final_counts(routing)
    return dict(zip(layers, counts_NE, strict=True))
