"""Does routing collapse without balancing, and which schemes prevent it?

  python experiments/collapse/analysis.py [--from-results]

Reads the sweep in `runs/collapse`, which `sweep.py` describes, and writes `results.json` and
`figure.png`. With --from-results, figure and table are made from `results.json` only.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from moejax.inspection.figures.style import BLUE, GREY, ORANGE, PNG_DPI, PURPLE, STYLE, short_number
from moejax.sweeps.store.named_arms import named_arms
from moejax.training.run_directory.routing_log import read_routing

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SWEEP, RESULTS = ROOT / "runs/collapse", HERE / "results.json"

DEAD_STEPS = 50
"""Steps over which an expert is dead if it got less than `DEAD_SHARE` of a fair share."""

DEAD_SHARE = 0.05

LOOKS = {
    "none": ("#111111", "--"),
    "none_sigmoid": (GREY, "--"),
    "balance": (BLUE, "-"),
    "sequence_balance": ("#56B4E9", "-"),
    "importance": (ORANGE, "-"),
    "importance_load": (ORANGE, "--"),
    "importance_load_vmoe": ("#E69F00", "-"),
    "importance_no_noise": ("#E69F00", "-."),
    "bias": (PURPLE, "-"),
    "quantile": (PURPLE, "--"),
    "sinkhorn": ("#6A3D9A", "-"),
}
"""Colour and dash of each scheme.

Dark without balancing, blue for losses on loads, orange for losses on importance, purple for
biases.
"""


def read_sweep() -> dict[str, dict[str, Any]]:
    """Returns what `read` finds in each arm, by scheme and seed."""
    schemes = runpy.run_path(str(HERE / "sweep.py"))["SCHEMES"]
    results: dict[str, dict[str, Any]] = {}
    for found in named_arms(SWEEP, schemes):
        by_seed = results.setdefault(found.name, {})
        by_seed[str(found.seed)] = read(found.workdir)
    return results


def read(workdir: Path) -> dict[str, Any]:
    """Returns MaxVio and dead experts of a finished run over time, as means over layers."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss/lm" in line]
    evaluated = [line for line in lines if "eval/loss" in line][-1]
    history = read_routing(workdir)
    window = DEAD_STEPS // int(history.steps[1] - history.steps[0])
    windows = np.lib.stride_tricks.sliding_window_view(history.counts_SNE, window, axis=0)
    recent_SNE = windows.sum(axis=-1)
    fair_SN1 = recent_SNE.mean(axis=2, keepdims=True)
    num_dead_SN = (recent_SNE < DEAD_SHARE * fair_SN1).sum(axis=2)
    return {
        "steps": [line["step"] for line in trained],
        "max_violation": [line["moe/max_violation"] for line in trained],
        "dead_steps": history.steps[window - 1 :].tolist(),
        "dead": num_dead_SN.mean(axis=1).tolist(),
        "eval_max_violation": evaluated["eval/max_violation"],
        "eval_bits_per_byte": evaluated["eval/bits_per_byte"],
    }


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draws MaxVio and dead experts over time: means over the seeds, with their range."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 5), layout="constrained")
        for scheme, by_seed in results.items():
            runs = list(by_seed.values())
            draw_scheme(left, scheme, runs, "steps", "max_violation")
            draw_scheme(right, scheme, runs, "dead_steps", "dead")
        left.set(xlabel="training step", ylabel="MaxVio in training (mean over layers)")
        left.set(yscale="log")
        left.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short_number(y)))
        right.set(xlabel="training step", ylabel="dead experts of 16 (mean over layers)")
        right.set(ylim=(0, None))
        lines, names = left.get_legend_handles_labels()
        lines.append(Patch(color=GREY, alpha=0.3, linewidth=0))
        num_seeds = len(next(iter(results.values())))
        names.append(f"range of {num_seeds} seeds")
        figure.legend(lines, names, loc="outside lower center", ncols=4)
        figure.savefig(HERE / "figure.png", dpi=PNG_DPI, facecolor="white")


def draw_scheme(axes: Axes, scheme: str, runs: list[dict[str, Any]], steps: str, key: str) -> None:
    """Draws the mean of a scheme's runs and their range.

    Args:
      axes: to draw in.
      scheme: which one.
      runs: of its seeds.
      steps: the key of the steps.
      key: of the values.
    """
    color, dash = LOOKS[scheme]
    x_S = runs[0][steps]
    values_RS = np.array([run[key] for run in runs])
    mean_S = values_RS.mean(axis=0)
    low_S = values_RS.min(axis=0)
    high_S = values_RS.max(axis=0)
    axes.plot(x_S, mean_S, label=scheme, color=color, linestyle=dash)
    axes.fill_between(x_S, low_S, high_S, color=color, alpha=0.15, linewidth=0)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns the results as Markdown: means over seeds, and the range in parentheses."""
    rows = [
        "| scheme | MaxVio on held-out text | dead experts of 16 | bits per byte |",
        "|---|---|---|---|",
    ]
    for scheme, by_seed in results.items():
        violation = [run["eval_max_violation"] for run in by_seed.values()]
        dead = [run["dead"][-1] for run in by_seed.values()]
        bits = [run["eval_bits_per_byte"] for run in by_seed.values()]
        cells = []
        for values in (violation, dead, bits):
            cells.append(f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        rows.append(f"| `{scheme}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Reads the sweep, unless it is in `results.json`; then makes table and figure."""
    if "--from-results" not in sys.argv[1:]:
        RESULTS.write_text(json.dumps(read_sweep()) + "\n")
    results = json.loads(RESULTS.read_text())
    draw(results)
    print(table(results))


if __name__ == "__main__":
    main()
