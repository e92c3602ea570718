"""Sections of a run's report: what the run is, how training went, what the model writes, its configuration."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.inspection import figures, html
from moejax.inspection.figures import Chart
from moejax.inspection.page import figure, grid, number, table
from moejax.inspection.run import Run


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
    return (
        f"Mixture of Experts: {html.text(moe['num_experts'])} experts, top {html.text(moe.get('top_k', '?'))}{layers}"
    )


def summary(run: Run) -> str:
    """Size, quality, speed and origin."""
    eval_steps, losses = run.series("eval/loss")
    loss = f"{number(losses[-1])} nats per token, at step {eval_steps[-1]:,}" if losses.size else "no evaluation yet"
    if losses.size and np.isfinite(losses).any() and (best := int(np.nanargmin(losses))) != losses.size - 1:
        loss += f" (lowest: {number(losses[best])} at step {eval_steps[best]:,})"
    total, active = run.parameters_total, run.parameters_active
    _, speeds = run.series("perf/tokens_per_s")
    speeds = speeds[np.isfinite(speeds)]
    steps = run.last_step
    skipped = run.last("skipped_steps")
    rows = [
        ("Parameters", f"{total:,} in total, {active:,} active for a token ({active / max(total, 1):.0%})"),
        ("Validation loss", loss),
        ("Perplexity", number(run.last("eval/perplexity"))),
        ("Bits per byte", number(run.last("eval/bits_per_byte"))),
        ("Tokens per second", number(np.median(speeds)) + " (median)" if speeds.size else number(None)),
        ("Steps done", f"{steps:,} of {html.text(run.config.get('train', {}).get('num_steps', '?'))}"),
        ("Steps skipped", "" if skipped is None else f"{skipped:,.0f}, for a gradient that was not finite"),
        ("Tokens seen", number(run.last("tokens"))),
        ("Device", html.text(run.device)),
        ("Versions", html.text(", ".join(f"{name} {version}" for name, version in run.versions.items()))),
        ("Commit", f"<code>{html.text(run.git_commit)}</code>"),
        ("Command", f"<code>{' '.join(f'<span>{html.text(word)}</span>' for word in run.command.split())}</code>"),
    ]
    return table((), [row for row in rows if row[1]], kind="facts")


def other_losses(run: Run) -> list[Chart]:
    """A chart for each logged loss that the known charts leave out, so that none is hidden."""
    known = {key for chart in figures.LOSS_CHARTS for key, _ in chart.keys}
    others = [key for key in run.keys if key.startswith("loss/") and key not in known]
    return [Chart(key, ((key, ""),), "value", "As logged.") for key in others]


def charts(run: Run, wanted: Iterable[Chart]) -> str:
    """The charts that have values."""
    shown = []
    for chart in wanted:
        image = figures.draw_chart(chart, run.series)
        if image is not None:
            key, label = chart.keys[0]
            last = f"{html.text(label) if len(chart.keys) > 1 else 'last'}: {number(run.last(key))}"
            shown.append(figure(html.text(chart.title), html.text(chart.reading), image, value=last))
    return grid(shown) if shown else "<p>Nothing is logged yet.</p>"


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
    """Every leaf."""

    def section(name: str, leaves: Mapping[str, Any]) -> str:
        rows = [(html.text(key), f"<code>{html.text(json.dumps(value))}</code>") for key, value in leaves.items()]
        return f"<div><h3>{html.text(name)}</h3>{table((), rows)}</div>"

    return grid(section(*item) for item in run.config.items())
