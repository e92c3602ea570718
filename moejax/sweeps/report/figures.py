"""Figures of a sweep: effects of one axis and of two, and all settings at once."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.inspection.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    STYLE,
    WIDTH,
    Drawing,
    color_bar,
    legend_name,
    new_figure,
    short_number,
)
from moejax.sweeps.report.effects import AxisEffect, Level
from moejax.sweeps.report.scale import Scale, level_name, scale_of
from moejax.sweeps.tables import key_of

COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#8c6d1f", "#111111")
DASHES = ("-", "--", "-.", ":") * 2
MARKERS = "osD^vPX*"
MAX_LINES = len(COLORS)  # levels of the second axis of an interaction
LEGEND_LETTERS = 46  # side by side in a figure's width
AXIS_WIDTH = 1.9  # inches between two axes of `draw_parallel`
COLOR_MAP = "viridis"
NAME_LETTERS = 17
TICK_LETTERS = 14
NEIGHBOUR_LETTERS = 16  # of names side by side, in the mean
INTERVAL: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 5, "elinewidth": 1.2, "capsize": 3}
TOLD_APART: dict[str, Any] = {"color": BLUE, "label": "told apart from it"}
MAY_BE_NOISE: dict[str, Any] = {"color": GREY, "mfc": "white", "label": "may be noise"}


def draw_effect(effect: AxisEffect, axis: str, metric: str) -> Drawing:
    """Draws the difference of each level from the reference, with its 95 % interval.

    A difference whose interval holds zero is grey and hollow, so that it does not look
    like an effect. The reference is a line at zero.

    Args:
      effect: with at least one difference over several seeds; others are left out.
      axis: name of the axis.
      metric: quantity and unit.
    """
    known = [level for level in effect.others if level.difference.num_seeds > 1]
    scale = scale_of(level.level for level in effect.levels)
    (zero,) = scale.places([effect.reference])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(_height(scale) + 0.25)
        line = axes.axvline if scale.is_named else axes.axhline
        line(0, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
        reference = [[0.0], [zero]] if scale.is_named else [[zero], [0.0]]
        axes.plot(*reference, "D", color="#111111", ms=5, label="reference")
        for marks in (TOLD_APART, MAY_BE_NOISE):
            is_told_apart = marks is TOLD_APART
            shown = [level for level in known if level.difference.is_told_apart == is_told_apart]
            if shown:
                _draw_differences(axes, scale, shown, marks)
        figure.legend(
            loc="outside upper left",
            ncols=3,
            borderaxespad=0.1,
            columnspacing=1.0,
            handletextpad=0.4,
        )
        _label(axes, scale, axis, metric)
        return Drawing.from_figure(figure)


def _draw_differences(
    axes: Axes, scale: Scale, levels: Sequence[Level], marks: Mapping[str, Any]
) -> None:
    """Draws differences as points with intervals, along the axis that has room for names."""
    places = scale.places(level.level for level in levels)
    differences = [level.difference for level in levels]
    means = np.array([difference.mean for difference in differences])
    ends = np.array([difference.high for difference in differences])
    reach = ends - means
    if scale.is_named:
        axes.errorbar(means, places, xerr=reach, **INTERVAL, **marks)
    else:
        axes.errorbar(places, means, yerr=reach, **INTERVAL, **marks)


def draw_interaction(
    means: pd.DataFrame, axis: str, other: str, metric: str, order: Sequence[Any]
) -> Drawing:
    """Draws a metric by the levels of two axes: lines that are not parallel are an interaction.

    Args:
      means: of `sweep_effects.interaction`; a column is a line, at most `MAX_LINES`.
      axis: name of the index.
      other: name of the columns.
      metric: quantity and unit.
      order: all levels of the columns' axis in the sweep: a level has one colour in all figures.
    """
    scale = scale_of(means.index)
    places = scale.places(means.index)
    style_of = {key_of(level): i % MAX_LINES for i, level in enumerate(order)}
    labels = [level_name(level) for level in means.columns]
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(_height(scale) + 0.5)
        for column, level in enumerate(means.columns):
            i = style_of[key_of(level)]
            values = means.iloc[:, column].to_numpy(np.float64)
            points = (values, places) if scale.is_named else (places, values)
            axes.plot(
                *points,
                color=COLORS[i],
                ls=DASHES[i],
                marker=MARKERS[i],
                ms=5,
                label=labels[column],
            )
        longest = max(len(label) for label in labels)
        num_columns = min(len(labels), LEGEND_LETTERS // (longest + 6))
        figure.legend(
            loc="outside upper left",
            ncols=max(1, num_columns),
            borderaxespad=0.1,
            columnspacing=1.2,
            title=_name(other, 40),
            alignment="left",
            title_fontsize=9,
        )
        _label(axes, scale, axis, metric)
        return Drawing.from_figure(figure)


def _height(scale: Scale) -> float:
    """Returns inches of a figure; levels with names stand below one another."""
    if not scale.is_named:
        return 2.45
    return float(np.clip(1.0 + 0.3 * len(scale.levels), 1.6, 4.6))


def _label(axes: Axes, scale: Scale, axis: str, metric: str) -> None:
    """Labels both axes; levels with names stand below one another, where there is room for them."""
    name = _name(axis, 40)
    if scale.is_named:
        num_levels = len(scale.levels)
        has_room = num_levels > 3 or len(name) < 18
        scale.label(axes.yaxis)
        axes.set_ylim(num_levels - 0.5, -0.5)
        axes.set_ylabel(name if has_room else "")
        axes.set_xlabel(metric)
    else:
        scale.label(axes.xaxis)
        axes.margins(x=0.08)
        axes.set_xlabel(f"{name} (logarithmic)" if scale.kind == "log" else name)
        axes.set_ylabel(metric)
    of_metric = axes.xaxis if scale.is_named else axes.yaxis
    of_metric.set_major_locator(MaxNLocator(5))
    of_metric.set_major_formatter(FuncFormatter(_tick_label))


def _tick_label(value: float, _: int | None) -> str:
    """Returns a number of a metric's axis; the second argument is its place among the ticks."""
    return f"{value:.4g}" if abs(value) < 10_000 else short_number(value)


