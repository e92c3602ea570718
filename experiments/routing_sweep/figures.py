"""Reads `runs/routing_sweep`; writes `results.json`, `figure.png` and the tables of README.md beside this file.

  python experiments/routing_sweep/figures.py [--from-results]

With --from-results, figure and tables are made from `results.json` alone.
"""

import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from moejax.inspection.analysis.differences import Difference
from moejax.inspection.figures.style import PNG_DPI, STYLE
from moejax.sweeps.report.effects import AxisEffect, axis_effect, compare_settings, interaction
from moejax.sweeps.report.settings import difference_in_words
from moejax.sweeps.store.records import read_records
from moejax.sweeps.tables import settings_of

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend
from matplotlib.axes import Axes

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
SWEEP, RESULTS, PAGE = ROOT / "runs/routing_sweep", HERE / "results.json", HERE / "README.md"
MARKS = ("<!-- measured: written by figures.py -->\n", "<!-- end -->")
AXES = {"router": "router", "scheme": "balancing", "num_experts": "experts", "top_k": "K"}
LOSS, VIOLATION, DEAD, SECONDS = (
    "final/eval/loss",
    "final/eval/max_violation",
    "tail/moe/dead_experts",
    "step_s",
)
METRICS = (LOSS, VIOLATION, DEAD, SECONDS)
COLOURS = {"softmax_topk": "#0072b2", "sigmoid_topk": "#e69f00", "noisy_topk": "#cc79a7"}
MARKERS = {"none": "x", "loss": "o", "bias": "s"}


