"""Trains every recipe of `configs/routers/` and writes what each reaches to `results.json` beside this file.

  python experiments/routers/run.py [NAME ...]

A recipe that is done is not run again; `runs/routers/NAME` holds its run. Figures of recipes that are not named stay.
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


def measure(path: Path) -> dict[str, float | int]:
    """Trains a recipe, or takes its finished run, and returns what `docs/routers.md` shows of it."""
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


def main() -> None:
    """Runs what is named, or everything."""
    paths = sorted((ROOT / "configs/routers").glob("*.py"))
    chosen = [path for path in paths if path.stem in sys.argv[1:] or len(sys.argv) == 1]
    for path in chosen:
        print(f"{path.stem} ...", flush=True)
        measured = measure(path)
        print(f"{path.stem}: {measured}", flush=True)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(results | {path.stem: measured}, indent=1, sort_keys=True) + "\n")
        jax.clear_caches()  # programs of other models are not needed again


if __name__ == "__main__":
    main()
