"""Figures of a run, in one style; each is a `Drawing`: a data URI for a page, saved as .svg or .png.

Titles are left to the page, where they can be read, searched and scaled. Loads are in ColorBrewer's
red-blue, which colour-blind readers can tell apart.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moejax.inspection.figures.axes import AXES
from moejax.inspection.figures.style import (
    BLUE,
    COLORS,
    DEAD,
    GREY,
    LINES,
    ORANGE,
    STYLE,
    Drawing,
    heat_map,
    label_steps,
    new_figure,
    ratio_bar,
    short_number,
    tick_at,
)  # fmt: skip
from moejax.training.health.speed import MEMORY, MFU, SPEED

MAX_POINTS = 600  # per curve: more cannot be told apart
MAX_COLUMNS = 200  # of a heat map,
MAX_CELLS = 8_000  # and of its columns times experts: noise does not compress


@dataclasses.dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
      label: for the legend, which a chart with a single curve does without.
      steps: x, in steps or in another of `axes.AXES`.
      values: y; NaN leaves a gap.
      points: draw markers above the lines instead of a line: few values, such as evaluations.
    """

    label: str
    steps: Int[np.ndarray, "S"] | Float[np.ndarray, "S"]
    values: Float[np.ndarray, "S"]
    points: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Metrics that belong in one figure, and how to read it.

    Attributes:
      title: heading.
      keys: metric name and legend label of each curve; those of evaluations are drawn as points.
      ylabel: quantity and unit.
      reading: what it means and what is good.
      reference: a level to compare with, and its name.
      from_zero: start the y axis at 0.
      is_speed: the number beside the figure is the median over logging intervals, not
        the last value.
    """

    title: str
    keys: Sequence[tuple[str, str]]
    ylabel: str
    reading: str
    reference: tuple[float, str] | None = None
    from_zero: bool = False
    is_speed: bool = False


LOSS_CHARTS = (
    Chart(
        "Language-model loss",
        (("loss/lm", "training"), ("eval/loss", "validation")),
        "nats per token",
        "Cross-entropy of the next token. Good: falling. Validation rising while training falls is overfitting.",
    ),
    Chart(
        "Total loss",
        (("loss/total", "total"), ("loss/lm", "language model")),
        "nats per token",
        "What is minimised: the language-model loss plus the weighted auxiliary losses, which are the gap between the "
        "lines.",
    ),
    Chart(
        "Weighted auxiliary losses",
        (("loss/balance_weighted", "balance"), ("loss/z_weighted", "router z")),
        "added to the total",
        "What each auxiliary loss adds to the total. Good: small beside the language-model loss.",
        from_zero=True,
    ),
    Chart(
        "Balance loss",
        (("loss/balance", "balance"),),
        "before weighting",
        "1 when the load is uniform; above 1, the router prefers experts that are already busy. Good: close to 1.",
        reference=(1.0, "uniform"),
    ),
    Chart(
        "Router z-loss",
        (("loss/z", "router z"),),
        "before weighting",
        "Mean squared log-sum-exp of the router's logits; large logits make training unstable. Good: falling or flat.",
        from_zero=True,
    ),
)

SPEED_CHARTS = (
    Chart(
        "Tokens per second",
        ((SPEED, "tokens/s"),),
        "tokens/s",
        "Of each logging interval, without evaluation and saving. Good: flat.",
        from_zero=True,
        is_speed=True,
    ),
    Chart(
        "Model FLOPs utilisation",
        ((MFU, "MFU"),),
        "share of the devices' peak",
        "The arithmetic that the model asks for, over what its devices can do at most. Good: high; half is very good.",
        from_zero=True,
        is_speed=True,
    ),
    Chart(
        "Peak memory",
        ((MEMORY, "peak"),),
        "bytes of the fullest device",
        "The most that was in use at a time since the start of the process.",
        from_zero=True,
    ),
    Chart(
        "Learning rate",
        (("learning_rate", "learning rate"),),
        "learning rate",
        "The schedule as applied.",
    ),
    Chart(
        "Gradient norm",
        (("grad_norm", "gradient norm"),),
        "global norm",
        "Before clipping. Good: steady. Spikes that the loss follows suggest a lower learning rate.",
        from_zero=True,
    ),
)


def routing_charts(num_experts: int) -> tuple[Chart, ...]:
    """The charts of routing health; the entropies are compared with that of uniform routing, ln E."""
    uniform = (math.log(num_experts), f"uniform: ln {num_experts} = {math.log(num_experts):.2f}")
    return (
        Chart(
            "MaxVio",
            (("moe/max_violation", "MaxVio"),),
            "busiest / mean - 1",
            "How far the busiest expert is above the mean load: 0 is perfect balance, 1 is twice the mean. Good: below "
            "about 0.5 and falling.",
            from_zero=True,
        ),
        Chart(
            "Dead experts",
            (("moe/dead_experts", "dead experts"),),
            "experts",
            "Experts that got no token in the interval. Good: 0. One that stays dead is paid for and not used.",
            from_zero=True,
        ),
        Chart(
            "Entropy",
            (("moe/entropy", "router"), ("moe/load_entropy", "load")),
            "nats",
            "Router: how undecided it is about one token; it falls as experts specialise, and 0 means it no longer "
            "explores. Load: how evenly all tokens spread; good: close to the dotted line.",
            reference=uniform,
            from_zero=True,
        ),
        Chart(
            "Dropped assignments",
            (
                ("moe/dropped", "dropped"),
                ("moe/moved", "moved"),
                ("moe/dropped_out", "expert dropout"),
            ),
            "share of assignments",
            "Assignments that found their expert full and skipped it, or went to another. Good: 0, as it always is "
            "with dropless dispatch; a few percent are usual with a capacity limit. Expert dropout drops on purpose.",
            from_zero=True,
        ),
        Chart(
            "Routing churn",
            (("eval/routing_churn", "churn"),),
            "share of a token's experts",
            "Of the experts that tokens of held-out text visited at the evaluation before, how many they no longer "
            "visit. Good: falling, as routing settles.",
            from_zero=True,
        ),
    )


def draw_chart(
    chart: Chart, series: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> Drawing | None:
    """Draws a chart from a run's series.

    Args:
      chart: what to draw.
      series: metric name to (steps, values), as `Run.series`.

    Returns:
      An SVG data URI; None if no metric of the chart has values.
    """
    curves = [
        Curve(label, *series(key), points=key.startswith("eval/")) for key, label in chart.keys
    ]
    curves = [curve for curve in curves if curve.steps.size]
    if not curves:
        return None
    return draw_curves(curves, chart.ylabel, reference=chart.reference, from_zero=chart.from_zero)


def draw_curves(
    curves: Sequence[Curve], ylabel: str, *, reference: tuple[float, str] | None = None, from_zero: bool = False,
    axis: str = "steps",
) -> Drawing:  # fmt: skip
    """Draws curves over training steps, or over what these cost.

    Args:
      curves: at most four lines, and any points.
      ylabel: quantity and unit.
      reference: a level to compare with, and its name.
      from_zero: start the y axis at 0.
      axis: of `AXES`, what the curves' `steps` are.

    Returns:
      An SVG data URI.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(2.45)
        lines = iter(LINES)
        for curve in curves:
            if curve.points:
                marks: dict[str, Any] = {
                    "marker": "o",
                    "ms": 4.5,
                    "mec": "white",
                    "mew": 0.7,
                    "ls": "none",
                    "zorder": 3,
                }
                axes.plot(curve.steps, curve.values, color=ORANGE, label=curve.label, **marks)
                continue
            color, dash = next(lines)
            alone = (
                "o" if np.isfinite(curve.values).sum() == 1 else None
            )  # a line through one point shows nothing
            steps, values = downsample(curve.steps, curve.values)
            axes.plot(  # over the axis, so that a line at 0 shows
                steps,
                values,
                color=color,
                ls=dash,
                marker=alone,
                label=curve.label,
                clip_on=False,
                zorder=2.6,
            )
        if reference is not None:
            axes.axhline(reference[0], color=GREY, lw=1, ls=(0, (2, 2)), label=reference[1])
        if len(curves) + (reference is not None) > 1:
            figure.legend(loc="outside upper left", ncols=3, borderaxespad=0.1, columnspacing=1.2)
        if from_zero:
            is_flat = not any(np.nan_to_num(curve.values).any() for curve in curves)
            axes.set_ylim(0, 1 if is_flat else None)
        _label_values(axes, curves)
        axes.set_ylabel(ylabel)
        label_steps(axes, AXES[axis])
        if axis == "steps" and all(curve.points for curve in curves):
            tick_at(axes, np.concatenate([curve.steps for curve in curves]))
        return Drawing.from_figure(figure)


