"""Reads `runs/routing_sweep` and writes `results.json`, `figure.png` and the tables of README.md.

  python experiments/routing_sweep/analysis.py [--from-results]

With --from-results, figure and tables are made from `results.json` only.
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
MARKS = ("<!-- measured: written by analysis.py -->\n", "<!-- end -->")
AXES = {"router": "router", "scheme": "balancing", "num_experts": "experts", "top_k": "K"}
LOSS = "final/eval/loss"
VIOLATION = "final/eval/max_violation"
DEAD = "tail/moe/dead_experts"
SECONDS = "step_s"
METRICS = (LOSS, VIOLATION, DEAD, SECONDS)
COLOURS = {"softmax_topk": "#0072b2", "sigmoid_topk": "#e69f00", "noisy_topk": "#cc79a7"}
MARKERS = {"none": "x", "loss": "o", "bias": "s"}


def read() -> list[dict[str, Any]]:
    """Returns what the figures need of each arm's record."""
    schemes = runpy.run_path(str(HERE / "sweep.py"))["SCHEMES"]
    return [read_arm(arm, schemes) for arm in read_records(SWEEP).to_dict("records")]


def read_arm(arm: dict[Any, Any], schemes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns what the figures need of an arm's record."""
    is_dense = arm["override/moe.num_experts"] == 0
    row = {
        "arm": arm["arm"],
        "router": None if is_dense else arm["override/moe.router"],
        "scheme": None if is_dense else scheme_of(arm, schemes),
        "num_experts": arm["override/moe.num_experts"],
        "top_k": None if is_dense else arm["override/moe.top_k"],
        "seed": int(arm["seed"]),
        "status": arm["status"],
        "params_total": int(arm["params_total"]),
        "params_active": int(arm["params_active"]),
    }
    for name in METRICS:
        row[name] = None if np.isnan(arm[name]) else round(arm[name], 5)
    return row


def scheme_of(arm: dict[Any, Any], schemes: dict[str, dict[str, Any]]) -> str:
    """Returns the name of the balancing scheme of an arm with experts."""
    for name, leaves in schemes.items():
        own_values = {key: arm[f"override/{key}"] for key in leaves}
        if own_values == leaves:
            return name
    raise ValueError(f"arm {arm['arm']} has none of the schemes {', '.join(schemes)}")


def arms(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Returns the arms that are done, MoE and dense."""
    frame = pd.DataFrame()
    for name in AXES:
        frame[f"override/{name}"] = pd.Series([row[name] for row in rows], dtype=object)
    for name in ("arm", "seed"):
        frame[name] = [row[name] for row in rows]
    for name in METRICS:
        frame[name] = pd.Series([row[name] for row in rows], dtype=float)
    return frame[[row["status"] == "done" for row in rows]].reset_index(drop=True)


def settings(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns means over seeds, the best first.

    The column `difference` is the one from the dense control, between arms of one seed.
    """
    means = settings_of(frame, list(METRICS))
    table = means.sort_values(LOSS, kind="stable").reset_index(drop=True)
    dense = table.loc[table["override/num_experts"] == 0, "arms"].iloc[0]
    differences = compare_settings(frame, LOSS, dense, list(table["arms"]))
    table["difference"] = pd.Series(differences, dtype=object)
    return table


def is_moe(frame: pd.DataFrame) -> pd.Series:
    """Returns for each row whether it has experts."""
    return frame["override/num_experts"] != 0


def kinds(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the groups of MoE arms whose effects are examined, by name."""
    moe = frame[is_moe(frame)]
    is_noisy = moe["override/router"] == "noisy_topk"
    return {"all routers": moe, "without the noisy router": moe[~is_noisy]}


def effects(frame: pd.DataFrame) -> dict[str, AxisEffect]:
    """Returns the effect of each axis on the loss."""
    return {name: axis_effect(frame, LOSS, f"override/{name}") for name in AXES}


def write_tables(frame: pd.DataFrame) -> str:
    """Returns the tables: settings from the best to the worst, effects of axes, interactions."""
    lines = [*_settings_lines(frame), "", *_effect_lines(frame), "", *_pair_lines(frame)]
    return "\n".join(lines) + "\n"


def _settings_lines(frame: pd.DataFrame) -> list[str]:
    lines = [
        "| router | balancing | experts | K | loss, nats | from the dense control | MaxVio "
        "| dead experts | ms a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in settings(frame).to_dict("records"):
        names, routing = ["dense control", "", "", ""], ["", "", ""]
        if row["override/num_experts"] != 0:
            names = [row[f"override/{name}"] for name in AXES]
            routing = [_in_words(row["difference"]), f"{row[VIOLATION]:.2f}", f"{row[DEAD]:.1f}"]
        loss = f"{row[LOSS]:.4f} ± {row[f'{LOSS}/se']:.4f}"
        cells = [*names, loss, *routing, f"{1e3 * row[SECONDS]:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _in_words(difference: Difference) -> str:
    """Returns a difference with its 95 % interval, bold where the interval excludes 0."""
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
    """Draws every setting with its standard error, and each axis's effect with its interval."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 5.4), width_ratios=(3, 2), layout="constrained"
    )
    draw_settings(left, settings(frame))
    draw_effects(right, frame)
    figure.savefig(HERE / "figure.png", dpi=PNG_DPI, facecolor="white")


def draw_settings(axes: Axes, table: pd.DataFrame) -> None:
    """Draws the loss of every setting, and of the dense control."""
    groups = [(experts, k) for experts in (8, 32) for k in (1, 4)]
    for router_index, (router, colour) in enumerate(COLOURS.items()):
        for scheme_index, (scheme, marker) in enumerate(MARKERS.items()):
            is_own = (table["override/router"] == router) & (table["override/scheme"] == scheme)
            own = table[is_own].set_index(["override/num_experts", "override/top_k"]).loc[groups]
            shift = 0.26 * (router_index - 1) + 0.07 * (scheme_index - 1)
            axes.errorbar(
                [i + shift for i in range(len(groups))],
                list(own[LOSS]),
                yerr=list(own[f"{LOSS}/se"]),
                color=colour,
                marker=marker,
                linestyle="none",
                capsize=2,
                label=f"{router}, {scheme}",
            )
    dense = table[~is_moe(table)].iloc[0]
    loss, error = dense[LOSS], dense[f"{LOSS}/se"]
    axes.axhline(loss, color="0.4", linestyle="--", label="dense control")
    axes.axhspan(
        loss - error, loss + error, color="0.4", alpha=0.15, linewidth=0, label="its standard error"
    )
    axes.set_xticks(range(len(groups)), [f"{experts} experts, K = {k}" for experts, k in groups])
    axes.set_ylabel("validation loss, nats per token\n(mean over seeds, with its standard error)")
    axes.legend(fontsize=7, ncols=2)


def draw_effects(axes: Axes, frame: pd.DataFrame) -> None:
    """Draws the difference of each level from the first; hollow where the interval includes 0."""
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
                look = {
                    "marker": marker, "color": colour, "capsize": 2,
                    "mfc": colour if found.is_told_apart else "white",
                }  # fmt: skip
                axes.errorbar(found.mean, place, xerr=found.high - found.mean, **look)
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=kind)
    hollow = {"marker": "o", "color": "black", "mfc": "white", "linestyle": "none"}
    axes.plot([], [], **hollow, label="hollow: may be noise")
    axes.axvline(0, color="0.4", linestyle="--", label="no difference")
    axes.set_yticks([at - 0.15 for at in ticks.values()], list(ticks))
    axes.set_xlabel(
        "difference in loss, nats per token\n(arms of one seed, 95 % interval over 3 seeds)"
    )
    axes.legend(fontsize=7, loc="lower right")


def main() -> None:
    """Reads the records, unless they are in `results.json`; then makes tables and figure."""
    if "--from-results" not in sys.argv[1:]:
        rows = read()
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    frame = arms(json.loads(RESULTS.read_text()))
    start, end = MARKS
    before, rest = PAGE.read_text().split(start)
    _, after = rest.split(end, 1)
    PAGE.write_text(before + start + write_tables(frame) + end + after)
    with matplotlib.rc_context(STYLE):
        draw(frame)
    print(write_tables(frame))


if __name__ == "__main__":
    main()
