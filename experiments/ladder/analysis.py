"""Reads the ladder and the scan, writes `results.json` and `figure.png`, prints the tables.

python experiments/ladder/analysis.py [LADDER SCAN]
python experiments/ladder/analysis.py --from-results
"""

import json
import sys
from pathlib import Path
from typing import Any

from moejax.sweeps.ladder.directory import open_ladder
from moejax.sweeps.ladder.judge import judge
from moejax.sweeps.ladder.law import fit_laws
from moejax.sweeps.ladder.report import report_of
from moejax.sweeps.ladder.results import measure
from moejax.sweeps.report.ladder_figures import draw_laws
from moejax.sweeps.store.directory import join_records

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
BASELINE = "dense"


def read(ladder_folder: str, scan_folder: str) -> dict[str, Any]:
    """Returns laws, predictions, speed-ups and the scan; draws the figure."""
    ladder, scan = open_ladder(ladder_folder), open_ladder(scan_folder)
    join_records(ladder.directory)
    join_records(scan.directory)
    measured, scanned = measure(ladder), measure(scan)
    report = report_of(measured, [scanned])
    law = fit_laws({BASELINE: measured.curve(BASELINE)})[BASELINE]
    others = [arm for arm in measured.arms if arm != BASELINE]
    judged = []
    for arm in others:
        found = judge(
            (measured, BASELINE), (measured, arm), law, ladder.gate, num_candidates=len(others)
        )
        judged.append(found.to_json())
    draw_laws(measured, report.laws, report.predictions).save(FOLDER / "figure.png")
    return report.to_json() | {"candidates": judged, "scan": report_of(scanned).to_json()["arms"]}


def show(results: dict[str, Any]) -> None:
    """Prints the tables of the README."""
    print("| arm | budget | loss | standard error | seconds |\n|---|---|---|---|---|")
    for row in results["arms"]:
        print(
            f"| {row['arm']} | {row['budget']:.3g} | {row['loss']:.4f} | {row['se']:.4f} | "
            f"{row['seconds']:.0f} |"
        )
    print("\n| over dense | budget | gain, nats | speed-up in FLOPs | in time |")
    print("|---|---|---|---|---|")
    for candidate in results["candidates"]:
        for rung in candidate["rungs"]:
            print(
                f"| {candidate['candidate']} | {rung['budget']:.3g} | "
                f"{_between(rung, 'gain', 'gain_interval', 4)} | "
                f"{_between(rung, 'flops_speedup', 'flops_interval', 2)} | "
                f"{_between(rung, 'time_speedup', 'time_interval', 2)} |"
            )
    print("\n| arm | E | A | a | top rung predicted | measured |\n|---|---|---|---|---|---|")
    for arm, law in results["law"].items():
        top = results["prediction"]["by_arm"][arm]
        print(
            f"| {arm} | {_between(law, 'E', 'E_interval', 3)} | {law['A']:.4g} | "
            f"{_between(law, 'a', 'a_interval', 3)} | {top['predicted']:.4f} | "
            f"{top['measured']:.4f} |"
        )
    print(f"\njoint law: {results['joint_law']}")


def _between(row: dict[str, Any], name: str, interval: str, digits: int) -> str:
    """Returns a value with its interval."""
    value = "more than any" if row[name] is None else f"{row[name]:.{digits}f}"
    if row[interval] is None:
        return value
    low, high = (_end(end, digits) for end in row[interval])
    return f"{value} ({low} to {high})"


def _end(value: float | None, digits: int) -> str:
    return "any" if value is None else f"{value:.{digits}f}"


def main(arguments: list[str]) -> None:
    """Reads runs, or the results that were written before."""
    if "--from-results" in arguments:
        show(json.loads(RESULTS.read_text()))
        return
    folders = arguments or ["runs/ladder", "runs/ladder_scan"]
    results = read(*folders)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main(sys.argv[1:])
