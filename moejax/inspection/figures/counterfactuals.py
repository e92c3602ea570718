"""Figures of counterfactuals as data URIs: what interventions on routing do to the loss.

A change is in nats per token from the loss as trained on the same rows; error bars are two standard
errors to either side, so that one which reaches 0 may be noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from moejax.inspection.counterfactuals.plan import NOT_SELECTABLE, OUTPUT_ZERO
from moejax.inspection.counterfactuals.result import Counterfactuals, Outcome
from moejax.inspection.figures.style import (
    BAR_COLORS,
    BLUE,
    GREY,
    HATCHES,
    NO_VALUE,
    STYLE,
    Drawing,
    color_bar,
    every_nth,
    heat_colors,
    heat_map,
    name_rows,
    new_figure,
    write_in_cell,
)

MAX_LAYERS = 12  # with bars; of deeper models, evenly spaced ones
MAX_TICKS = 8  # labels of settings along an axis
MAX_WRITTEN = 6  # experts in a row of cells with numbers
MAX_DOTTED = 512  # cells of which noise is marked
YLABEL = "change, nats / token"


def draw_top_k(result: Counterfactuals) -> Drawing | None:
    """Draws the change of the loss against the number of experts per token.

    Below K stands the gate mass, where it changes.

    Returns:
      An SVG data URI; None without such outcomes.
    """
    rows = result.of_kind("top_k")
    if not rows:
        return None
    masses = [row.gate_mass for row in (*rows, result.as_trained)]
    spread = max(masses) - min(masses)
    labels = [f"{row.setting:g}" for row in rows]
    xlabel = "experts per token"
    if spread > 0.005:
        labels = [f"{row.setting:g}\n{row.gate_mass:.2f}" for row in rows]
        xlabel = "experts per token, and mean gate mass"
    distinct = set(result.top_k)
    trained = distinct.pop() if len(distinct) == 1 else None
    return _draw_line(rows, labels, xlabel, trained)


def draw_capacity(result: Counterfactuals) -> Drawing | None:
    """Draws the change of the loss against the capacity factor.

    Below the factor stands the share of choices that are dropped.

    Returns:
      An SVG data URI; None without such outcomes.
    """
    rows = sorted(result.of_kind("capacity"), key=_setting)
    if not rows:
        return None
    labels = [f"{row.setting:g}\n{100 * row.dropped:.2g} %" for row in rows]
    return _draw_line(rows, labels, "capacity factor, and choices dropped")


def draw_ablation(result: Counterfactuals, way: str) -> Drawing | None:
    """Draws the change of the loss without one expert: a layer a row, an expert a column.

    Args:
      result: with ablations.
      way: "not selectable" or "output 0"; both have one scale.

    Returns:
      An SVG data URI; None without such outcomes. White is no change, red is worse, blue better;
      grey was left out. In small maps a dot marks what may be noise.
    """
    change_NE = result.by_expert(way)
    if np.isnan(change_NE).all():
        return None
    error_NE = result.by_expert(way, "standard_error")
    limit = max(_largest_change(result, each) for each in (NOT_SELECTABLE, OUTPUT_ZERO))
    height = np.clip(1.05 + 0.26 * len(result.layers), 1.7, 4.6)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(float(height))
        colors = heat_colors("RdBu_r", bad=NO_VALUE)
        mesh = heat_map(axes, change_NE, cmap=colors, norm=Normalize(-limit, limit))
        _mark_cells(axes, change_NE, error_NE, limit)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        name_rows(axes, result.layers)
        bar = color_bar(figure, axes, mesh, "nats / token")
        bar.locator = MaxNLocator(5, symmetric=True)
        return Drawing.from_figure(figure)


def _largest_change(result: Counterfactuals, way: str) -> float:
    """Returns the largest absolute change of an ablation, a little above 0 without any."""
    change_NE = np.abs(result.by_expert(way))
    largest = np.nanmax(change_NE, initial=1e-6)
    return float(largest)


def draw_bars(result: Counterfactuals, kinds: Sequence[str]) -> Drawing | None:
    """Draws the changes of the loss by layer as bars, those of all layers at once first.

    Args:
      result: with outcomes of those kinds.
      kinds: such as ("swap", "merge") or ("random", "uniform"), at most four bars a layer: random
        pairs share one, at their mean, with the mean of their errors.

    Returns:
      An SVG data URI; None without such outcomes.
    """
    rows: list[Outcome] = []
    for kind in kinds:
        rows += result.of_kind(kind)
    if not rows:
        return None
    layers = _layers_to_show(rows)
    names = list(dict.fromkeys((row.kind, row.what) for row in rows))
    num_names = len(names)
    step = 0.84 / num_names  # between the bars of a layer
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.3 + 0.2 * num_names)
        for i, name in enumerate(names):
            of_name = [row for row in rows if (row.kind, row.what) == name]
            offset = (i - (num_names - 1) / 2) * step
            bars = _bars(of_name, layers, offset)
            _draw_bars(axes, bars, 0.92 * step, i, _bar_label(*name))
        axes.axhline(0, color=GREY, lw=1)
        ticks = ["all" if layer is None else str(layer) for layer in layers]
        axes.set_xticks(range(len(layers)), labels=ticks)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("changed layer")
        axes.set_ylabel(YLABEL)
        axes.set_xlim(-0.6, max(len(layers), 2) - 0.4)
        figure.legend(
            loc="outside upper left",
            ncols=1 if num_names > 2 else 2,
            borderaxespad=0.1,
            columnspacing=1.2,
        )
        return Drawing.from_figure(figure)


def _bar_label(kind: str, what: str) -> str:
    """Returns the name of bars in the legend."""
    return f"{kind} {what}" if kind in ("swap", "merge") else what


class _Bars(NamedTuple):
    """Bars of one colour: where they are, the changes, and two standard errors of each."""

    places: list[float]
    changes: list[float]
    errors: list[float]


def _bars(rows: Sequence[Outcome], layers: Sequence[int | None], offset: float) -> _Bars:
    """Returns a bar for each layer that has outcomes, at the mean of them."""
    bars = _Bars([], [], [])
    for place, layer in enumerate(layers):
        of_layer = [row for row in rows if row.layer == layer]
        if not of_layer:
            continue
        change = np.mean([row.change for row in of_layer])
        error = np.mean([row.standard_error for row in of_layer])
        bars.places.append(place + offset)
        bars.changes.append(float(change))
        bars.errors.append(2 * float(error))
    return bars


def _draw_bars(axes: Axes, bars: _Bars, width: float, number: int, label: str) -> None:
    """Draws bars in the colour and the hatch of their number, with their errors."""
    axes.bar(
        bars.places,
        bars.changes,
        width,
        color=BAR_COLORS[number % 4],
        hatch=HATCHES[number % 4],
        edgecolor="white",
        lw=0.4,
        label=label,
    )
    axes.errorbar(*bars, fmt="none", ecolor="#111111", elinewidth=1, capsize=1.5)


def _layers_to_show(rows: Sequence[Outcome]) -> list[int | None]:
    """Returns evenly spaced layers, after None for all of them at once if there is such a row."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    found: list[int | None] = []
    if any(row.layer is None for row in rows):
        found.append(None)
    if layers:
        places = np.linspace(0, len(layers) - 1, MAX_LAYERS)
        indices = np.unique(places.astype(int))
        found += [layers[index] for index in indices]
    return found


