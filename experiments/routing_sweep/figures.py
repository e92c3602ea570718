"""Reads `runs/routing_sweep`; writes `results.json`, `figure.png` and the tables of README.md beside this file.

  python experiments/routing_sweep/figures.py [--from-results]

With --from-results, figure and tables are made from `results.json` alone.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from moejax.inspection.sweep_tables import Effect, interaction, main_effect, settings_of, strength
from moejax.sweeps.records import read_records

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SWEEP, RESULTS, PAGE = ROOT / "runs/routing_sweep", HERE / "results.json", HERE / "README.md"
MARKS = ("<!-- measured: written by figures.py -->\n", "<!-- end -->")
AXES = {"router": "router", "scheme": "balancing", "num_experts": "experts", "top_k": "K"}
LOSS, VIOLATION, DEAD, SECONDS = "final/eval/loss", "final/eval/max_violation", "tail/moe/dead_experts", "step_s"
METRICS = (LOSS, VIOLATION, DEAD, SECONDS)
COLOURS = {"softmax_topk": "#0072b2", "sigmoid_topk": "#d55e00", "noisy_topk": "#009e73"}
MARKERS = {"none": "x", "loss": "o", "bias": "s"}


def read() -> list[dict[str, Any]]:
    """What the figures need of each arm's record."""
    schemes = runpy.run_path(str(HERE / "sweep.py"))["SCHEMES"]
    frame = read_records(SWEEP)
    rows = []
    for arm in frame.to_dict("records"):
        is_dense = arm["override/moe.num_experts"] == 0
        names = [
            name for name, leaves in schemes.items() if all(arm[f"override/{key}"] == v for key, v in leaves.items())
        ]
        rows.append(
            {
                "arm": arm["arm"],
                "router": None if is_dense else arm["override/moe.router"],
                "scheme": None if is_dense else names[0],
                "num_experts": arm["override/moe.num_experts"],
                "top_k": None if is_dense else arm["override/moe.top_k"],
                "seed": int(arm["seed"]),
                "status": arm["status"],
                "params_total": int(arm["params_total"]),
                "params_active": int(arm["params_active"]),
                **{name: None if np.isnan(arm[name]) else round(arm[name], 5) for name in METRICS},
            }
        )
    return rows


def settings(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds of the arms that are done, MoE and dense."""
    columns = {f"override/{name}": [row[name] for row in rows] for name in AXES}
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    frame["arm"] = [row["arm"] for row in rows]
    for name in METRICS:
        frame[name] = pd.Series([row[name] for row in rows], dtype=float)
    return settings_of(frame[[row["status"] == "done" for row in rows]], list(METRICS))


def split(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """The MoE settings, and the dense control."""
    is_dense = table["override/num_experts"] == 0
    return table[~is_dense], table[is_dense].iloc[0]


def effects(table: pd.DataFrame) -> dict[str, Effect]:
    """Of each axis on the loss."""
    return {name: main_effect(table, LOSS, f"override/{name}") for name in AXES}


def write_tables(table: pd.DataFrame) -> str:
    """Settings from the best to the worst, effects of axes, interactions."""
    moe, _ = split(table)
    lines = ["| router | balancing | experts | K | loss, nats | MaxVio | dead of all experts | ms a step |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in table.sort_values(LOSS).to_dict("records"):
        names = ["dense control", "", "", ""] if row["override/num_experts"] == 0 else [
            row[f"override/{name}"] for name in AXES]  # fmt: skip
        loss = f"{row[LOSS]:.4f} ± {row[f'{LOSS}/se']:.4f}"
        rest = ["", ""] if row["override/num_experts"] == 0 else [f"{row[VIOLATION]:.2f}", f"{row[DEAD]:.1f}"]
        lines.append("| " + " | ".join(map(str, [*names, loss, *rest, f"{1e3 * row[SECONDS]:.0f}"])) + " |")
    lines += ["", "| axis | mean loss by level | range |", "|---|---|---|"]
    for name, effect in effects(moe).items():
        means = {row["level"]: row["mean"] for row in effect.table.to_dict("records")}
        text = ", ".join(f"{level} {mean:.4f}" for level, mean in means.items())
        lines.append(f"| {AXES[name]} | {text} | {max(means.values()) - min(means.values()):.4f} |")
    lines += ["", "| pair | by how much its cells are not a sum of two effects, at most |", "|---|---|"]
    names = list(AXES)
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    found = {(a, b): strength(interaction(moe, LOSS, f"override/{a}", f"override/{b}")) for a, b in pairs}
    for (one, other), most in sorted(found.items(), key=lambda item: -item[1]):
        lines.append(f"| {AXES[one]} and {AXES[other]} | {most:.4f} |")
    return "\n".join(lines) + "\n"


def draw(table: pd.DataFrame) -> None:
    """Every setting with its standard error, and the effect of each axis."""
    moe, dense = split(table)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=(3, 2), layout="constrained")
    groups = [(experts, k) for experts in (8, 32) for k in (1, 4)]
    for router_index, (router, colour) in enumerate(COLOURS.items()):
        for scheme_index, (scheme, marker) in enumerate(MARKERS.items()):
            own = moe[(moe["override/router"] == router) & (moe["override/scheme"] == scheme)]
            by_group = {(row["override/num_experts"], row["override/top_k"]): row for row in own.to_dict("records")}
            places = [i + 0.26 * (router_index - 1) + 0.07 * (scheme_index - 1) for i in range(len(groups))]
            found = [by_group.get(group) for group in groups]
            left.errorbar(
                [place for place, row in zip(places, found, strict=True) if row],
                [row[LOSS] for row in found if row], yerr=[row[f"{LOSS}/se"] for row in found if row],
                color=colour, marker=marker, linestyle="none", capsize=2, label=f"{router}, {scheme}",
            )  # fmt: skip
    left.axhline(dense[LOSS], color="0.4", linestyle="--", label="dense control")
    left.set_xticks(range(len(groups)), [f"{experts} experts, K = {k}" for experts, k in groups])
    left.set_ylabel("validation loss, nats per token (standard error over seeds)")
    left.legend(fontsize=7, ncols=2)
    place, ticks = 0, []
    for name, effect in effects(moe).items():
        for row in effect.table.to_dict("records"):
            right.errorbar(row["mean"], place, xerr=row["se"], marker="o", color="black", capsize=2)
            ticks.append((place, f"{AXES[name]}: {row['level']}"))
            place -= 1
        place -= 0.6
    right.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    right.axvline(dense[LOSS], color="0.4", linestyle="--")
    right.set_xlabel("mean loss over the cells of the other axes\n(standard error over cells)")
    figure.savefig(HERE / "figure.png", dpi=110)


def main() -> None:
    """Records, if they are to be read; then tables and figure."""
    if "--from-results" not in sys.argv[1:]:
        rows = read()
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    table = settings(json.loads(RESULTS.read_text()))
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + write_tables(table) + MARKS[1] + rest.split(MARKS[1], 1)[1])
    draw(table)
    print(write_tables(table))


if __name__ == "__main__":
    main()
