"""Figures of what experts specialise in: the attributes that tell routing, and the domains that experts take."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moejax.inspection.analysis.information import Information
from moejax.inspection.figures.style import (
    BLUE,
    COLORS,
    DEAD,
    GREY,
    STYLE,
    Drawing,
    color_bar,
    heat_map,
    legend_name,
    new_figure,
    ratio_bar,
)

MAX_DOMAINS = 24
MAX_WRITTEN = 8  # columns of cells with numbers
NO_VALUE = "#9ca3af"


def draw_information(results: Sequence[Information]) -> Drawing:
    """Draws how much of the routing each attribute tells, as bars: the mean over layers, and a dot for each layer.

    A bar is the plug-in estimate over the entropy of experts; its grey hatched part is what chance
    alone would show.

    Args:
      results: of one model; at least one.
    """
    names = [information_name(result) for result in results]
    whole = [_share(result.information_N, result) for result in results]
    chance = [_share(result.baseline_N, result) for result in results]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.95 + 0.27 * len(results))
        rows = np.arange(len(results))
        axes.barh(
            rows, [x.mean() for x in whole], height=0.66, color=BLUE, label="told by the attribute"
        )
        axes.barh(
            rows, [x.mean() for x in chance], height=0.66, color="#d1d5db", hatch="////", edgecolor=GREY, lw=0,
            label="chance",
        )  # fmt: skip
        for row, shares in enumerate(whole):
            axes.plot(
                shares, np.full(len(shares), row), "o", color="#111111", ms=2.6, mew=0, zorder=3
            )
        axes.plot([], [], "o", color="#111111", ms=2.6, mew=0, label="a layer")
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
    """Draws what each attribute tells above chance in each layer, a row an attribute: share of the experts' entropy.

    Args:
      results: of one model; at least one.
      layers: model layer of each MoE layer.
    """
    share_AN = np.stack([result.share_N for result in results])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.95 + 0.27 * len(results))
        colors = matplotlib.colormaps["cividis"].resampled(COLORS).with_extremes(bad=NO_VALUE)
        top = max(float(share_AN.max()), 0.01)
        mesh = heat_map(axes, np.maximum(share_AN, 0.0), cmap=colors, norm=Normalize(0, top))
        if len(layers) <= MAX_WRITTEN:
            _write(
                axes, share_AN, "{:.0%}", lambda share: "white" if share < 0.6 * top else "#111111"
            )
        axes.set_yticks(
            range(len(results)), labels=[information_name(result) for result in results]
        )
        _name_columns(axes, layers)
        axes.set_xlabel("layer")
        color_bar(
            figure,
            axes,
            mesh,
            "above chance",
            format=PercentFormatter(1.0, decimals=0),
            ticks=MaxNLocator(4),
        )
        return Drawing.from_figure(figure)


def draw_domains(
    share_DE: Float[np.ndarray, "D E"], uniform: float, domains: Sequence[str]
) -> Drawing:
    """Draws how often tokens of each domain visit each expert of a layer, over the level of uniform routing.

    White is that level, red above, blue below, black never; grey is a domain without tokens.
    Logarithmic.

    Args:
      share_DE: of `domain_specialisation`, one layer.
      uniform: of the same.
      domains: names; of more than `MAX_DOMAINS`, the first are drawn.
    """
    ratio_DE = share_DE[:MAX_DOMAINS] / uniform
    log_DE = np.log2(ratio_DE, out=np.full_like(ratio_DE, np.nan), where=ratio_DE > 0)
    log_DE = np.where(ratio_DE > 0, np.clip(log_DE, -2, 2), np.where(ratio_DE == 0, -99.0, np.nan))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.95 + 0.2 * len(log_DE))
        colors = (
            matplotlib.colormaps["RdBu_r"].resampled(COLORS).with_extremes(bad=NO_VALUE, under=DEAD)
        )
        mesh = heat_map(axes, log_DE, cmap=colors, norm=Normalize(-2, 2))
        axes.set_yticks(range(len(log_DE)), labels=[_short(name) for name in domains[:MAX_DOMAINS]])
        axes.set_xlabel("expert")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ratio_bar(figure, axes, mesh, "share / uniform")
        return Drawing.from_figure(figure)


def information_name(result: Information) -> str:
    """The attribute, its condition, and what the baseline permuted if that was documents."""
    name = result.attribute if result.given is None else f"{result.attribute} | {result.given}"
    return name if result.over == "tokens" else f"{name} ({result.over})"


def _share(bits_N: np.ndarray, result: Information) -> np.ndarray:
    return np.divide(
        bits_N, result.entropy_N, out=np.zeros_like(bits_N), where=result.entropy_N > 1e-9
    )


def _write(axes: Axes, values: np.ndarray, form: str, color) -> None:
    for row, column in np.ndindex(values.shape):
        value = float(values[row, column])
        axes.text(
            column,
            row,
            form.format(value),
            ha="center",
            va="center",
            fontsize=8.5,
            color=color(value),
        )


def _name_columns(axes: Axes, layers: Sequence[int]) -> None:
    shown = range(0, len(layers), -(-len(layers) // 8))
    axes.set_xticks(shown, labels=[str(layers[i]) for i in shown])


def _short(name: str) -> str:
    name = legend_name(name)
    return name if len(name) <= 18 else f"{name[:17]}…"
