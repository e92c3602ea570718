"""The table of a sweep's settings: raw axes, matched leaves, means over seeds, and differences from one of them."""

import collections
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moejax.inspection import html
from moejax.inspection.analysis.differences import Difference
from moejax.inspection.figures.style import short_number
from moejax.sweeps.report.effects import compare_settings
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.tables import (
    BITS,
    LOSS,
    MATCHED,
    OVERRIDE,
    SEED,
    is_number,
    key_of,
    levels_of,
    loss_of,
    setting_key,
    settings_of,
)

METRICS: Mapping[str, tuple[str, str]] = {
    LOSS: ("eval loss", "nats per token"),
    BITS: ("bits per byte", "bits"),
    "tail/moe/max_violation": ("MaxVio", "busiest / mean - 1"),
    "tail/moe/dropped": ("drop rate", "share"),
    "step_s": ("step time", "s"),
    "median/perf/tokens_per_s": ("tokens per second", "tokens/s"),
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
        axis: key if leaves.count(leaf) > 1 else leaf
        for (axis, key), leaf in zip(keys.items(), leaves, strict=True)
    }


def numbered_settings(
    compared: pd.DataFrame, metrics: Sequence[str], planned: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """The settings, the lowest loss (see `loss_of`) first and numbered from 1, as tables and figures name them.

    Those of which some arms are not compared come last: their loss is a mean over the arms
    that survived.

    Args:
      compared: of `sweep_tables.at_fraction`.
      metrics: columns of it, that of the loss among them.
      planned: entries of all arms in `sweep.json`.

    Returns:
      What `settings_of` does, with `number`, and `planned`: how many arms of the setting
      there were to be.
    """
    settings = settings_of(compared, metrics)
    num_planned = collections.Counter(setting_key(entry["overrides"]) for entry in planned)
    settings[PLANNED] = [
        max(len(row["arms"]), num_planned[setting_key(_overrides(row))])
        for row in settings.to_dict("records")
    ]
    order = np.lexsort((settings[loss_of(compared)], _is_partial(settings)))
    settings = settings.iloc[order].reset_index(drop=True)
    settings.insert(0, NUMBER, range(1, len(settings) + 1))
    return settings


def varies(values: pd.Series | None) -> bool:
    """Whether a metric is there and not the same everywhere."""
    known = pd.Series(dtype=float) if values is None else values.dropna()
    return len(known) > 1 and float(np.ptp(known)) > 1e-9 * float(
        known.abs().max()
    )  # more than means are rounded


def constants_in_words(table: pd.DataFrame, metrics: Collection[str], rows: str) -> str:
    """Metrics that are the same in all rows, which need neither a column nor a figure; some rows may lack them."""
    in_all, in_some = [], []
    for metric in [key for key in METRICS if key in metrics and key in table]:
        values = table[metric].dropna()
        if len(values) and not varies(values):
            value = float(values.iloc[0])
            shown = short_number(value) if metric in COUNTS else mean_and_error(value, math.nan)
            said = f"{METRICS[metric][0]} {shown}"
            if len(values) == len(table):
                in_all.append(said)
            else:
                in_some.append(f"{said} ({len(values)} of {len(table)})")
    return " ".join(
        f"The same in {which}: {html.text(', '.join(same))}."
        for which, same in ((f"all {rows}", in_all), (f"the {rows} that have it", in_some))
        if same
    )


def reference_setting(
    rows: Sequence[Mapping[Any, Any]], planned: Sequence[Mapping[str, Any]]
) -> Mapping[Any, Any]:
    """The setting that the others are compared with: the dense control, or without one the first of the sweep.

    It is chosen before anything is measured: the best of many would owe part of its lead to chance.

    Args:
      rows: of `numbered_settings`, at least one.
      planned: entries of all arms in `sweep.json`.
    """
    dense = [row for row in rows if row.get(f"{OVERRIDE}moe.num_experts") == 0]
    place = {entry["id"]: i for i, entry in enumerate(planned)}
    return min(
        dense or rows, key=lambda row: min(place.get(arm, len(place)) for arm in row["arms"])
    )


def difference_in_words(difference: Difference) -> str:
    """`+0.012 (-0.030 to +0.054)`: a mean and its 95 % interval, if there is one; nothing without a pair."""
    if not difference.num_pairs:
        return ""
    if math.isnan(difference.se):
        return f"{float(f'{difference.mean:.3g}'):+g}"
    if difference.se <= 1e-9 * abs(difference.mean):  # but for rounding
        return f"{float(f'{difference.mean:.4g}'):+g} (in every seed)"
    places = _places(difference.high - difference.mean)
    mean, low, high = (
        f"{value:+,.{places}f}" for value in (difference.mean, difference.low, difference.high)
    )
    return f"{mean} ({low} to {high})"


def _is_partial(settings: pd.DataFrame) -> np.ndarray:
    return (settings[PLANNED] > settings["arms"].map(len)).to_numpy(bool)


def _overrides(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(OVERRIDE): value
        for name, value in row.items()
        if name.startswith(OVERRIDE)
    }


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
    return (
        sorted({int(size) for size in compared["packed"].dropna()}) if "packed" in compared else []
    )


def settings_table(
    settings: pd.DataFrame,
    compared: pd.DataFrame,
    matched: Sequence[str],
    planned: Sequence[Mapping[str, Any]],
) -> str:
    """The table with its introduction.

    Args:
      settings: of `numbered_settings`.
      compared: the arms it was made from.
      matched: columns of matched leaves, which stand beside the axes.
      planned: entries of all arms in `sweep.json`.
    """
    loss = loss_of(compared)
    axes = [
        str(name) for name in settings.columns if str(name).startswith(OVERRIDE) and name != SEED
    ]
    metrics = [key for key in METRICS if key != loss and varies(settings[key])]
    of_arm = {row["arm"]: row for row in compared.to_dict("records")}
    rows = settings.to_dict("records")
    reference = reference_setting(rows, planned)
    differences = compare_settings(compared, loss, reference["arms"], [row["arms"] for row in rows])
    has_others = len(rows) > 1
    head = [_head("setting", ""), _head(*METRICS[loss])]  # in sight, however many axes there are
    head += [_head(f"difference from {reference[NUMBER]}", "95 % interval")] * has_others
    head += [_head("arms", "done"), *(_head(axis.removeprefix(OVERRIDE), "") for axis in axes)]
    head += [_head(name.removeprefix(MATCHED), "matched") for name in matched]
    head += [*(_head(*METRICS[key]) for key in metrics), _head("folders", "in arms/")]
    body = []
    for row, difference in zip(rows, differences, strict=True):
        cells = [
            f'<th scope="row" data-number="{row[NUMBER]}">{row[NUMBER]}</th>',
            _metric_cell(row, loss),
        ]
        cells += [_difference_cell(difference, row[NUMBER] == reference[NUMBER])] * has_others
        cells += [
            _number_cell(len(row["arms"]), arms_in_words(row)),
            *(_level_cell(row[axis]) for axis in axes),
        ]
        cells += [_levels_cell([of_arm[arm].get(name) for arm in row["arms"]]) for name in matched]
        cells += [_metric_cell(row, key) for key in metrics]
        body.append(
            f"<tr>{''.join(cells)}<td><code>{html.text(' '.join(row['arms']))}</code></td></tr>"
        )
    said = [
        _introduction(settings, compared),
        constants_in_words(settings, set(METRICS) - {loss}, "settings"),
    ]
    if has_others:
        said.append(_told_apart(reference, rows, differences))
    return (
        "".join(f"<p>{text}</p>" for text in said if text)
        + f'<div class="scroll"><table class="numbers sortable"><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _introduction(settings: pd.DataFrame, compared: pd.DataFrame) -> str:
    partial = (
        "; those of which some arms are not compared come last, and their means, on all of this page, are over the "
        "other arms alone, which may be the lucky ones"
    ) * any(_is_partial(settings))  # fmt: skip
    shared = (
        " Arms of a pack train together: their step time is the pack's over its number of arms."
        * (max(_pack_sizes(compared), default=1) > 1)
    )
    return (
        "A setting is what all raw axes but the seed say; its values are means over seeds ± one standard error (none "
        f"if there is one seed). Settings are numbered by loss, the lowest first{partial}. MaxVio and drop "
        "rate are means over the last tenth of the schedule, tokens per second medians over all intervals. Empty: not "
        "measured, or not set."
        f"{shared}"
    )


def _told_apart(
    reference: Mapping[Any, Any],
    rows: Sequence[Mapping[Any, Any]],
    differences: Sequence[Difference],
) -> str:
    """How many settings differ from the reference by more than seeds do."""
    number, others = reference[NUMBER], len(rows) - 1
    is_dense = reference.get(f"{OVERRIDE}moe.num_experts") == 0
    kind = "the dense control" if is_dense else "the first of the sweep that is compared"
    what = f"Differences are from setting {number}, {kind}"
    num_seeds = [
        difference.num_seeds
        for row, difference in zip(rows, differences, strict=True)
        if row[NUMBER] != number
    ]
    if max(num_seeds) < 2:
        return (
            f"{what}. No two of its arms and another setting's have seeds in common, or one seed alone: nothing can be "
            "said about whether a difference is more than noise. Give each point several seeds (--seeds=3)."
        )
    told = sum(difference.is_told_apart for difference in differences)
    return (
        f"{what}, between arms of the same seed, with Student's interval over {_range_in_words(num_seeds)} seeds: it "
        f"leaves out 0 for {told} of {others} settings, {0.05 * others:.2g} of which would be expected by chance alone."
    )


def _range_in_words(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(high) if low == high else f"{low} to {high}"


def _head(name: str, unit: str) -> str:
    small = f'<br><small class="soft">{html.text(unit)}</small>' if unit else ""
    return f'<th scope="col">{html.text(name)}{small}</th>'


def _number_cell(value: float, shown: str) -> str:
    return f'<td data-number="{value!r}">{html.text(shown)}</td>'


def _difference_cell(difference: Difference, is_reference: bool) -> str:
    if is_reference:
        return '<td data-number="0">0</td>'
    if not difference.num_pairs:
        return "<td></td>"
    shown = html.text(difference_in_words(difference))
    return f'<td data-number="{difference.mean!r}">{f"<b>{shown}</b>" if difference.is_told_apart else shown}</td>'


def _level_cell(level: Any) -> str:
    if key_of(level) is None:
        return "<td></td>"
    if is_number(level):
        return _number_cell(level, f"{level:g}" if isinstance(level, float) else str(level))
    return f"<td>{html.text(level)}</td>"


def _levels_cell(values: Sequence[Any]) -> str:
    """A matched leaf of the arms of one setting: one value, as matching does not look at seeds."""
    levels = levels_of(values)
    return (
        _level_cell(levels[0])
        if len(levels) == 1
        else f"<td>{html.text(', '.join(map(level_name, levels)))}</td>"
    )


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
    places = _places(error)
    return f"{mean:,.{places}f} ± {error:,.{places}f}"


def _places(error: float) -> int:
    """Decimal places that show two digits of an error."""
    if not math.isfinite(error):  # of values near the largest that a float holds
        return 0
    return min(6, max(0, 1 - math.floor(math.log10(error))))