def _name(name: str, most: int = NAME_LETTERS) -> str:
    """Returns a name, or the end of a long one, which says more than its beginning."""
    name = legend_name(name)
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def draw_parallel(
    settings: pd.DataFrame, axes_names: Mapping[str, str], metric: str, label: str
) -> Drawing:
    """Draws each setting as a line through its levels and its metric, in the colour of the metric.

    A line stops where an axis is not set. The first setting is drawn last and thick.

    Args:
      settings: a row a setting, the best first; the metric is finite, with at least two
        different values.
      axes_names: names of the axes, by column.
      metric: a column.
      label: of the metric.
    """
    values_S = settings[metric].to_numpy(np.float64)
    metric_levels = sorted(set(values_S))
    scale_of_column = {axis: scale_of(settings[axis]) for axis in axes_names}
    scale_of_column[metric] = Scale(tuple(metric_levels), "linear")
    scales = list(scale_of_column.values())
    lines = _lines(settings, scale_of_column)
    norm = Normalize(float(values_S.min()), float(values_S.max()))
    with matplotlib.rc_context(STYLE):
        figure = _wide_figure(len(scales))
        axes = figure.add_subplot()
        num_thin = len(lines) - 1
        # Drawn from the last to the first, so that setting 1 lies on top.
        collection = LineCollection(
            lines[::-1],
            cmap=COLOR_MAP,
            norm=norm,
            array=values_S[::-1],
            alpha=0.85,
            linewidths=[1.1] * num_thin + [3.2],
        )
        axes.add_collection(collection)
        _draw_scales(axes, scales, [*axes_names.values(), label])
        mesh = ScalarMappable(norm, COLOR_MAP)
        color_bar(figure, axes, mesh, label)
        return Drawing.from_figure(figure)


def _wide_figure(num_scales: int) -> Figure:
    """Returns an empty figure with room between the axes of `draw_parallel`."""
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
    width = max(WIDTH, 0.9 + AXIS_WIDTH * (num_scales - 1) + 0.9)
    return Figure(figsize=(width, 3.4), dpi=144, facecolor="none", layout=layout)


def _lines(settings: pd.DataFrame, scales: Mapping[str, Scale]) -> list[np.ndarray]:
    """Returns a line for each setting, as points `[axis, height]`."""
    heights = []
    for column, scale in scales.items():
        places_S = scale.places(settings[column])
        heights.append(_unit(scale, places_S))
    numbers = np.arange(len(heights))
    by_setting = np.column_stack(heights)
    return [np.column_stack([numbers, row]) for row in by_setting]


def _unit(scale: Scale, places: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"]:
    """Returns places on an axis from 0 to 1; the only level is in the middle."""
    ends = scale.places(scale.levels)
    lowest = ends.min()
    span = ends.max() - lowest
    if span:
        from_lowest = places - lowest
        return from_lowest / span
    is_set = np.isfinite(places)
    return np.where(is_set, 0.5, np.nan)


def _draw_scales(axes: Axes, scales: Sequence[Scale], names: Sequence[str]) -> None:
    """Draws the axes of `draw_parallel`; names that would touch are alternately high and low."""
    is_tight = _would_touch(names)
    for i, (scale, name) in enumerate(zip(scales, names, strict=True)):
        axes.plot([i, i], [0, 1], color=GREY, lw=1, zorder=3)
        _draw_ticks(axes, scale, i)
        suffix = "\n(logarithmic)" if scale.kind == "log" else ""
        is_high = is_tight and i % 2
        axes.text(
            i,
            1.22 if is_high else 1.06,
            _name(name) + suffix,
            va="bottom",
            ha="center",
            fontsize=9,
            linespacing=1.1,
        )
    axes.set_xlim(-0.35, len(scales) - 0.35)
    axes.set_ylim(-0.05, 1.42 if is_tight else 1.25)
    axes.axis("off")


def _would_touch(names: Sequence[str]) -> bool:
    """Returns whether two names side by side are too long for their axes."""
    lengths = [min(len(name), NAME_LETTERS) for name in names]
    pairs = itertools.pairwise(lengths)
    return any(one + other > 2 * NEIGHBOUR_LETTERS for one, other in pairs)


def _draw_ticks(axes: Axes, scale: Scale, i: int) -> None:
    """Draws the ticks of the axis at x = i, with labels on its right."""
    background = {
        "boxstyle": "round,pad=0.12",
        "facecolor": "white",
        "edgecolor": "none",
        "alpha": 0.8,
    }
    ticks = scale.ticks()
    heights = _unit(scale, np.array([place for place, _ in ticks]))
    for height, (_, text) in zip(heights, ticks, strict=True):
        axes.plot([i - 0.02, i + 0.02], [height, height], color=GREY, lw=1, zorder=3)
        if len(text) > TICK_LETTERS:
            text = f"{text[: TICK_LETTERS - 1]}…"
        axes.text(
            i + 0.05,
            height,
            text,
            va="center",
            ha="left",
            fontsize=8.5,
            zorder=4,
            bbox=background,
        )
