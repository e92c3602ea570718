"""Figures of one number per MoE layer over time: MaxVio, entropies, saturation, churn."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from moejax.inspection.figures.columns import mean_columns
from moejax.inspection.figures.curves import downsample
from moejax.inspection.figures.style import (
    GREY,
    NO_VALUE,
    STYLE,
    Drawing,
    color_bar,
    heat_colors,
    heat_map,
    label_steps,
    name_rows,
    new_figure,
    short_number,
    tick_at,
)

MAX_LINES = 8  # layers drawn as lines; of more, a heat map
MAX_COLUMNS = 160  # of it
MAX_POINTS = 200  # of a line
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (2, 1)))
BRIGHTEST = 0.78  # of the colour map: yellow would be too pale on white


def draw_layers(
    steps: Int[np.ndarray, "S"],
    values_SN: Float[np.ndarray, "S N"],
    layers: Sequence[int],
    label: str,
    *,
    worst: Callable[[np.ndarray], float] | None = None,
    reference: tuple[float, str] | None = None,
    from_zero: bool = True,
    is_measured: bool = False,
) -> Drawing:
    """Draws one number per layer over time.

    As lines, or for more than `MAX_LINES` layers as a heat map, a layer a row. Lines go from dark
    blue over purple to orange with the layer; neighbours also differ in dash.

    Args:
      steps: of training; at least one.
      values_SN: NaN leaves a gap.
      layers: model layer of each column.
      label: quantity and unit.
      worst: `np.nanmax` or `np.nanmin`: the layer that has it at the end is drawn thick;
        None marks none.
      reference: a level to compare with, and its name; of lines only.
      from_zero: start the scale at 0.
      is_measured: the steps are those of evaluations, which the axis names.
    """
    with matplotlib.rc_context(STYLE):
        if len(layers) > MAX_LINES:
            return _draw_map(steps, values_SN, layers, label, from_zero)
        figure, axes = new_figure(2.55)
        marked = None if worst is None else worst_layer(values_SN, worst)
        _draw_lines(axes, steps, values_SN, layers, marked)
        if reference is not None:
            level, name = reference
            axes.axhline(level, color=GREY, lw=1, ls=(0, (2, 2)), label=name)
        if from_zero:
            lowest = float(np.nanmin(values_SN, initial=0))
            axes.set_ylim(bottom=min(0.0, lowest))
        axes.set_ylabel(label)
        label_steps(axes)
        if is_measured:
            tick_at(axes, steps)
        figure.legend(loc="outside upper left", ncols=3, borderaxespad=0.1, columnspacing=1.0)
        return Drawing.from_figure(figure)


def _draw_lines(
    axes: Axes,
    steps: Int[np.ndarray, "S"],
    values_SN: Float[np.ndarray, "S N"],
    layers: Sequence[int],
    marked: int | None,
) -> None:
    """Draws a line for each layer; the marked one is thick."""
    colors = layer_colors(len(layers))
    marker = "o" if len(steps) <= 12 else None
    for n, layer in enumerate(layers):
        is_marked = n == marked
        x, values = downsample(steps, values_SN[:, n], points=MAX_POINTS)
        axes.plot(
            x,
            values,
            color=colors[n],
            ls=DASHES[n % len(DASHES)],
            lw=2.8 if is_marked else 1.5,
            marker=marker,
            ms=3,
            label=f"layer {layer}, worst" if is_marked else f"layer {layer}",
            clip_on=False,
            zorder=2.6,
        )


def layer_colors(num_layers: int) -> np.ndarray:
    """Returns colours of layers in their order, from dark to bright, `[N, 4]`.

    Colour-blind readers see the order, too.
    """
    places_N = np.linspace(0, BRIGHTEST, num_layers)
    return np.asarray(matplotlib.colormaps["plasma"](places_N))


def _draw_map(
    steps: Int[np.ndarray, "S"],
    values_SN: Float[np.ndarray, "S N"],
    layers: Sequence[int],
    label: str,
    from_zero: bool,
) -> Drawing:
    """Draws a heat map, a layer a row."""
    edges, values_CN = mean_columns(steps, values_SN, MAX_COLUMNS)
    height = np.clip(1.2 + 0.05 * len(layers), 2.0, 4.4)
    figure, axes = new_figure(float(height))
    colors = heat_colors("cividis", bad=NO_VALUE)
    mesh = heat_map(axes, values_CN.T, edges, cmap=colors)
    if from_zero and np.nanmin(values_SN, initial=0) >= 0:
        mesh.set_clim(vmin=0)
    axes.set_ylabel("layer")
    name_rows(axes, layers)
    label_steps(axes)
    color_bar(figure, axes, mesh, label, format=lambda x, _: short_number(x))
    return Drawing.from_figure(figure)


def worst_layer(
    values_SN: Float[np.ndarray, "S N"],
    worst: Callable[[np.ndarray], float],
) -> int | None:
    """Returns the first column that ends without a finite value, else that with the `worst` end.

    None if no value is finite.
    """
    last_N = last_values(values_SN)
    had_values_N = ~np.isnan(last_N)
    if not had_values_N.any():
        return None
    is_finite_N = np.isfinite(values_SN[-1])
    is_marked_N = had_values_N & ~is_finite_N
    if not is_marked_N.any():
        is_marked_N = last_N == worst(last_N)
    return int(np.argmax(is_marked_N))


def last_values(values_SN: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N"]:
    """Returns the last finite value of each column, NaN where there is none."""
    num_layers = values_SN.shape[1]
    last_N = np.full(num_layers, np.nan)
    for n, values_S in enumerate(values_SN.T):
        is_finite_S = np.isfinite(values_S)
        finite_s = values_S[is_finite_S]
        if finite_s.size:
            last_N[n] = finite_s[-1]
    return last_N
