"""Figures of what experts specialise in: attributes that explain routing, and domains."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moejax.inspection.analysis.information import Information, ratio_or_zero
from moejax.inspection.figures.style import (
    BLUE,
    GREY,
    NO_VALUE,
    STYLE,
    Drawing,
    color_bar,
    every_nth,
    heat_colors,
    heat_map,
    legend_name,
    log_ratio,
    new_figure,
    ratio_bar,
    ratio_colors,
    write_in_cell,
)

MAX_DOMAINS = 24
MAX_WRITTEN = 8  # columns of cells with numbers
DOTS: dict[str, Any] = {"color": "#111111", "ms": 2.6, "mew": 0}
HATCHED: dict[str, Any] = {
    "color": "#d1d5db",
    "hatch": "////",
    "edgecolor": GREY,
    "lw": 0,
}


def draw_information(results: Sequence[Information]) -> Drawing:
    """Draws how much of the routing each attribute explains, as bars.

    A bar is the mean over layers of the plug-in estimate over the entropy of experts, with a dot
    for each layer; its grey hatched part is what chance alone would show.

    Args:
      results: of one model; at least one.
    """
    names = [information_name(result) for result in results]
    shares = [ratio_or_zero(result.information_N, result.entropy_N) for result in results]
    chances = [ratio_or_zero(result.baseline_N, result.entropy_N) for result in results]
    mean_shares = [share_N.mean() for share_N in shares]
    mean_chances = [chance_N.mean() for chance_N in chances]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.95 + 0.27 * len(results))
        rows = np.arange(len(results))
        axes.barh(rows, mean_shares, height=0.66, color=BLUE, label="explained by the attribute")
        axes.barh(rows, mean_chances, height=0.66, label="chance", **HATCHED)
        for row, share_N in enumerate(shares):
            rows_N = np.full(len(share_N), row)
            axes.plot(share_N, rows_N, "o", zorder=3, **DOTS)
        axes.plot([], [], "o", label="a layer", **DOTS)
        axes.set_yticks(rows, labels=names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("share of the experts' entropy")
        figure.legend(
            loc="outside upper left",
            ncols=3,
            borderaxespad=0.1,
            columnspacing=1.0,
            handlelength=1.2,
        )
        return Drawing.from_figure(figure)


def draw_information_by_layer(results: Sequence[Information], layers: Sequence[int]) -> Drawing:
    """Draws what each attribute explains above chance in each layer, an attribute a row.

    Cells are shares of the experts' entropy.

    Args:
      results: of one model; at least one.
      layers: model layer of each MoE layer.
    """
    share_AN = np.stack([result.share_N for result in results])
    positive_AN = np.maximum(share_AN, 0.0)
    names = [information_name(result) for result in results]
    top = max(float(share_AN.max()), 0.01)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.95 + 0.27 * len(results))
        colors = heat_colors("cividis", bad=NO_VALUE)
        mesh = heat_map(axes, positive_AN, cmap=colors, norm=Normalize(0, top))
        if len(layers) <= MAX_WRITTEN:
            _write_shares(axes, share_AN, top)
        axes.set_yticks(range(len(results)), labels=names)
        _name_columns(axes, layers)
        axes.set_xlabel("layer")
        percent = PercentFormatter(1.0, decimals=0)
        color_bar(figure, axes, mesh, "above chance", format=percent, ticks=MaxNLocator(4))
        return Drawing.from_figure(figure)


def _write_shares(axes: Axes, share_AN: np.ndarray, top: float) -> None:
    """Writes every share into its cell; `top` is the brightest."""
    for row, column in np.ndindex(share_AN.shape):
        share = float(share_AN[row, column])
        is_dark = share < 0.6 * top
        write_in_cell(axes, row, column, f"{share:.0%}", is_dark=is_dark)


def draw_domains(
    share_DE: Float[np.ndarray, "D E"],
    uniform: float,
    domains: Sequence[str],
) -> Drawing:
    """Draws how often tokens of each domain visit each expert of a layer, over uniform routing.

    White is that level, red above, blue below, black never; grey is a domain without tokens.
    Logarithmic.

    Args:
      share_DE: of `domain_specialisation`, one layer.
      uniform: of the same.
      domains: names; of more than `MAX_DOMAINS`, the first are drawn.
    """
    ratio_DE = share_DE[:MAX_DOMAINS] / uniform
    log_DE = log_ratio(ratio_DE)
    num_domains = len(log_DE)
    names = [_short(name) for name in domains[:MAX_DOMAINS]]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.95 + 0.2 * num_domains)
        mesh = heat_map(axes, log_DE, cmap=ratio_colors(), norm=Normalize(-2, 2))
        axes.set_yticks(range(num_domains), labels=names)
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ratio_bar(figure, axes, mesh, "share / uniform")
        return Drawing.from_figure(figure)


def information_name(result: Information) -> str:
    """Returns the attribute, its condition, and what the baseline permuted if not tokens."""
    name = result.attribute
    if result.given is not None:
        name = f"{name} | {result.given}"
    if result.over == "tokens":
        return name
    return f"{name} ({result.over})"


def _name_columns(axes: Axes, layers: Sequence[int]) -> None:
    """Names evenly spaced layers below their columns."""
    places = every_nth(len(layers), 8)
    labels = [str(layers[place]) for place in places]
    axes.set_xticks(places, labels=labels)


def _short(name: str) -> str:
    """Returns a name of 18 characters at most."""
    name = legend_name(name)
    if len(name) <= 18:
        return name
    return f"{name[:17]}…"