def only_value(values: Iterable[Float[np.ndarray, "S"]]) -> float | None:
    """The value that all curves have throughout, which a sentence says better than a chart; None if they have several.

    Args:
      values: of each curve; what is not finite says nothing.
    """
    finite = [values_S[np.isfinite(values_S)] for values_S in values]
    found = {
        float(extreme)
        for values_S in finite
        if values_S.size
        for extreme in (values_S.min(), values_S.max())
    }
    return found.pop() if len(found) == 1 else None


def draw_load_over_time(steps: Int[np.ndarray, "S"], counts_SE: Int[np.ndarray, "S E"]) -> Drawing:
    """Draws one layer's load over time as a heat map: an expert a row, its load over the uniform load as colour.

    Args:
      steps: end of each logging interval; at least one.
      counts_SE: assignments to each expert in each interval; long histories are summed over
        neighbouring intervals.

    Returns:
      An SVG data URI. White is a uniform load; the scale is logarithmic, so half and twice are
      equally strong; black is an expert that got nothing.
    """
    edges, counts_CE = _columns(steps, counts_SE)
    E = counts_CE.shape[1]
    ratio_CE = load_ratio(counts_CE)
    log_CE = np.log2(ratio_CE, out=np.full_like(ratio_CE, np.nan), where=ratio_CE > 0)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(float(np.clip(1.45 + 0.055 * E, 2.0, 4.6)))
        colors = matplotlib.colormaps["RdBu_r"].resampled(COLORS).with_extremes(bad=DEAD)
        mesh = heat_map(axes, log_CE.T, edges, cmap=colors, norm=Normalize(-2, 2))
        axes.set_ylabel("expert")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        label_steps(axes)
        ratio_bar(figure, axes, mesh, "load / uniform load")
        return Drawing.from_figure(figure)


