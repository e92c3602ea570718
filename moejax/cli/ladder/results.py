"""What `moejax ladder report` and `moejax ladder gate` print."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.tables import print_result, print_table
from moejax.paths import resolve_path
from moejax.sweeps.ladder.directory import Ladder, open_ladder
from moejax.sweeps.ladder.judge import Judgement, judge
from moejax.sweeps.ladder.law import fit_laws
from moejax.sweeps.ladder.report import LadderReport, report_of
from moejax.sweeps.ladder.results import Measurements, measure
from moejax.sweeps.matching import short
from moejax.sweeps.report.ladder_page import write_ladder_page
from moejax.sweeps.store.directory import join_records


def print_report(values: FlagValues, directory: Path, scans: Sequence[Path]) -> None:
    """Writes the page of a ladder, and prints its laws.

    Args:
      values: parsed flags.
      directory: of the ladder.
      scans: of other ladders, whose points the joint law is fitted to as well.
    """
    ladder = open_ladder(directory)
    join_records(directory)
    measured = measure(ladder)
    others = [measure(open_ladder(scan)) for scan in scans]
    report = report_of(measured, others)
    path = write_ladder_page(ladder, measured, report)
    if values.json:
        print_result(report.to_json() | {"report": str(path)}, is_json=True)
        return
    print_table([_arm_row(row) for row in report.arms], "arms at each rung, means over seeds")
    if report.laws:
        print_table(_law_rows(report), "laws L = E + A C^-a, with 95 % intervals over seeds")
    if report.predictions:
        print_table(_prediction_rows(report), "the top rung, predicted from those below")
    found: dict[str, Any] = {"missing runs": measured.num_missing, "report": str(path)}
    for name, note in report.notes.items():
        found[name] = note
    print_result(found, is_json=False)


def _arm_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "arm": row["arm"],
        "budget": short(row["budget"]),
        "active": _short(row["params_active"]),
        "parameters": _short(row["params_total"]),
        "tokens": _short(row["tokens"]),
        "loss": _digits(row["loss"]),
        "standard error": _digits(row["se"]),
        "seeds": row["seeds"],
        "seconds": _digits(row["seconds"], 1),
    }


def _law_rows(report: LadderReport) -> list[dict[str, Any]]:
    rows = []
    for arm, law in report.laws.items():
        rows.append(
            {
                "arm": arm,
                "E": _with_interval(law.law.E, law.E_interval),
                "A": _with_interval(law.law.A, law.A_interval),
                "a": _with_interval(law.law.a, law.a_interval),
            }
        )
    return rows


def _prediction_rows(report: LadderReport) -> list[dict[str, Any]]:
    rows = []
    for arm, found in report.predictions.items():
        rows.append(
            {
                "arm": arm,
                "budget": short(found.budget),
                "predicted": _with_interval(found.predicted, found.interval),
                "measured": _digits(found.measured),
                "error": _digits(found.error),
            }
        )
    return rows


def print_judgements(values: FlagValues, words: Sequence[str]) -> None:
    """Prints the verdict on each candidate next to a baseline.

    Args:
      values: parsed flags.
      words: the baseline and the candidates, `DIR:ARM` or `DIR`.
    """
    if len(words) < 2:
        raise UsageError(
            "name a baseline and a candidate: moejax ladder gate runs/ladder:dense "
            "runs/ladder:num_experts=8"
        )
    opened: dict[Path, tuple[Ladder, Measurements]] = {}
    ladder, base, arm = _read_arm(words[0], opened)
    law = fit_laws({arm: base.curve(arm)})[arm]
    judged = []
    for word in words[1:]:
        _, other, candidate = _read_arm(word, opened)
        if other is base and candidate == arm:
            raise UsageError(f"{word} is the baseline itself; name another arm")
        judged.append(
            judge((base, arm), (other, candidate), law, ladder.gate, num_candidates=len(words) - 1)
        )
    if values.json:
        content = [judgement.to_json() for judgement in judged]
        print_result({"baseline": arm, "candidates": content}, is_json=True)
        return
    for judgement in judged:
        _print_judgement(judgement, arm)


def _read_arm(
    word: str, opened: dict[Path, tuple[Ladder, Measurements]]
) -> tuple[Ladder, Measurements, str]:
    """Returns the ladder, its measurements and the arm that `DIR:ARM` or `DIR` names."""
    folder, arm = word, ""
    if not Path(word).is_dir():
        folder, _, arm = word.rpartition(":")
    directory = resolve_path(folder or word, "DIR")
    if directory not in opened:
        ladder = open_ladder(directory)
        opened[directory] = (ladder, measure(ladder))
    ladder, measured = opened[directory]
    names = ", ".join(measured.arms)
    if not arm and len(measured.arms) == 1:
        arm = measured.arms[0]
    if not arm:
        raise UsageError(f"{word} has several arms; write {word}:ARM, of {names}")
    if arm not in measured.arms:
        raise UsageError(f"{directory} has no arm {arm}; its arms are {names}")
    return ladder, measured, arm


def _print_judgement(judgement: Judgement, baseline: str) -> None:
    rows = []
    for rung in judgement.rungs:
        rows.append(
            {
                "budget": short(rung.budget),
                "gain in nats": _with_interval(rung.gain.mean, (rung.gain.low, rung.gain.high)),
                "speed-up in FLOPs": _with_interval(
                    rung.flops.value, (rung.flops.low, rung.flops.high), 2
                )
                + (" (extrapolated)" if rung.is_extrapolated else ""),
                "in time": _with_interval(rung.time.value, (rung.time.low, rung.time.high), 2),
                "seeds": rung.gain.num_seeds,
            }
        )
    print_table(rows, f"{judgement.candidate} over {baseline}, with 95 % intervals over seeds")
    print_result(
        {"verdict": judgement.verdict, "gate": f"speed-up above {judgement.gate:g}"}, is_json=False
    )


def _with_interval(value: float, interval: tuple[float, float], digits: int = 4) -> str:
    low, high = interval
    shown = _digits(value, digits)
    if math.isnan(low):
        return f"{shown}"
    return f"{shown} ({_digits(low, digits)} to {_digits(high, digits)})"


def _digits(value: float | None, digits: int = 4) -> str:
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "more than any"
    if abs(value) >= 1000:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def _short(value: float | None) -> str:
    return "-" if value is None else short(value)