def read() -> list[dict[str, Any]]:
    """What the figures need of each arm's record."""
    schemes = runpy.run_path(str(HERE / "sweep.py"))["SCHEMES"]
    frame = read_records(SWEEP)
    rows = []
    for arm in frame.to_dict("records"):
        is_dense = arm["override/moe.num_experts"] == 0
        names = [
            name
            for name, leaves in schemes.items()
            if all(arm[f"override/{key}"] == v for key, v in leaves.items())
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


def arms(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The arms that are done, MoE and dense."""
    columns = {f"override/{name}": [row[name] for row in rows] for name in AXES}
    frame = pd.DataFrame(
        {name: pd.Series(values, dtype=object) for name, values in columns.items()}
    )
    for name in ("arm", "seed"):
        frame[name] = [row[name] for row in rows]
    for name in METRICS:
        frame[name] = pd.Series([row[name] for row in rows], dtype=float)
    return frame[[row["status"] == "done" for row in rows]].reset_index(drop=True)


def settings(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, the best first, with `difference`: from the dense control, between arms of one seed."""
    table = (
        settings_of(frame, list(METRICS)).sort_values(LOSS, kind="stable").reset_index(drop=True)
    )
    dense = table.loc[table["override/num_experts"] == 0, "arms"].iloc[0]
    table["difference"] = pd.Series(
        compare_settings(frame, LOSS, dense, list(table["arms"])), dtype=object
    )
    return table


def is_moe(frame: pd.DataFrame) -> pd.Series:
    """Of each row, whether it has experts."""
    return frame["override/num_experts"] != 0


def kinds(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The MoE arms of which effects are looked at, by name."""
    moe = frame[is_moe(frame)]
    return {
        "all routers": moe,
        "without the noisy router": moe[moe["override/router"] != "noisy_topk"],
    }


def effects(frame: pd.DataFrame) -> dict[str, AxisEffect]:
    """Of each axis on the loss."""
    return {name: axis_effect(frame, LOSS, f"override/{name}") for name in AXES}


def write_tables(frame: pd.DataFrame) -> str:
    """Settings from the best to the worst, effects of axes, interactions."""
    return (
        "\n".join([*_settings_lines(frame), "", *_effect_lines(frame), "", *_pair_lines(frame)])
        + "\n"
    )


def _settings_lines(frame: pd.DataFrame) -> list[str]:
    lines = [
        "| router | balancing | experts | K | loss, nats | from the dense control | MaxVio | dead experts | ms a step |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in settings(frame).to_dict("records"):
        is_dense = row["override/num_experts"] == 0
        names = (
            ["dense control", "", "", ""]
            if is_dense
            else [row[f"override/{name}"] for name in AXES]
        )
        loss = f"{row[LOSS]:.4f} ± {row[f'{LOSS}/se']:.4f}"
        rest = ["", "", ""]
        if not is_dense:
            rest = [_in_words(row["difference"]), f"{row[VIOLATION]:.2f}", f"{row[DEAD]:.1f}"]
        lines.append(
            "| " + " | ".join(map(str, [*names, loss, *rest, f"{1e3 * row[SECONDS]:.0f}"])) + " |"
        )
    return lines


def _in_words(difference: Difference) -> str:
    """With its 95 % interval, bold where that leaves out 0."""
    text = difference_in_words(difference)
    return f"**{text}**" if difference.is_told_apart else text


def _effect_lines(frame: pd.DataFrame) -> list[str]:
    lines = [f"| axis | level against level | {' | '.join(kinds(frame))} |", "|---|---|---|---|"]
    found = {kind: effects(of_kind) for kind, of_kind in kinds(frame).items()}
    for name, title in AXES.items():
        first = found["all routers"][name]
        for level in first.others:
            by_kind = []
            for of_kind in found.values():
                same = [other for other in of_kind[name].others if other.level == level.level]
                by_kind.append(_in_words(same[0].difference) if same else "")
            lines.append(
                f"| {title} | {level.level} against {first.reference} | {' | '.join(by_kind)} |"
            )
    return lines


def _pair_lines(frame: pd.DataFrame) -> list[str]:
    lines = [f"| pair | {' | '.join(kinds(frame))} |", "|---|---|---|"]
    for one, other in itertools.combinations(AXES, 2):
        by_kind = []
        for of_kind in kinds(frame).values():
            found = interaction(of_kind, LOSS, f"override/{one}", f"override/{other}")
            by_kind.append(_in_words(found.departure))
        lines.append(f"| {AXES[one]} and {AXES[other]} | {' | '.join(by_kind)} |")
    return lines


def draw(frame: pd.DataFrame) -> None:
    """Every setting with its standard error, and the effect of each axis with its interval."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 5.4), width_ratios=(3, 2), layout="constrained"
    )
    draw_settings(left, settings(frame))
    draw_effects(right, frame)
    figure.savefig(HERE / "figure.png", dpi=PNG_DPI, facecolor="white")


def draw_settings(axes: Axes, table: pd.DataFrame) -> None:
    """The loss of every setting, and of the dense control."""
    dense = table[~is_moe(table)].iloc[0]
    groups = [(experts, k) for experts in (8, 32) for k in (1, 4)]
    for router_index, (router, colour) in enumerate(COLOURS.items()):
        for scheme_index, (scheme, marker) in enumerate(MARKERS.items()):
            own = table[(table["override/router"] == router) & (table["override/scheme"] == scheme)]
            by_group = {
                (row["override/num_experts"], row["override/top_k"]): row
                for row in own.to_dict("records")
            }
            places = [
                i + 0.26 * (router_index - 1) + 0.07 * (scheme_index - 1)
                for i in range(len(groups))
            ]
            axes.errorbar(
                places, [by_group[group][LOSS] for group in groups],
                yerr=[by_group[group][f"{LOSS}/se"] for group in groups],
                color=colour, marker=marker, linestyle="none", capsize=2, label=f"{router}, {scheme}",
            )  # fmt: skip
    low, high = dense[LOSS] - dense[f"{LOSS}/se"], dense[LOSS] + dense[f"{LOSS}/se"]
    axes.axhline(dense[LOSS], color="0.4", linestyle="--", label="dense control")
    axes.axhspan(low, high, color="0.4", alpha=0.15, linewidth=0, label="its standard error")
    axes.set_xticks(range(len(groups)), [f"{experts} experts, K = {k}" for experts, k in groups])
    axes.set_ylabel("validation loss, nats per token\n(mean over seeds, with its standard error)")
    axes.legend(fontsize=7, ncols=2)


def draw_effects(axes: Axes, frame: pd.DataFrame) -> None:
    """The difference of each level from the first; hollow where the interval holds 0."""
    looks = {"all routers": ("black", "o", 0.0), "without the noisy router": ("#0072b2", "s", -0.3)}
    ticks: dict[str, float] = {}
    for name, effect in effects(kinds(frame)["all routers"]).items():
        for level in effect.others:
            ticks[f"{AXES[name]}: {level.level}\nagainst {effect.reference}"] = -1.0 * len(ticks)
    for kind, (colour, marker, shift) in looks.items():
        for name, effect in effects(kinds(frame)[kind]).items():
            for level in effect.others:
                place = ticks[f"{AXES[name]}: {level.level}\nagainst {effect.reference}"] + shift
                found = level.difference
                face = colour if found.is_told_apart else "white"
                reach = found.high - found.mean
                axes.errorbar(
                    found.mean, place, xerr=reach, marker=marker, color=colour, mfc=face, capsize=2
                )
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=kind)
    axes.plot(
        [],
        [],
        marker="o",
        color="black",
        mfc="white",
        linestyle="none",
        label="hollow: may be noise",
    )
    axes.axvline(0, color="0.4", linestyle="--", label="no difference")
    axes.set_yticks([at - 0.15 for at in ticks.values()], list(ticks))
    axes.set_xlabel(
        "difference in loss, nats per token\n(arms of one seed, 95 % interval over 3 seeds)"
    )
    axes.legend(fontsize=7, loc="lower right")


def main() -> None:
    """Records, if they are to be read; then tables and figure."""
    if "--from-results" not in sys.argv[1:]:
        rows = read()
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    frame = arms(json.loads(RESULTS.read_text()))
    before, rest = PAGE.read_text().split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + write_tables(frame) + MARKS[1] + rest.split(MARKS[1], 1)[1])
    with matplotlib.rc_context(STYLE):
        draw(frame)
    print(write_tables(frame))


if __name__ == "__main__":
    main()
