"""A ladder as one HTML page: curves, laws, the prediction of the top rung, the runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.inspection import html
from moejax.inspection.html import Markup
from moejax.inspection.report.page import (
    Section,
    figure,
    grid,
    number,
    render_page,
    table,
    write_page,
)
from moejax.sweeps.ladder.directory import Ladder
from moejax.sweeps.ladder.joint import NUMBERS
from moejax.sweeps.ladder.report import LadderReport, Prediction
from moejax.sweeps.ladder.results import Measurements
from moejax.sweeps.matching import short
from moejax.sweeps.report.ladder_figures import MAX_ARMS, draw_laws, draw_sizes

FILE_NAME = "ladder.html"

LAW = "L = E + A C⁻ᵃ"
JOINT_LAW = "L = E + A N⁻ⁿ (M / N)⁻ᵐ + B D⁻ᵈ"


def write_ladder_page(ladder: Ladder, measured: Measurements, report: LadderReport) -> Path:
    """Writes `ladder.html` in the ladder's directory, and returns its path."""
    document = build_ladder_page(ladder, measured, report)
    return write_page(ladder.directory / FILE_NAME, document)


def build_ladder_page(ladder: Ladder, measured: Measurements, report: LadderReport) -> str:
    """Renders the page."""
    sections: list[Section] = [
        ("curves", "Loss over compute", _curves(measured, report)),
        ("laws", "Laws", _laws(report)),
        ("prediction", "The top rung, predicted", _predictions(report)),
        ("joint", "Parameters and tokens", _joint(report)),
        ("runs", "Arms at each rung", _arms(measured, report)),
        ("rule", "What the rungs set", _rungs(ladder)),
    ]
    subtitle = f"A ladder of {len(ladder.budgets)} budgets, {ladder.num_seeds} seeds"
    return render_page(ladder.directory.name, subtitle, sections, kind="ladder")


def _curves(measured: Measurements, report: LadderReport) -> Markup:
    if not any(measured.curve(arm)[0] for arm in measured.arms):
        return html.paragraph("No run has ended.")
    reading = (
        "Points are means over seeds, small ones single runs, lines the laws over all rungs. A "
        "cross is the top rung as the rungs below it predict it."
    )
    if len(measured.arms) > MAX_ARMS:
        reading += f" The first {MAX_ARMS} of {len(measured.arms)} arms are shown."
    curves = figure(
        "Laws",
        reading,
        draw_laws(measured, report.laws, report.predictions),
        alt=f"losses of {', '.join(measured.arms)} over compute",
    )
    sizes = figure(
        "Sizes at equal compute",
        "A line is a rung. Where arms differ in size alone, its lowest point is the best size.",
        draw_sizes(measured),
        alt="losses over active parameters at each rung",
    )
    missing = ""
    if measured.num_missing:
        missing = f"{measured.num_missing} runs have no loss: not ended, stopped or failed."
    return html.paragraph(missing, "warning") + grid([curves, sizes])


def _laws(report: LadderReport) -> Markup:
    note = html.paragraph(report.notes.get("laws", ""), "warning")
    if not report.laws:
        return note
    rows = []
    for arm, law in report.laws.items():
        projected = report.projections[arm]
        rows.append(
            (
                arm,
                _between(law.law.E, law.E_interval),
                _between(law.law.A, law.A_interval),
                _between(law.law.a, law.a_interval),
                _between(projected.predicted, projected.interval),
            )
        )
    beyond = next(iter(report.projections.values())).budget
    head = ("arm", "E, nats", "A", "a", f"projected at {short(beyond)}FLOP")
    explained = html.paragraph(
        f"{LAW}, C in FLOPs of training, fitted to log L with a Huber loss; all arms share E. "
        "Intervals of 95 % are of a bootstrap over seeds."
    )
    return note + explained + table(head, rows, "figures")


def _predictions(report: LadderReport) -> Markup:
    note = html.paragraph(report.notes.get("prediction", ""), "warning")
    if not report.predictions:
        return note
    rows = [(arm, *_prediction(found)) for arm, found in report.predictions.items()]
    head = ("arm", "budget", "predicted", "measured", "error, nats")
    return note + table(head, rows, "figures")


def _prediction(found: Prediction) -> tuple[Any, ...]:
    return (
        f"{short(found.budget)}FLOP",
        _between(found.predicted, found.interval),
        number(found.measured),
        f"{found.error:+.4f}",
    )


def _joint(report: LadderReport) -> Markup:
    if report.joint is None:
        return html.paragraph(report.notes.get("joint law", ""))
    law = report.joint
    rows = [(name, number(getattr(law, name))) for name in NUMBERS]
    explained = html.paragraph(
        f"{JOINT_LAW}, with N active and M total parameters and D tokens, fitted to "
        f"{law.num_points} means; the largest relative residual is {law.worst:.2%}."
    )
    return explained + table((), rows, "facts")


def _arms(measured: Measurements, report: LadderReport) -> Markup:
    rows = []
    for row in report.arms:
        rows.append(
            (
                row["arm"],
                f"{short(row['budget'])}FLOP",
                _counted(row["params_active"]),
                _counted(row["params_total"]),
                _counted(row["tokens"]),
                number(row["loss"], "-"),
                number(row["se"], "-"),
                str(row["seeds"]),
                number(row["seconds"], "-"),
            )
        )
    head = (
        "arm",
        "budget",
        "active",
        "parameters",
        "tokens",
        "loss",
        "standard error",
        "seeds",
        "seconds",
    )
    return table(head, rows, "figures")


def _counted(value: int | None) -> str:
    return "-" if value is None else short(value)


def _rungs(ladder: Ladder) -> Markup:
    """Returns what the rule sets; arms for which it sets the same are one row."""
    rows = []
    for budget in ladder.budgets:
        by_leaves: dict[str, list[str]] = {}
        for arm, leaves in ladder.rungs[repr(budget)].items():
            text = " ".join(f"{key}={value}" for key, value in leaves.items())
            by_leaves.setdefault(text, []).append(arm)
        for text, arms in by_leaves.items():
            rows.append((f"{short(budget)}FLOP", _names(arms, ladder), html.code(text)))
    return table(("budget", "arms", "set"), rows)


def _names(arms: Sequence[str], ladder: Ladder) -> str:
    return "all" if len(arms) == len(ladder.points) else ", ".join(arms)


def _between(value: float, interval: tuple[float, float]) -> str:
    low, high = interval
    if math.isnan(low):
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"