def _draw_line(
    rows: Sequence[Outcome],
    labels: Sequence[str],
    xlabel: str,
    trained: float | None = None,
) -> Drawing:
    """Draws changes against settings, at equal distances."""
    changes = [row.change for row in rows]
    errors = [2 * row.standard_error for row in rows]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.45)
        places = np.arange(len(rows))
        axes.axhline(0, color=GREY, lw=1, ls=(0, (2, 2)), label="as trained")
        for place, row in enumerate(rows):
            if row.setting == trained:
                axes.axvline(place, color=GREY, lw=1, ls=(0, (2, 2)))
        axes.errorbar(
            places,
            changes,
            errors,
            color=BLUE,
            marker="o",
            ms=4.5,
            mec="white",
            mew=0.7,
            elinewidth=1,
            capsize=2.5,
            label="changed",
        )
        ticks = every_nth(len(rows), MAX_TICKS)
        axes.set_xticks(ticks, labels=[labels[place] for place in ticks])
        axes.set_xlim(-0.4, max(len(rows), 2) - 0.6)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(YLABEL)
        figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.1, columnspacing=1.2)
        return Drawing.from_figure(figure)


def _mark_cells(axes: Axes, change_NE: np.ndarray, error_NE: np.ndarray, limit: float) -> None:
    """Writes numbers where there is room for them, and dots where there may be only noise."""
    if change_NE.size > MAX_DOTTED:
        return
    is_known_NE = ~np.isnan(change_NE)
    size_NE = np.abs(change_NE)
    is_clear_NE = size_NE > 2 * error_NE  # not with one row, whose error is NaN
    is_noise_NE = is_known_NE & ~is_clear_NE
    num_experts = change_NE.shape[1]
    if num_experts > MAX_WRITTEN:
        layers, experts = np.nonzero(is_noise_NE)
        axes.plot(experts, layers, ".", color="#111111", ms=2.5)
        return
    digits = 2 if limit >= 0.095 else 3
    for layer, expert in np.argwhere(is_known_NE).tolist():
        change = float(change_NE[layer, expert])
        dot = "·" if is_noise_NE[layer, expert] else ""
        text = f"{change:+.{digits}f}{dot}"
        is_dark = abs(change) > 0.65 * limit
        write_in_cell(axes, layer, expert, text, is_dark=is_dark)


def _setting(row: Outcome) -> float:
    """Returns what outcomes of a kind are sorted by."""
    return row.setting or 0.0
