"""Sections of a run's report: what the run is, how training went, what the model writes, its configuration."""

import dataclasses
import json
from collections.abc import Iterable, Sequence

import numpy as np

from moejax.inspection import html
from moejax.inspection.figures import axes
from moejax.inspection.figures import run as figures
from moejax.inspection.figures.run import Chart, Curve
from moejax.inspection.figures.style import short_number
from moejax.inspection.report.page import figure, grid, number, table
from moejax.inspection.runs.names import recipe_name
from moejax.inspection.runs.run import Run
from moejax.inspection.runs.settings import Setting, settings_of
from moejax.training.health.speed import ARMS, MEMORY, MFU, SPEED, median_speed

READING = {
    "tokens": "Text read so far.",
    "compute": "Arithmetic that the model asks for, forward and backward: what to judge experts by.",
    "time": "Of training steps alone, without compilation, evaluation and saving.",
}
"""What the axes of `losses_by_cost` are."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text that the model wrote.

    Attributes:
      prompt: what it was given.
      text: what it wrote behind that, without the prompt.
      temperature: of the sampling; 0 is greedy.
      top_p: the probability mass sampled from.
    """

    prompt: str
    text: str
    temperature: float
    top_p: float


def model_in_words(run: Run) -> str:
    """Dense, or how many experts in how many layers."""
    if run.is_dense:
        return "Dense model"
    moe = run.config["moe"]
    layers = "" if run.routing is None else f" in {len(run.routing.layers)} layers"
    return f"Mixture of Experts: {html.text(moe['num_experts'])} experts, top {html.text(moe.get('top_k', '?'))}{layers}"


def subtitle(run: Run) -> str:
    """The model, the recipe that it came from, and the folder of a run that is named by what sets it apart."""
    recipe = recipe_name(run.command)
    parts = [
        model_in_words(run),
        f"recipe {html.text(recipe)}" if recipe else "",
        f"folder {html.text(run.name)}" if run.name_in_words != run.name else "",
    ]
    return "; ".join(filter(None, parts))


