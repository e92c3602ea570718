"""Trains every recipe of `configs/routers/`.

Writes `results.json` next to this file and the table of `docs/routers.md`.

  python experiments/routers/run.py [NAME ...]

A recipe that is done is not run again; `runs/routers/NAME` holds its run. The numbers of recipes
that are not named stay.
"""

import json
import runpy
import statistics
import sys
from pathlib import Path

import jax

from moejax.config import resolve
from moejax.models.parameters import count_parameters
from moejax.training.loop import train

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs/routers.md"
MARKS = ("<!-- measured: written by experiments/routers/run.py -->\n", "<!-- end -->")
SEES_THE_FUTURE = {
    "expert_choice": "in evaluation, too",
    "soft": "in evaluation, too",
    "gshard": "where slots run out, in evaluation, too",
    "sinkhorn": "in training",
    "vmoe": "in training",
}
"""Recipes with moe.allow_noncausal, and whether evaluation looks at later tokens as well."""


def measure(path: Path) -> dict[str, float | int]:
    """Trains a recipe unless it is finished, and returns what `docs/routers.md` shows of it."""
    config = resolve(runpy.run_path(str(path))["get_config"]())
    workdir = ROOT / "runs/routers" / path.stem
    result = train(config, workdir, command=" ".join(["python", *sys.argv]))
    if result.stopped_by:
        sys.exit(0)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/lm" in line]
    evaluated = [line for line in lines if "eval/loss" in line][-1]
    last = trained[-3:]  # 30 steps
    parameters = count_parameters(config)
    return {
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
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
    """Runs the named recipes, or all."""
    paths = sorted((ROOT / "configs/routers").glob("*.py"))
    chosen = [path for path in paths if path.stem in sys.argv[1:] or len(sys.argv) == 1]
    for path in chosen:
        print(f"{path.stem} ...", flush=True)
        measured = measure(path)
        print(f"{path.stem}: {measured}", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results |= {path.stem: measured}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        write_table(results)
        jax.clear_caches()  # programs of other models are not needed again


if __name__ == "__main__":
    main()