def draw_final_load(counts_E: Int[np.ndarray, "E"]) -> Drawing:
    """Draws one layer's load as bars, over the uniform load; a cross marks an expert that got nothing.

    Args:
      counts_E: assignments to each expert over the last part of the run.

    Returns:
      An SVG data URI.
    """
    ratio_E = load_ratio(counts_E[None])[0]
    experts_E = np.arange(len(ratio_E))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(1.9)
        edges = (experts_E[:, None] + [-0.4, 0.4]).ravel()
        heights = np.stack([ratio_E, np.zeros_like(ratio_E)], axis=1).ravel()[
            :-1
        ]  # bars, and gaps between them
        axes.stairs(heights, edges, fill=True, color=BLUE)  # one path, however many experts
        axes.axhline(1, color=GREY, lw=1, ls=(0, (2, 2)))
        dead = experts_E[ratio_E == 0]
        axes.plot(
            dead, np.zeros(len(dead)), "x", color=ORANGE, ms=6, mew=1.8, clip_on=False, zorder=3
        )
        axes.set_xlim(-0.7, len(ratio_E) - 0.3)
        axes.set_ylim(0, max(1.5, 1.08 * ratio_E.max()))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("expert")
        axes.set_ylabel("load / uniform load")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return Drawing.from_figure(figure)


def load_ratio(counts_SE: Int[np.ndarray, "S E"]) -> Float[np.ndarray, "S E"]:
    """Each expert's load over the uniform load; 1 for all is perfect balance, and E the maximum.

    A row without any assignment has the ratio 0 everywhere.
    """
    total_S1 = np.maximum(counts_SE.sum(axis=1, keepdims=True), 1)
    return counts_SE * counts_SE.shape[1] / total_S1


def _label_values(axes: Axes, curves: Sequence[Curve]) -> None:
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    if values.size and np.array_equal(values, values.round()):
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if values.size and np.abs(values).max() >= 10_000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short_number(y)))


def downsample(
    x: Int[np.ndarray, "S"] | Float[np.ndarray, "S"],
    values: Float[np.ndarray, "S"],
    points: int = MAX_POINTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the ends, and the least and the greatest of each stretch, so that a spike is still seen.

    Args:
      x: increasing.
      values: y; NaN where there is none.
      points: how many to keep at most.

    Returns:
      Some of the points, in order.
    """
    if len(x) <= points:
        return x, values
    stretches = np.array_split(np.arange(len(x)), points // 2 - 1)
    low = np.where(np.isnan(values), math.inf, values)
    high = np.where(np.isnan(values), -math.inf, values)
    kept = {i for s in stretches for i in (s[np.argmin(low[s])], s[np.argmax(high[s])])}
    kept_S = np.array(sorted({0, len(x) - 1} | kept))
    return x[kept_S], values[kept_S]


def _columns(
    steps: Int[np.ndarray, "S"], counts_SE: Int[np.ndarray, "S E"]
) -> tuple[np.ndarray, np.ndarray]:
    """Edges in steps of few enough columns, and the counts summed over the intervals of each."""
    first = (
        2 * steps[0] - steps[1] if len(steps) > 1 else 0
    )  # the first interval is as long as the second
    num_columns = min(len(steps), MAX_COLUMNS, max(1, MAX_CELLS // counts_SE.shape[1]))
    starts = np.linspace(0, len(steps), num_columns, endpoint=False).astype(int)
    ends = np.append(starts[1:], len(steps)) - 1
    return np.append(min(max(first, 0), steps[0] - 1), steps[ends]), np.add.reduceat(
        counts_SE, starts, axis=0
    )