def summary(run: Run) -> str:
    """Size, quality, cost and origin."""
    total, active = run.parameters_total, run.parameters_active
    skipped = run.last("skipped_steps")
    rows = [
        (
            "Parameters",
            f"{total:,} in total, {active:,} active for a token ({active / max(total, 1):.0%})",
        ),
        ("Validation loss", _validation_loss(run)),
        ("Perplexity", number(run.last("eval/perplexity"))),
        ("Bits per byte", number(run.last("eval/bits_per_byte"))),
        (
            "Steps done",
            f"{run.last_step:,} of {html.text(run.config.get('train', {}).get('num_steps', '?'))}",
        ),
        (
            "Steps skipped",
            "" if skipped is None else f"{skipped:,.0f}, for a gradient that was not finite",
        ),
        ("Tokens seen", number(run.last("tokens"))),
        *_cost(run),
        ("Device", html.text(run.device)),
        (
            "Versions",
            html.text(", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ),
        ("Commit", f"<code>{html.text(run.git_commit)}</code>"),
        ("Command", html.command(run.command)),
    ]
    return table((), [row for row in rows if row[1]], kind="facts")


def _validation_loss(run: Run) -> str:
    """The last, and the lowest if that is another."""
    steps, losses = run.series("eval/loss")
    if not losses.size:
        return "no evaluation yet"
    last = f"{number(losses[-1])} nats per token, at step {steps[-1]:,}"
    if not np.isfinite(losses).any():
        return last
    best = int(np.nanargmin(losses))
    if best == losses.size - 1:
        return last
    return f"{last} (lowest: {number(losses[best])} at step {steps[best]:,})"


def _cost(run: Run) -> list[tuple[str, str]]:
    """Time, arithmetic, speed, and what of the devices they used; a row is empty where the run does not tell."""
    _, seconds = axes.seconds_trained(run.series)
    tokens, flops = run.last("tokens"), run.flops_per_token
    speed, mfu, memory = (
        median_speed(run.series(SPEED)[1]),
        median_speed(run.series(MFU)[1]),
        run.last(MEMORY),
    )
    arithmetic = None if flops is None or tokens is None else flops * tokens
    return [
        (
            "Training time",
            f"{duration(seconds[-1])}, without compilation, evaluation and saving"
            if seconds.size
            else "",
        ),
        (
            "Training FLOPs",
            ""
            if arithmetic is None or flops is None
            else f"{arithmetic:.3g}, {short_number(flops)} for a token",
        ),
        (
            "Tokens per second",
            number(speed) + f" ({_of_pack(run)}median over logging intervals)"
            if speed is not None
            else number(None),
        ),
        (
            "MFU",
            ""
            if mfu is None
            else f"{mfu:.1%} of the devices' peak in bfloat16 (median over logging intervals)",
        ),
        (
            "Peak memory",
            "" if memory is None else f"{memory / 2**30:.2f} GiB of the fullest device",
        ),
    ]


def _of_pack(run: Run) -> str:
    arms = run.last(ARMS)
    return f"{arms:.0f} arms trained together, of whose time this is a share; " if arms else ""


def duration(seconds: float) -> str:
    """A time in the units that fit: `42 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def other_losses(run: Run) -> list[Chart]:
    """A chart for each logged loss that the known charts leave out, so that none is hidden."""
    known = {key for chart in figures.LOSS_CHARTS for key, _ in chart.keys}
    others = [key for key in run.keys if key.startswith("loss/") and key not in known]
    return [Chart(key, ((key, ""),), "value", "As logged.") for key in others]


def charts(run: Run, wanted: Iterable[Chart]) -> str:
    """The charts that have values; a sentence says those that have the same throughout."""
    shown, constant = [], []
    for chart in wanted:
        value = figures.only_value(run.series(key)[1] for key, _ in chart.keys)
        if value is not None:
            constant.append(f"{html.text(chart.title)} {number(value)}{_where(run, chart)}")
            continue
        image = figures.draw_chart(chart, run.series)
        if image is not None:
            shown.append(
                figure(
                    html.text(chart.title),
                    html.text(chart.reading),
                    image,
                    value=_value(run, chart),
                )
            )
    if not shown and not constant:
        return "<p>Nothing is logged yet.</p>"
    throughout = f"<p>The same throughout: {'; '.join(constant)}.</p>" if constant else ""
    return (grid(shown) if shown else "") + throughout


def _where(run: Run, chart: Chart) -> str:
    """At which step a chart has its only value; nothing if it has several equal ones."""
    steps = [step for key, _ in chart.keys for step in run.series(key)[0].tolist()]
    return f" (at step {steps[0]:,} alone)" if len(steps) == 1 else ""


def _value(run: Run, chart: Chart) -> str:
    """The number beside a chart: of its first metric, with its name."""
    key, label = chart.keys[0]
    if chart.is_speed:
        return f"median: {number(median_speed(run.series(key)[1]))}"
    name = html.text(label) if len(chart.keys) > 1 else "last"
    return f"{name}: {number(run.last(key))}"


def losses_by_cost(run: Run) -> str:
    """The language-model loss against tokens, arithmetic and time; nothing if there is no curve."""
    chart = figures.LOSS_CHARTS[0]
    shown = []
    for axis in ("tokens", "compute", "time"):
        curves = []
        for key, label in chart.keys:
            steps, values = run.series(key)
            x = axes.place(axis, steps, run.series, run.flops_per_token)
            if np.isfinite(x).any():
                curves.append(Curve(label, x, values, points=key.startswith("eval/")))
        if any(len(curve.values) > 1 for curve in curves):
            image = figures.draw_curves(curves, chart.ylabel, axis=axis)
            shown.append(figure(f"Loss over {axes.NAMES[axis]}", READING[axis], image))
    return grid(shown) if shown else ""


def written(samples: Sequence[Sample]) -> str:
    """What the model wrote."""
    if not samples:
        return "<p>None were written for this report.</p>"
    return "<p>The prompt in bold, then what the model wrote.</p>" + "".join(
        f'<p class="soft">Temperature {s.temperature:g}, top-p {s.top_p:g}</p>'
        f"<pre><b>{html.text(s.prompt)}</b>{html.text(s.text)}</pre>"
        for s in samples
    )


def configuration(run: Run) -> str:
    """Every leaf, a section beside the other; what differs from the defaults is marked, and listed first."""
    settings = settings_of(run.config)
    chosen = [setting for setting in settings if setting.is_chosen]
    sections: dict[str, list[Setting]] = {}
    for setting in settings:
        sections.setdefault(setting.section, []).append(setting)
    parts = [
        f"<div><h3>{html.text(name)}</h3>{_settings_table(of_section)}</div>"
        for name, of_section in sections.items()
    ]
    return (
        f"<p>{len(chosen)} of {len(settings)} leaves were set to something else than their default. They are marked, "
        f"with the default below.</p><div class='columns'>{''.join(parts)}</div>"
    )


def _settings_table(settings: Sequence[Setting]) -> str:
    """Names and values; see `configuration`."""
    rows = []
    for setting in settings:
        value = f"<code>{html.text(json.dumps(setting.value))}</code>"
        if setting.is_chosen:
            value += (
                f"<span class='default'>default {html.text(json.dumps(setting.default))}</span>"
            )
        kind = " class='changed'" if setting.is_chosen else ""
        rows.append(
            f"<tr{kind}><th scope='row'>{html.text(setting.name)}</th><td>{value}</td></tr>"
        )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"
