"""Figures of counterfactuals as data URIs: what changed routing does to the loss.

A change is in nats per token against the loss as trained on the same rows; error bars are two
standard errors to either side, so that one which reaches 0 may be noise.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator

from moejax.inspection.counterfactuals.plan import NOT_SELECTABLE, OUTPUT_ZERO
from moejax.inspection.counterfactuals.result import Counterfactuals, Outcome
from moejax.inspection.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    Drawing,
    new_figure,
)

MAX_LAYERS = 12  # with bars; of deeper models, evenly spaced ones
MAX_TICKS = 8  # labels below one another of settings and what came of them
MAX_WRITTEN = 6  # experts in a row of cells with numbers
MAX_DOTTED = 512  # cells of which noise is marked
COLORS = (BLUE, ORANGE, GREEN, PURPLE)
HATCHES = ("", "///", "\\\\\\", "xx")
YLABEL = "change, nats / token"
NO_VALUE = "#9ca3af"


def draw_top_k(result: Counterfactuals) -> Drawing | None:
    """The change of the loss against the number of experts per token; below K the gate mass, where it changes.

    Returns:
      An SVG data URI; None without such outcomes.
    """
    rows = result.of_kind("top_k")
    if not rows:
        return None
    masses = [row.gate_mass for row in (*rows, result.as_trained)]
    has_mass = max(masses) - min(masses) > 0.005
    labels = [f"{row.setting:g}" + (f"\n{row.gate_mass:.2f}" if has_mass else "") for row in rows]
    trained = result.top_k[0] if len(set(result.top_k)) == 1 else None
    xlabel = "experts per token, and mean gate mass" if has_mass else "experts per token"
    return _draw_line(rows, labels, xlabel, trained)


def draw_capacity(result: Counterfactuals) -> Drawing | None:
    """The change of the loss against the capacity factor; below the factor the share of choices that are dropped.

    Returns:
      An SVG data URI; None without such outcomes.
    """
    rows = sorted(result.of_kind("capacity"), key=_setting)
    if not rows:
        return None
    labels = [f"{row.setting:g}\n{100 * row.dropped:.2g} %" for row in rows]
    return _draw_line(rows, labels, "capacity factor, and choices dropped")


def draw_ablation(result: Counterfactuals, way: str) -> Drawing | None:
    """A heat map of the change of the loss without one expert: a layer a row, an expert a column.

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
    limit = max(
        float(np.nanmax(np.abs(result.by_expert(each)), initial=1e-6))
        for each in (NOT_SELECTABLE, OUTPUT_ZERO)
    )
    num_layers, num_experts = change_NE.shape
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(float(np.clip(1.05 + 0.26 * num_layers, 1.7, 4.6)))
        colors = matplotlib.colormaps["RdBu_r"].resampled(41).with_extremes(bad=NO_VALUE)
        mesh = axes.pcolormesh(
            np.arange(num_experts + 1) - 0.5, np.arange(num_layers + 1) - 0.5, np.ma.masked_invalid(change_NE),
            cmap=colors, norm=Normalize(-limit, limit), rasterized=True, antialiased=False,
        )  # fmt: skip
        _mark_cells(axes, change_NE, result.by_expert(way, "standard_error"), limit)
        axes.grid(False)
        axes.invert_yaxis()
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _label_layers(axes, result.layers)
        bar = figure.colorbar(mesh, ax=axes, aspect=24, pad=0.02)
        bar.locator = MaxNLocator(5, symmetric=True)
        bar.set_label("nats / token")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return Drawing.from_figure(figure)


