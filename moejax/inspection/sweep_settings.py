"""The table of a sweep's settings: raw axes, matched leaves, and means over seeds with their standard errors."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moejax.inspection import html
from moejax.inspection.style import short_number
from moejax.inspection.sweep_scale import level_name
from moejax.inspection.sweep_tables import (
    LOSS,
    MATCHED,
    OVERRIDE,
    SEED,
    is_number,
    key_of,
    levels_of,
    setting_key,
    settings_of,
)

METRICS: Mapping[str, tuple[str, str]] = {
    LOSS: ("eval loss", "nats per token"),
    "final/eval/bits_per_byte": ("bits per byte", "bits"),
    "tail/moe/max_violation": ("MaxVio", "busiest / mean - 1"),
    "tail/moe/dropped": ("drop rate", "share"),
    "step_s": ("step time", "s"),
    "tail/perf/tokens_per_s": ("tokens per second", "tokens/s"),
    "params_total": ("parameters", "in total"),
    "params_active": ("active", "parameters of a token"),
    "flops_per_token": ("FLOPs per token", "FLOPs"),
}
"""Columns of the table: name and unit of each."""

METRIC_KEYS = tuple(METRICS)
COUNTS = ("params_total", "params_active", "flops_per_token")
NUMBER, PLANNED = "number", "planned"
SORT_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, i) => {
    const cell = row.cells[i], text = cell.textContent.trim();
    return "number" in cell.dataset ? Number(cell.dataset.number) : text;
  };
  const rank = v => v === "" ? 2 : typeof v === "number" ? 0 : 1;
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort((one, other) => {
        const a = value(one, i), b = value(other, i);
        if (rank(a) === 2 || rank(b) === 2) return rank(a) - rank(b);
        if (rank(a) !== rank(b)) return sign * (rank(a) - rank(b));
        return sign * (rank(a) === 0 ? a - b : a.localeCompare(b));
      }));
    });
  });
}
"""
"""Sorts a table by the column whose title is clicked or chosen by keyboard; cells without a value stay last."""


def short_names(axes: Sequence[str]) -> dict[str, str]:
    """From columns of axes to names: the leaf, with its section where two axes have the same leaf."""
    keys = {axis: axis.removeprefix(OVERRIDE) for axis in axes}
    leaves = [key.rpartition(".")[2] for key in keys.values()]
    return {
        axis: key if leaves.count(leaf) > 1 else leaf for (axis, key), leaf in zip(keys.items(), leaves, strict=True)
    }


