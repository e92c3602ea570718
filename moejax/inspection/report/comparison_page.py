"""Several runs as one HTML page: how they ended, where they differ, and how loss and balance went in each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.inspection import html
from moejax.inspection.figures.axes import NAMES
from moejax.inspection.figures.comparison import MAX_RUNS, draw_runs, draw_sorted_load, line_styles
from moejax.inspection.figures.run import only_value
from moejax.inspection.report.comparison_tables import other_tokens, over_seeds, results
from moejax.inspection.report.load import final_counts
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
from moejax.inspection.runs.run import RunError
from moejax.paths import resolve_path

FILE_NAME = "comparison.html"
LOSSES = (
    ("eval/loss", "Validation loss", "nats per token"),
    ("loss/lm", "Training loss", "nats per token"),
)
BITS = (("eval/bits_per_byte", "Bits per byte", "bits per byte"),)
MAX_TITLE = 70  # characters of a title that names the runs
ROUTING = (
    ("moe/max_violation", "MaxVio", "busiest / mean - 1", "0 is perfect balance. Good: low."),
    ("moe/load_entropy", "Load entropy", "nats", "How evenly tokens spread. Good: close to ln E."),
    (
        "moe/entropy",
        "Router entropy",
        "nats",
        "How undecided the router is about a token; it falls as experts specialise.",
    ),
    (
        "moe/dropped",
        "Dropped",
        "share of assignments",
        "Assignments that found their expert full. Good: 0.",
    ),
    ("moe/dead_experts", "Dead experts", "experts", "Without a token in the interval. Good: 0."),
    (
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
    if not 2 <= len(workdirs) <= MAX_RUNS:
        raise RunError(
            f"{len(workdirs)} runs were given; a comparison takes 2 to {MAX_RUNS} run directories"
        )
    folders = [resolve_path(workdir) for workdir in workdirs]
    found = compare(folders)
    path = folders[0].parent / FILE_NAME if output is None else resolve_path(output)
    return write_page(path, render_comparison(found))


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
    """The runs that are compared, or how many there are."""
    labels = list(comparison.runs)
    named = f"{', '.join(labels[:-1])} and {labels[-1]}"
    return named if len(named) <= MAX_TITLE else f"{len(labels)} runs"


def _recipes(comparison: Comparison) -> str:
    names = dict.fromkeys(recipe_name(run.command) for run in comparison.runs.values())
    known = [html.text(name) for name in names if name]
    return (
        f"Side by side; recipe{'s' * (len(known) > 1)} {', '.join(known)}"
        if known
        else "Side by side"
    )


def _key(comparison: Comparison) -> str:
    """Which line is which run, once for all figures."""
    items = [
        f'<li><i style="border-top:3px {look.css} {look.color}"></i><strong>{html.text(label)}</strong> '
        f'<span class="soft">{model_in_words(comparison.runs[label])}</span></li>'
        for label, look in line_styles(list(comparison.runs)).items()
    ]
    return f'<ul class="key">{"".join(items)}</ul>'


def _differences(comparison: Comparison) -> str:
    frame = comparison.differences
    if not len(frame):
        return "<p>The configurations are the same.</p>"
    rows = [
        [html.text(leaf), *(_leaf(value) for value in row)]
        for leaf, row in zip(frame.index, frame.itertuples(index=False, name=None), strict=True)
    ]
    head = ["leaf", *map(html.text, frame.columns)]
    return f"<p>The leaves in which the runs differ.</p>{table(head, rows, 'compared')}"


def _leaf(value: Any) -> str:
    """A value of a configuration; a dash where a run has no such leaf."""
    if value is None:
        return "&ndash;"
    return f"<code>{html.text(value if value != '' else json.dumps(value))}</code>"


def _losses(comparison: Comparison) -> str:
    note = other_tokens(comparison)
    losses = BITS if note else LOSSES
    drawn = []
    for key, title, unit in losses:
        of_key = []
        for against, name in NAMES.items():
            image = draw_runs(comparison.runs, key, unit, against=against, legend=False)
            if image is not None:
                of_key.append(figure(f"{title} over {name}", "", image))
        drawn.append(grid(of_key) if of_key else "")
    if not any(drawn):
        return "<p>No losses are logged yet.</p>"
    return (
        f"{_key(comparison)}<p>Experts are to be judged at equal arithmetic. FLOPs are what the model asks for in "
        "training, forward and backward, attention among them; time is that of training steps on the devices of each "
        f"run.</p>{note}{''.join(drawn)}"
    )


def _routing(comparison: Comparison) -> str:
    drawn, in_all, in_some = [], [], []
    for key, title, ylabel, reading in ROUTING:
        value = only_value(run.series(key)[1] for run in comparison.runs.values())
        if value is not None:
            having = sum(run.last(key) is not None for run in comparison.runs.values())
            if having == len(comparison.runs):
                in_all.append(f"{title} {number(value)}")
            else:
                in_some.append(f"{title} {number(value)} ({having} of {len(comparison.runs)})")
            continue
        image = draw_runs(comparison.runs, key, ylabel, from_zero=True, legend=False)
        if image is not None:
            drawn.append(figure(title, reading, image))
    if not drawn and not in_all and not in_some:
        return "<p>No routing is logged yet.</p>"
    same = f"<p>The same in all runs throughout: {'; '.join(in_all)}.</p>" if in_all else ""
    if in_some:
        same += f"<p>The same throughout in the runs that log it: {'; '.join(in_some)}.</p>"
    return _key(comparison) + (grid(drawn) if drawn else "") + same


def _load(comparison: Comparison) -> str:
    counts = _final_counts(comparison)
    layers = sorted({layer for by_layer in counts.values() for layer in by_layer})
    if not layers:
        return "<p>No routing is logged yet.</p>"
    nothing = np.zeros(0, np.int64)
    drawn = []
    for layer in [layers[i] for i in drawn_layers(len(layers))]:
        of_layer = {label: by_layer.get(layer, nothing) for label, by_layer in counts.items()}
        drawn.append(figure(f"Layer {layer}", "", draw_sorted_load(of_layer, legend=False)))
    some = (
        ""
        if len(drawn) == len(layers)
        else f" {len(drawn)} of {len(layers)} layers are shown, evenly spaced."
    )
    return (
        f"{_key(comparison)}<p>Load over uniform load in the last tenth of each run, experts sorted by it: flat is "
        f"even. Experts of different runs have nothing in common but their rank.{some}</p>{grid(drawn)}"
    )


def _final_counts(comparison: Comparison) -> Mapping[str, Mapping[int, np.ndarray]]:
    """By run and model layer; nothing for dense runs and those that have logged no routing."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for label, run in comparison.runs.items():
        routing = run.routing
        if routing is None or not routing.num_entries:
            found[label] = {}
            continue
        counts_NE, _ = final_counts(routing)
        found[label] = dict(zip(routing.layers.tolist(), counts_NE, strict=True))
    return found