def draw_bars(result: Counterfactuals, kinds: Sequence[str]) -> Drawing | None:
    """The changes of the loss by layer as bars, those of all layers at once first.

    Args:
      result: with outcomes of those kinds.
      kinds: such as ("swap", "merge") or ("random", "uniform"), at most four bars a layer: random
        pairs share one, at their mean, with the mean of their errors.

    Returns:
      An SVG data URI; None without such outcomes.
    """
    rows = [row for kind in kinds for row in result.of_kind(kind)]
    if not rows:
        return None
    groups = _groups(rows)
    names = list(dict.fromkeys((row.kind, row.what) for row in rows))
    step = 0.84 / len(names)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.3 + 0.2 * len(names))
        for i, (kind, what) in enumerate(names):
            places, changes, errors = [], [], []
            for place, layer in enumerate(groups):
                cells = [
                    row for row in rows if (row.kind, row.what, row.layer) == (kind, what, layer)
                ]
                if cells:
                    places.append(place + (i - (len(names) - 1) / 2) * step)
                    changes.append(np.mean([row.change for row in cells]))
                    errors.append(2 * np.mean([row.standard_error for row in cells]))
            axes.bar(
                places, changes, 0.92 * step, color=COLORS[i % 4], hatch=HATCHES[i % 4], edgecolor="white", lw=0.4,
                label=f"{kind} {what}" if kind in ("swap", "merge") else what,
            )  # fmt: skip
            axes.errorbar(
                places, changes, errors, fmt="none", ecolor="#111111", elinewidth=1, capsize=1.5
            )
        axes.axhline(0, color=GREY, lw=1)
        axes.set_xticks(
            range(len(groups)), labels=["all" if layer is None else str(layer) for layer in groups]
        )
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("changed layer")
        axes.set_ylabel(YLABEL)
        axes.set_xlim(-0.6, max(len(groups), 2) - 0.4)
        figure.legend(
            loc="outside upper left",
            ncols=1 if len(names) > 2 else 2,
            borderaxespad=0.1,
            columnspacing=1.2,
        )
        return Drawing.from_figure(figure)


def _groups(rows: Sequence[Outcome]) -> list[int | None]:
    """The layers to show, after None for all of them at once if there is such an outcome."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    shown = {int(i): None for i in np.linspace(0, len(layers) - 1, MAX_LAYERS)} if layers else {}
    return [None] * any(row.layer is None for row in rows) + [layers[i] for i in shown]


def _draw_line(
    rows: Sequence[Outcome], labels: Sequence[str], xlabel: str, trained: float | None = None
) -> Drawing:
    """Changes against settings, at equal distances."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.45)
        places = np.arange(len(rows))
        axes.axhline(0, color=GREY, lw=1, ls=(0, (2, 2)), label="as trained")
        for place, row in enumerate(rows):
            if row.setting == trained:
                axes.axvline(place, color=GREY, lw=1, ls=(0, (2, 2)))
        axes.errorbar(
            places, [row.change for row in rows], [2 * row.standard_error for row in rows],
            color=BLUE, marker="o", ms=4.5, mec="white", mew=0.7, elinewidth=1, capsize=2.5, label="changed",
        )  # fmt: skip
        shown = places[:: -(-len(rows) // MAX_TICKS)]
        axes.set_xticks(shown, labels=[labels[place] for place in shown])
        axes.set_xlim(-0.4, max(len(rows), 2) - 0.6)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(YLABEL)
        figure.legend(loc="outside upper left", ncols=2, borderaxespad=0.1, columnspacing=1.2)
        return Drawing.from_figure(figure)


def _mark_cells(axes: Axes, change_NE: np.ndarray, error_NE: np.ndarray, limit: float) -> None:
    """Numbers where there is room for them, and dots where there may be nothing but noise."""
    if change_NE.size > MAX_DOTTED:
        return
    is_noise_NE = ~(np.abs(change_NE) > 2 * error_NE) & ~np.isnan(
        change_NE
    )  # one row has no standard error
    if change_NE.shape[1] > MAX_WRITTEN:
        layers, experts = np.nonzero(is_noise_NE)
        axes.plot(experts, layers, ".", color="#111111", ms=2.5)
        return
    for layer, expert in np.argwhere(~np.isnan(change_NE)):
        change, dot = change_NE[layer, expert], "·" if is_noise_NE[layer, expert] else ""
        axes.text(
            expert, layer, f"{change:+.{2 if limit >= 0.095 else 3}f}{dot}",
            ha="center", va="center", fontsize=8.5, color="white" if abs(change) > 0.65 * limit else "#111111",
        )  # fmt: skip


def _label_layers(axes: Axes, layers: Sequence[int]) -> None:
    shown = range(0, len(layers), -(-len(layers) // 16))
    axes.set_yticks(shown, labels=[str(layers[i]) for i in shown])


def _setting(row: Outcome) -> float:
    return row.setting or 0.0
