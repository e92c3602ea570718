"""Sections of a run's report: how assignments spread over experts, over time and at the end."""

import math

import numpy as np
from jaxtyping import Int64

from moejax.inspection.figures import run as figures
from moejax.inspection.report.page import drawn_layers, figure, grid, left_out
from moejax.inspection.runs.run import Run
from moejax.training.run_directory.routing_log import RoutingHistory

FINAL_FRACTION = 0.1  # of the logged intervals: what "final load" sums over


def final_counts(routing: RoutingHistory) -> tuple[Int64[np.ndarray, "N E"], int]:
    """Assignments to each expert over the last `FINAL_FRACTION` of the intervals, and the step they begin behind."""
    entries = math.ceil(FINAL_FRACTION * routing.num_entries)
    since = int(routing.steps[-entries - 1]) if entries < routing.num_entries else 0
    total_NE = sum(
        counts_SNE.sum(axis=0)
        for counts_SNE in routing.blocks("counts", routing.num_entries - entries)
    )
    return np.asarray(total_NE), since


def load_over_time(run: Run) -> str:
    """A heat map for each layer."""
    routing = run.routing
    if routing is None or not routing.steps.size:
        return "<p>No routing is logged yet.</p>"
    steps, counts_SNE = routing.summed("counts", figures.MAX_COLUMNS)
    shown = []
    for n in drawn_layers(len(routing.layers)):
        image = figures.draw_load_over_time(steps, counts_SNE[:, n])
        shown.append(figure(f"Layer {routing.layers[n]}", "", image, kind="true-colors"))
    return (
        "<p>Assignments to each expert over those of a uniform load, before any are dropped. White is uniform, red is "
        "overloaded, blue is underused, black got no token at all. Good: pale everywhere. A row that stays dark blue "
        "or black is an expert that hardly learns.</p>"
        f"{left_out(len(routing.layers))}{grid(shown)}"
    )


def final_load(run: Run) -> str:
    """Bars for each layer, and which experts are dead."""
    routing = run.routing
    if routing is None or not routing.steps.size:
        return "<p>No routing is logged yet.</p>"
    counts_NE, since = final_counts(routing)
    ratio_NE, N = figures.load_ratio(counts_NE), len(counts_NE)
    dead = [
        (layer, np.flatnonzero(row == 0))
        for layer, row in zip(routing.layers, counts_NE, strict=True)
    ]
    names = [
        f"in layer {layer}: {', '.join(map(str, experts))}"
        for layer, experts in dead
        if experts.size
    ]
    num_dead = f"{(counts_NE == 0).sum()} of {counts_NE.size} experts"
    verdict = f"Dead: {num_dead}; {'; '.join(names)}." if names else "No expert is dead."
    shown = []
    for n in drawn_layers(N):
        high, low = int(ratio_NE[n].argmax()), int(ratio_NE[n].argmin())
        reading = f"Busiest: {high} ({ratio_NE[n, high]:.2f}). Least used: {low} ({ratio_NE[n, low]:.2f})."
        if dead[n][1].size:
            reading += f" Dead: {', '.join(map(str, dead[n][1]))}."
        shown.append(
            figure(f"Layer {routing.layers[n]}", reading, figures.draw_final_load(counts_NE[n]))
        )
    return (
        f"<p>Load over uniform load, summed over steps {since + 1:,} to {routing.steps[-1]:,}: 1 is an even share. An "
        f"expert is dead if it got no token in that time. <strong>{verdict}</strong></p>"
        f"{left_out(N)}{grid(shown)}"
    )
