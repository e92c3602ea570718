"""What does each router reach on the same small task?

  python experiments/routers/analysis.py [DIR]

Reads the sweep in DIR, `runs/routers` by default, which `sweep.py` describes, and writes
`results.json` and the table of `docs/routers.md`. Rows of recipes that are not in the sweep stay.
"""

import json
import runpy
import statistics
import sys
from pathlib import Path

from moejax.sweeps.store.named_arms import NamedArm, named_arms

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SWEEP, RESULTS = ROOT / "runs/routers", HERE / "results.json"
PAGE = ROOT / "docs/routers.md"
MARKS = ("<!-- measured: written by experiments/routers/analysis.py -->\n", "<!-- end -->")
SEES_THE_FUTURE = {
    "expert_choice": "in evaluation, too",
    "soft": "in evaluation, too",
    "gshard": "where slots run out, in evaluation, too",
    "sinkhorn": "in training",
    "vmoe": "in training",
}
"""Recipes with moe.allow_noncausal, and whether evaluation looks at later tokens as well."""


def read(found: NamedArm) -> dict[str, float | int]:
    """Returns what `docs/routers.md` shows of an arm."""
    text = (found.workdir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    trained = [line for line in lines if "loss/lm" in line]
    evaluated = [line for line in lines if "eval/loss" in line][-1]
    last = trained[-3:]  # 30 steps
    return {
        "parameters_total": found.arm.count.total,
        "parameters_active": found.arm.count.active,
        "bits_per_byte": evaluated["eval/bits_per_byte"],
        "max_violation": evaluated["eval/max_violation"],
        "routing_churn": evaluated["eval/routing_churn"],
        "dropped": statistics.mean(line["moe/dropped"] for line in last),
        "moved": statistics.mean(line["moe/moved"] for line in last),
        "unserved": statistics.mean(line["moe/unserved"] for line in last),
        "entropy": statistics.mean(line["moe/entropy"] for line in last),
        "dead_experts": last[-1]["moe/dead_experts"],
    }


def table(results: dict[str, dict[str, float | int]]) -> str:
    """Returns the results as Markdown, the best first."""
    rows = [
        "| recipe | bits per byte | MaxVio | churn | dead of all experts | dropped or moved "
        "| parameters, active | sees the future |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in sorted(results.items(), key=lambda item: item[1]["bits_per_byte"]):
        total = found["parameters_total"] / 1e6
        active = found["parameters_active"] / 1e6
        cells = [
            f"`{name}`",
            f"{found['bits_per_byte']:.3f}",
            f"{found['max_violation']:.2f}",
            f"{found['routing_churn']:.2f}",
            f"{found['dead_experts']:.0f}",
            f"{found['dropped'] + found['moved']:.1%}",
            f"{total:.2f} M, {active:.2f} M",
            SEES_THE_FUTURE.get(name, "no"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def write_table(results: dict[str, dict[str, float | int]]) -> None:
    """Replaces the table between its marks in `docs/routers.md`."""
    start, end = MARKS
    page = PAGE.read_text()
    before, rest = page.split(start)
    _, after = rest.split(end, 1)
    changed = before + start + table(results) + end + after
    PAGE.write_text(changed)


def main() -> None:
    """Reads the sweep, and writes its rows beside those of other recipes."""
    directory = sys.argv[1] if len(sys.argv) > 1 else SWEEP
    points = runpy.run_path(str(HERE / "sweep.py"))["read_points"]()
    results = json.loads(RESULTS.read_text())
    for found in named_arms(directory, points):
        results[found.name] = read(found)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_table(results)
    print(table(results))


if __name__ == "__main__":
    main()
