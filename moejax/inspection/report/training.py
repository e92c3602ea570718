"""Sections of a run's report: what the run is, how training went, what the model writes."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moejax.inspection import html
from moejax.inspection.figures import axes
from moejax.inspection.figures import run as figures
from moejax.inspection.figures.run import Chart, Curve
from moejax.inspection.figures.style import short_number
from moejax.inspection.html import Markup
from moejax.inspection.report.page import figure, grid, number, table
from moejax.inspection.runs.names import recipe_name
from moejax.inspection.runs.run import Run
from moejax.inspection.runs.settings import settings_of
from moejax.training.health.speed import ARMS, MEMORY, MFU, SPEED, median_speed

READING = {
    "tokens": "Text read so far.",
    "compute": (
        "Arithmetic that the model asks for, forward and backward: what to judge experts by."
    ),
    "time": "Of training steps alone, without compilation, evaluation and saving.",
}
"""How to read the axes of `losses_by_cost`."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that the model wrote.

    Attributes:
      prompt: what it was given.
      text: what it wrote after that, without the prompt.
      temperature: of the sampling; 0 is greedy.
      top_p: the probability mass sampled from.
    """

    prompt: str
    text: str
    temperature: float
    top_p: float


def model_in_words(run: Run) -> str:
    """Says that a model is dense, or how many experts it has in how many layers."""
    if run.is_dense:
        return "Dense model"
    moe = run.config["moe"]
    num_experts = moe["num_experts"]
    top_k = moe.get("top_k", "?")
    words = f"Mixture of Experts: {num_experts} experts, top {top_k}"
    if run.routing is None:
        return words
    num_layers = len(run.routing.layers)
    return f"{words} in {num_layers} layers"


def subtitle(run: Run) -> str:
    """Returns the model, its recipe, and its folder where the title does not name that."""
    parts = [model_in_words(run)]
    recipe = recipe_name(run.command)
    if recipe:
        parts.append(f"recipe {recipe}")
    if run.name_in_words != run.name:
        parts.append(f"folder {run.name}")
    return "; ".join(parts)


def summary(run: Run) -> Markup:
    """Returns a table of size, quality, cost and origin."""
    train = run.config.get("train", {})
    num_steps = train.get("num_steps", "?")
    versions = [f"{name} {version}" for name, version in run.versions.items()]
    rows: list[tuple[str, Any]] = [
        ("Parameters", _parameters(run)),
        ("Validation loss", _validation_loss(run)),
        ("Perplexity", number(run.last("eval/perplexity"))),
        ("Bits per byte", number(run.last("eval/bits_per_byte"))),
        ("Steps done", f"{run.last_step:,} of {num_steps}"),
        ("Steps skipped", _skipped(run)),
        ("Tokens seen", number(run.last("tokens"))),
        *_cost(run),
        ("Device", run.device),
        ("Versions", ", ".join(versions)),
        ("Commit", html.code(run.git_commit)),
        ("Command", html.command(run.command)),
    ]
    known = [row for row in rows if row[1]]
    return table((), known, kind="facts")


def _parameters(run: Run) -> str:
    total, active = run.parameters_total, run.parameters_active
    share = active / max(total, 1)
    return f"{total:,} in total, {active:,} active for a token ({share:.0%})"


def _validation_loss(run: Run) -> str:
    """Returns the last validation loss, and the lowest if that is another."""
    steps, losses = run.series("eval/loss")
    if not losses.size:
        return "no evaluation yet"
    loss = number(losses[-1])
    last = f"{loss} nats per token, at step {steps[-1]:,}"
    if not np.isfinite(losses).any():
        return last
    best = int(np.nanargmin(losses))
    if best == losses.size - 1:
        return last
    lowest_loss = number(losses[best])
    return f"{last} (lowest: {lowest_loss} at step {steps[best]:,})"


def _skipped(run: Run) -> str:
    skipped = run.last("skipped_steps")
    if skipped is None:
        return ""
    return f"{skipped:,.0f}, for a gradient that was not finite"


def _cost(run: Run) -> list[tuple[str, str]]:
    """Returns rows of time, arithmetic and speed; one is empty where the run does not record it."""
    return [
        ("Training time", _training_time(run)),
        ("Training FLOPs", _training_flops(run)),
        ("Tokens per second", _tokens_per_second(run)),
        ("MFU", _mfu(run)),
        ("Peak memory", _peak_memory(run)),
    ]


def _training_time(run: Run) -> str:
    _, seconds = axes.seconds_trained(run.series)
    if not seconds.size:
        return ""
    return f"{duration(seconds[-1])}, without compilation, evaluation and saving"


def _training_flops(run: Run) -> str:
    tokens = run.last("tokens")
    flops_per_token = run.flops_per_token
    if tokens is None or flops_per_token is None:
        return ""
    flops = flops_per_token * tokens
    return f"{flops:.3g}, {short_number(flops_per_token)} for a token"


def _tokens_per_second(run: Run) -> str:
    speed = _median(run, SPEED)
    if speed is None:
        return number(None)
    num_arms = run.last(ARMS)
    pack = ""
    if num_arms:
        pack = f"{num_arms:.0f} arms trained together, of whose time this is a share; "
    return f"{number(speed)} ({pack}median over logging intervals)"


def _median(run: Run, key: str) -> float | None:
    """Returns the median of a metric of speed over logging intervals."""
    _, values = run.series(key)
    return median_speed(values)


def _mfu(run: Run) -> str:
    mfu = _median(run, MFU)
    if mfu is None:
        return ""
    return f"{mfu:.1%} of the devices' peak in bfloat16 (median over logging intervals)"


def _peak_memory(run: Run) -> str:
    memory = run.last(MEMORY)
    if memory is None:
        return ""
    return f"{memory / 2**30:.2f} GiB of the fullest device"


def duration(seconds: float) -> str:
    """Returns a time in the units that fit: `42 s`, `3 min 5 s`, `2 h 10 min`."""
    rounded = round(seconds)
    if rounded < 10:
        return f"{seconds:.1f} s"
    if rounded < 60:
        return f"{rounded} s"
    minutes, rest = divmod(rounded, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def other_losses(run: Run) -> list[Chart]:
    """Returns a chart of each logged loss that `LOSS_CHARTS` leaves out: none is hidden."""
    known: set[str] = set()
    for chart in figures.LOSS_CHARTS:
        known.update(key for key, _ in chart.keys)
    charts = []
    for key in run.keys:
        if key.startswith("loss/") and key not in known:
            keys = ((key, ""),)
            charts.append(Chart(key, keys, "value", "As logged."))
    return charts


def charts(run: Run, wanted: Iterable[Chart]) -> Markup:
    """Returns the charts that have values; a sentence lists those with one value throughout."""
    drawn: list[Markup] = []
    constants: list[str] = []
    for chart in wanted:
        value = figures.only_value(run.series(key)[1] for key, _ in chart.keys)
        if value is not None:
            shown = number(value)
            where = _where(run, chart)
            constants.append(f"{chart.title} {shown}{where}")
            continue
        image = figures.draw_chart(chart, run.series)
        if image is not None:
            shown = _value(run, chart)
            drawn.append(figure(chart.title, chart.reading, image, value=shown))
    if not drawn and not constants:
        return html.paragraph("Nothing is logged yet.")
    return html.render("report/charts", figures=grid(drawn), constants=constants)


def _where(run: Run, chart: Chart) -> str:
    """Says at which step a chart has its only value; nothing if it has several equal ones."""
    found: list[int] = []
    for key, _ in chart.keys:
        steps, _ = run.series(key)
        found += steps.tolist()
    if len(found) != 1:
        return ""
    return f" (at step {found[0]:,} alone)"


def _value(run: Run, chart: Chart) -> str:
    """Returns the number next to a chart: the last of its first metric, or the median speed."""
    key, label = chart.keys[0]
    if chart.is_speed:
        median = number(_median(run, key))
        return f"median: {median}"
    last = number(run.last(key))
    name = label if len(chart.keys) > 1 else "last"
    return f"{name}: {last}"


def losses_by_cost(run: Run) -> Markup:
    """Returns the loss against tokens, arithmetic and time; nothing if there is no curve."""
    chart = figures.LOSS_CHARTS[0]
    drawn = []
    for axis in ("tokens", "compute", "time"):
        curves = _curves(run, chart, axis)
        if any(len(curve.values) > 1 for curve in curves):
            image = figures.draw_curves(curves, chart.ylabel, axis=axis)
            title = f"Loss over {axes.NAMES[axis]}"
            drawn.append(figure(title, READING[axis], image))
    return grid(drawn)


def _curves(run: Run, chart: Chart, axis: str) -> list[Curve]:
    """Returns the metrics of a chart against an axis, without those that have no place on it."""
    curves = []
    for key, label in chart.keys:
        steps, values = run.series(key)
        x = axes.place(axis, steps, run.series, run.flops_per_token)
        if np.isfinite(x).any():
            is_points = key.startswith("eval/")
            curves.append(Curve(label, x, values, points=is_points))
    return curves


def written(samples: Sequence[Sample]) -> Markup:
    """Returns what the model wrote."""
    if not samples:
        return html.paragraph("None were written for this report.")
    return html.render("report/samples", samples=samples)


def configuration(run: Run) -> Markup:
    """Returns every leaf by section; what differs from its default is marked."""
    settings = settings_of(run.config)
    sections: dict[str, list[dict[str, Any]]] = {}
    for setting in settings:
        row = {
            "name": setting.name,
            "value": json.dumps(setting.value),
            "default": json.dumps(setting.default),
            "is_chosen": setting.is_chosen,
        }
        sections.setdefault(setting.section, []).append(row)
    num_chosen = sum(setting.is_chosen for setting in settings)
    return html.render(
        "report/configuration",
        sections=sections,
        num_chosen=num_chosen,
        num_leaves=len(settings),
    )
