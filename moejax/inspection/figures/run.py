"""Figures of a run, in one style: the charts of its metrics, and all else that its page draws.

Each figure is a `Drawing`: a data URI for a page, saved as .svg or .png.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from moejax.inspection.figures.curves import MAX_POINTS as MAX_POINTS
from moejax.inspection.figures.curves import Curve as Curve
from moejax.inspection.figures.curves import downsample as downsample
from moejax.inspection.figures.curves import draw_curves as draw_curves
from moejax.inspection.figures.curves import only_value as only_value
from moejax.inspection.figures.load import MAX_COLUMNS as MAX_COLUMNS
from moejax.inspection.figures.load import draw_final_load as draw_final_load
from moejax.inspection.figures.load import draw_load_over_time as draw_load_over_time
from moejax.inspection.figures.load import load_ratio as load_ratio
from moejax.inspection.figures.style import COLORS as COLORS
from moejax.inspection.figures.style import Drawing
from moejax.training.health.speed import MEMORY, MFU, SPEED


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
      is_speed: the number next to the figure is the median over logging intervals, not
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
        "Cross-entropy of the next token. Good: falling. Validation rising while training falls "
        "is overfitting.",
    ),
    Chart(
        "Total loss",
        (("loss/total", "total"), ("loss/lm", "language model")),
        "nats per token",
        "What is minimised: the language-model loss plus the weighted auxiliary losses, which "
        "are the gap between the lines.",
    ),
    Chart(
        "Weighted auxiliary losses",
        (("loss/balance_weighted", "balance"), ("loss/z_weighted", "router z")),
        "added to the total",
        "What each auxiliary loss adds to the total. "
        "Good: small compared with the language-model loss.",
        from_zero=True,
    ),
    Chart(
        "Balance loss",
        (("loss/balance", "balance"),),
        "before weighting",
        "1 when the load is uniform; above 1, the router prefers experts that are already busy. "
        "Good: close to 1.",
        reference=(1.0, "uniform"),
    ),
    Chart(
        "Router z-loss",
        (("loss/z", "router z"),),
        "before weighting",
        "Mean squared log-sum-exp of the router's logits; large logits make training unstable. "
        "Good: falling or flat.",
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
        "The arithmetic that the model asks for, over what its devices can do at most. Good: "
        "high; half is very good.",
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
        "Before clipping. Good: steady. Spikes that the loss follows suggest a lower learning "
        "rate.",
        from_zero=True,
    ),
)


def routing_charts(num_experts: int) -> tuple[Chart, ...]:
    """Returns the charts of routing health.

    The entropies are compared with that of uniform routing, ln E.
    """
    entropy = math.log(num_experts)
    uniform = (entropy, f"uniform: ln {num_experts} = {entropy:.2f}")
    return (
        Chart(
            "MaxVio",
            (("moe/max_violation", "MaxVio"),),
            "busiest / mean - 1",
            "How far the busiest expert is above the mean load: 0 is perfect balance, 1 is twice "
            "the mean. Good: below about 0.5 and falling.",
            from_zero=True,
        ),
        Chart(
            "Dead experts",
            (("moe/dead_experts", "dead experts"),),
            "experts",
            "Experts that got no token in the interval. Good: 0. One that stays dead is paid for "
            "and not used.",
            from_zero=True,
        ),
        Chart(
            "Entropy",
            (("moe/entropy", "router"), ("moe/load_entropy", "load")),
            "nats",
            "Router: how undecided it is about one token; it falls as experts specialise, and 0 "
            "means it no longer explores. Load: how evenly all tokens spread; good: close to the "
            "dotted line.",
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
            "Assignments that found their expert full and skipped it, or went to another. Good: "
            "0, as it always is with dropless dispatch; a few percent are usual with a capacity "
            "limit. Expert dropout drops on purpose.",
            from_zero=True,
        ),
        Chart(
            "Routing churn",
            (("eval/routing_churn", "churn"),),
            "share of a token's experts",
            "Of the experts that tokens of held-out text visited at the evaluation before, how "
            "many they no longer visit. Good: falling, as routing settles.",
            from_zero=True,
        ),
    )


def draw_chart(
    chart: Chart,
    series: Callable[[str], tuple[np.ndarray, np.ndarray]],
) -> Drawing | None:
    """Draws a chart from a run's series.

    Args:
      chart: what to draw.
      series: metric name to (steps, values), as `Run.series`.

    Returns:
      An SVG data URI; None if no metric of the chart has values.
    """
    curves = []
    for key, label in chart.keys:
        steps, values = series(key)
        is_measured = key.startswith("eval/")
        if steps.size:
            curves.append(Curve(label, steps, values, points=is_measured))
    if not curves:
        return None
    return draw_curves(
        curves,
        chart.ylabel,
        reference=chart.reference,
        from_zero=chart.from_zero,
    )
