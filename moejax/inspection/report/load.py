"""Sections of a run's report: how assignments spread over experts, over time and at the end."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from moejax.inspection import html
from moejax.inspection.figures import run as figures
from moejax.inspection.html import Markup
from moejax.inspection.report.page import drawn_layers, figure, grid, left_out
from moejax.inspection.runs.run import Run
from moejax.training.run_directory.routing_log import RoutingHistory

FINAL_FRACTION = 0.1  # of the logged intervals: what "final load" sums over
NOT_LOGGED = "No routing is logged yet."


def final_counts(routing: RoutingHistory) -> tuple[Int64[np.ndarray, "N E"], int]:
    """Returns assignments to each expert over the last `FINAL_FRACTION` of the intervals.

    Returns:
      The counts, and the step after which they begin.
    """
    num_entries = routing.num_entries
    num_final = math.ceil(FINAL_FRACTION * num_entries)
    first = num_entries - num_final
    since = 0
    if first:
        # A step is the end of its interval, so the counts begin after the step before the first.
        since = int(routing.steps[first - 1])
    blocks_SNE = routing.blocks("counts", first)
    sums_NE = [block_SNE.sum(axis=0) for block_SNE in blocks_SNE]
    total_NE = np.sum(sums_NE, axis=0)
    return total_NE, since


def load_over_time(run: Run) -> Markup:
    """Returns a heat map for each layer."""
    routing = run.routing
    if routing is None or not routing.steps.size:
        return html.paragraph(NOT_LOGGED)
    steps, counts_SNE = routing.summed("counts", figures.MAX_COLUMNS)
    layers = routing.layers
    drawn = []
    for n in drawn_layers(len(layers)):
        counts_SE = counts_SNE[:, n]
        image = figures.draw_load_over_time(steps, counts_SE)
        drawn.append(figure(f"Layer {layers[n]}", "", image, kind="true-colors"))
    return html.render(
        "report/load_over_time",
        left_out=left_out(len(layers)),
        figures=grid(drawn),
    )


def final_load(run: Run) -> Markup:
    """Returns bars for each layer, and which experts are dead."""
    routing = run.routing
    if routing is None or not routing.steps.size:
        return html.paragraph(NOT_LOGGED)
    counts_NE, since = final_counts(routing)
    return html.render(
        "report/final_load",
        first_step=f"{since + 1:,}",
        last_step=f"{routing.steps[-1]:,}",
        verdict=_dead_in_words(routing.layers, counts_NE),
        left_out=left_out(len(counts_NE)),
        figures=load_of_layers(counts_NE, routing.layers),
    )


def load_of_layers(counts_NE: Int[np.ndarray, "N E"], layers: Sequence[int] | np.ndarray) -> Markup:
    """Returns the load of each expert as bars, of the `drawn_layers`.

    Args:
      counts_NE: assignments to each expert.
      layers: model layer of each MoE layer.
    """
    drawn = []
    for n in drawn_layers(len(counts_NE)):
        image = figures.draw_final_load(counts_NE[n])
        drawn.append(figure(f"Layer {layers[n]}", _extremes(counts_NE, n), image))
    return grid(drawn)


def _extremes(counts_NE: np.ndarray, n: int) -> str:
    """Names the busiest, the least used and the dead experts of a layer."""
    ratio_E = figures.load_ratio(counts_NE)[n]
    busiest = int(ratio_E.argmax())
    least_used = int(ratio_E.argmin())
    reading = (
        f"Busiest: {busiest} ({ratio_E[busiest]:.2f}). "
        f"Least used: {least_used} ({ratio_E[least_used]:.2f})."
    )
    dead = _dead(counts_NE[n])
    if dead:
        reading += f" Dead: {dead}."
    return reading


def _dead(counts_E: np.ndarray) -> str:
    return ", ".join(str(expert) for expert in np.flatnonzero(counts_E == 0))


def _dead_in_words(layers: np.ndarray, counts_NE: np.ndarray) -> str:
    """Says how many experts are dead, and which in which layer."""
    names = []
    for layer, counts_E in zip(layers, counts_NE, strict=True):
        dead = _dead(counts_E)
        if dead:
            names.append(f"in layer {layer}: {dead}")
    if not names:
        return "No expert is dead."
    num_dead = int((counts_NE == 0).sum())
    return f"Dead: {num_dead} of {counts_NE.size} experts; {'; '.join(names)}."
