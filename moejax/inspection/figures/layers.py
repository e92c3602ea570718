"""Figures of one number per MoE layer over time: MaxVio, entropies, saturation, churn."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int

from moejax.inspection.figures.run import downsample
from moejax.inspection.figures.style import (
    COLORS,
    GREY,
    STYLE,
    Drawing,
    color_bar,
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
NO_VALUE = "#9ca3af"


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
    """Draws one number per layer over time: lines, or for more than `MAX_LINES` layers a heat map, a layer a row.

    Lines go from dark blue over purple to orange with the layer; neighbours also differ in dash.

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
        colors = layer_colors(len(layers))
        bad = None if worst is None else worst_layer(values_SN, worst)
        for n, layer in enumerate(layers):
            x, values = downsample(steps, values_SN[:, n], points=MAX_POINTS)
            axes.plot(
                x, values, color=colors[n], ls=DASHES[n % len(DASHES)], lw=2.8 if n == bad else 1.5,
                marker="o" if len(steps) <= 12 else None, ms=3, label=f"layer {layer}" + ", worst" * (n == bad),
                clip_on=False, zorder=2.6,
            )  # fmt: skip
        if reference is not None:
            axes.axhline(reference[0], color=GREY, lw=1, ls=(0, (2, 2)), label=reference[1])
        if from_zero:
            axes.set_ylim(bottom=min(0.0, float(np.nanmin(values_SN, initial=0))))
        axes.set_ylabel(label)
        label_steps(axes)
        if is_measured:
            tick_at(axes, steps)
        figure.legend(loc="outside upper left", ncols=3, borderaxespad=0.1, columnspacing=1.0)
        return Drawing.from_figure(figure)


def layer_colors(num_layers: int) -> np.ndarray:
    """Colours of layers in their order, from dark to bright, `[N, 4]`: colour-blind readers see the order, too."""
    return np.asarray(matplotlib.colormaps["plasma"](np.linspace(0, BRIGHTEST, num_layers)))


def _draw_map(
    steps: Int[np.ndarray, "S"],
    values_SN: Float[np.ndarray, "S N"],
    layers: Sequence[int],
    label: str,
    from_zero: bool,
) -> Drawing:
    edges, values_CN = mean_columns(steps, values_SN)
    figure, axes = new_figure(float(np.clip(1.2 + 0.05 * len(layers), 2.0, 4.4)))
    colors = matplotlib.colormaps["cividis"].resampled(COLORS).with_extremes(bad=NO_VALUE)
    mesh = heat_map(axes, values_CN.T, edges, cmap=colors)
    if from_zero and np.nanmin(values_SN, initial=0) >= 0:
        mesh.set_clim(vmin=0)
    axes.set_ylabel("layer")
    name_rows(axes, layers)
    label_steps(axes)
    color_bar(figure, axes, mesh, label, format=lambda x, _: short_number(x))
    return Drawing.from_figure(figure)


def worst_layer(
    values_SN: Float[np.ndarray, "S N"], worst: Callable[[np.ndarray], float]
) -> int | None:
    """The first column that ends without a finite value, else that whose last value is the `worst`.

    None if no value is finite.
    """
    last_N = last_values(values_SN)
    if np.isnan(last_N).all():
        return None
    is_lost_N = ~np.isfinite(values_SN[-1]) & ~np.isnan(last_N)
    return int(np.flatnonzero(is_lost_N if is_lost_N.any() else last_N == worst(last_N))[0])


def last_values(values_SN: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N"]:
    """The last finite value of each column, NaN where there is none."""
    last_N = np.full(values_SN.shape[1], np.nan)
    for n, values_S in enumerate(values_SN.T):
        finite = values_S[np.isfinite(values_S)]
        if finite.size:
            last_N[n] = finite[-1]
    return last_N


def mean_columns(
    steps: Int[np.ndarray, "S"], values_SN: Float[np.ndarray, "S N"], num_columns: int = MAX_COLUMNS
) -> tuple[np.ndarray, np.ndarray]:
    """Edges in steps of few enough columns, and the means of the finite values in each; NaN where there are none."""
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else 0
    starts = np.linspace(0, len(steps), min(len(steps), num_columns), endpoint=False).astype(int)
    ends = np.append(starts[1:], len(steps)) - 1
    is_finite_SN = np.isfinite(values_SN)
    number_CN = np.add.reduceat(is_finite_SN, starts, axis=0, dtype=np.int64)
    total_CN = np.add.reduceat(np.where(is_finite_SN, values_SN, 0.0), starts, axis=0)
    mean_CN = np.divide(
        total_CN, number_CN, out=np.full(total_CN.shape, np.nan), where=number_CN > 0
    )
    return np.append(min(max(first, 0), steps[0] - 1), steps[ends]).astype(float), mean_CN