def numbered_settings(
    compared: pd.DataFrame, metrics: Sequence[str], planned: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """The settings, the lowest loss first and numbered from 1, as tables and figures name them.

    Those of which some arms are not compared come last: their loss is a mean over the arms that survived.

    Args:
      compared: of `sweep_tables.at_fraction`.
      metrics: columns of it.
      planned: entries of all arms in `sweep.json`.

    Returns:
      What `settings_of` does, with `number`, and `planned`: how many arms of the setting there were to be.
    """
    settings = settings_of(compared, metrics)
    num_planned = collections.Counter(setting_key(entry["overrides"]) for entry in planned)
    settings[PLANNED] = [
        max(len(row["arms"]), num_planned[setting_key(_overrides(row))]) for row in settings.to_dict("records")
    ]
    order = np.lexsort((settings[LOSS], _is_partial(settings)))
    settings = settings.iloc[order].reset_index(drop=True)
    settings.insert(0, NUMBER, range(1, len(settings) + 1))
    return settings


def _is_partial(settings: pd.DataFrame) -> np.ndarray:
    return (settings[PLANNED] > settings["arms"].map(len)).to_numpy(bool)


def _overrides(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name.removeprefix(OVERRIDE): value for name, value in row.items() if name.startswith(OVERRIDE)}


def arms_in_words(row: Mapping[Any, Any]) -> str:
    """Of how many arms a setting is the mean: `3`, or `1 of 3` if not all are compared."""
    num_arms = len(row["arms"])
    return str(num_arms) if num_arms == row[PLANNED] else f"{num_arms} of {row[PLANNED]}"


def pack_note(compared: pd.DataFrame) -> str:
    """What is to be said beside step times of arms in packs of different sizes; nothing if there is one size."""
    sizes = _pack_sizes(compared)
    if len(sizes) < 2:
        return ""
    return (
        f"Arms trained in packs of {sizes[0]} to {sizes[-1]}, and the time of an arm is its pack's over their number: "
        "part of a difference is that of the packs."
    )


def _pack_sizes(compared: pd.DataFrame) -> list[int]:
    return sorted({int(size) for size in compared["packed"].dropna()}) if "packed" in compared else []


def settings_table(settings: pd.DataFrame, compared: pd.DataFrame, matched: Sequence[str]) -> str:
    """The table with its introduction.

    Args:
      settings: of `numbered_settings`.
      compared: the arms it was made from.
      matched: columns of matched leaves, which stand beside the axes.
    """
    axes = [str(name) for name in settings.columns if str(name).startswith(OVERRIDE) and name != SEED]
    metrics = [key for key in METRICS if key != LOSS and settings[key].notna().any()]
    of_arm = {row["arm"]: row for row in compared.to_dict("records")}
    head = [_head("setting", ""), _head(*METRICS[LOSS]), _head("arms", "done")]  # in sight, however many axes there are
    head += [_head(axis.removeprefix(OVERRIDE), "") for axis in axes]
    head += [_head(name.removeprefix(MATCHED), "matched") for name in matched]
    head += [*(_head(*METRICS[key]) for key in metrics), _head("folders", "in arms/")]
    rows = []
    for row in settings.to_dict("records"):
        cells = [_metric_cell(row, LOSS), _number_cell(len(row["arms"]), arms_in_words(row))]
        cells += [_level_cell(row[axis]) for axis in axes]
        cells += [_levels_cell([of_arm[arm].get(name) for arm in row["arms"]]) for name in matched]
        cells += [_metric_cell(row, key) for key in metrics]
        cells.append(f"<td><code>{html.text(' '.join(row['arms']))}</code></td>")
        number = f'<th scope="row" data-number="{row[NUMBER]}">{row[NUMBER]}</th>'
        rows.append(f"<tr>{number}{''.join(cells)}</tr>")
    return (
        f"<p>{_introduction(settings, compared)}</p>"
        f'<div class="scroll"><table class="numbers sortable"><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _introduction(settings: pd.DataFrame, compared: pd.DataFrame) -> str:
    partial = (
        "; those of which some arms are not compared come last, and their means, on all of this page, are over the "
        "other arms alone, which may be the lucky ones"
    ) * any(_is_partial(settings))  # fmt: skip
    shared = " Arms of a pack train together: their step time is the pack's over its number of arms." * (
        max(_pack_sizes(compared), default=1) > 1
    )
    return (
        "A setting is what all raw axes but the seed say; its values are means over seeds ± one standard error (none "
        f"if there is one seed). Settings are numbered by loss, the lowest first{partial}. MaxVio, drop rate and "
        "tokens per second are means over the last tenth of the schedule. Empty: not measured, or not set."
        f"{shared}"
    )


def _head(name: str, unit: str) -> str:
    small = f'<br><small class="soft">{html.text(unit)}</small>' if unit else ""
    return f'<th scope="col">{html.text(name)}{small}</th>'


def _number_cell(value: float, shown: str) -> str:
    return f'<td data-number="{value!r}">{html.text(shown)}</td>'


def _level_cell(level: Any) -> str:
    if key_of(level) is None:
        return "<td></td>"
    if is_number(level):
        return _number_cell(level, f"{level:g}" if isinstance(level, float) else str(level))
    return f"<td>{html.text(level)}</td>"


def _levels_cell(values: Sequence[Any]) -> str:
    """A matched leaf of the arms of one setting: one value, as matching does not look at seeds."""
    levels = levels_of(values)
    return _level_cell(levels[0]) if len(levels) == 1 else f"<td>{html.text(', '.join(map(level_name, levels)))}</td>"


def _metric_cell(row: Mapping[Any, Any], key: str) -> str:
    mean, error = float(row[key]), float(row[f"{key}/se"])
    if math.isnan(mean):
        return "<td></td>"
    if key in COUNTS:
        return _number_cell(mean, short_number(mean))
    return _number_cell(mean, mean_and_error(mean, error))


def mean_and_error(mean: float, error: float) -> str:
    """A mean, with its standard error to two digits and itself to as many places; alone if there is no error."""
    if math.isnan(error) or error <= 1e-9 * abs(mean):  # the seeds agree but for rounding
        return f"{mean:,.0f}" if abs(mean) >= 10_000 else f"{float(f'{mean:.4g}'):g}"
    places = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:,.{places}f} ± {error:,.{places}f}"
