"""A sweep as one HTML page: what was swept, how it ended, every setting, and what the axes do.

Compared are the arms that are done, at the end of their schedule; all others are listed with the
reason. The page reads without its script, which sorts the table of settings.
"""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from moejax.inspection import html
from moejax.inspection.html import Markup
from moejax.inspection.report.page import Section, details, render_page, table
from moejax.inspection.runs.token_keys import comparison_note
from moejax.sweeps.report.effect_plots import effects, has_one_seed
from moejax.sweeps.report.fair_section import fair_section
from moejax.sweeps.report.interaction_plots import interactions
from moejax.sweeps.report.plots import count, fronts, parallel
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.report.settings import METRIC_KEYS, numbered_settings, pack_note, short_names
from moejax.sweeps.report.settings_table import settings_table
from moejax.sweeps.tables import MATCHED, OVERRIDE, at_fraction, axes_of, levels_of, setting_key

OTHER_STATUSES = ("stopped", "failed", "pruned")  # than done
MATCHES = {
    "": "none",
    "active_params": "equal active parameters",
    "total_params": "equal total parameters",
    "flops": "equal FLOPs per token",
}
MAX_LEVELS = 12  # of an axis, listed
MAX_LETTERS = 60  # of a level
MAX_OPEN = 20  # rows of a list that is open from the start

Entries = Sequence[Mapping[str, Any]]
"""Of all arms in `sweep.json`."""


def build_sweep_page(
    frame: pd.DataFrame, definition: Mapping[str, Any], name: str = "", rates: Entries = ()
) -> str:
    """Renders the page.

    Args:
      frame: rows of the arms that have ended, from `sweep_tables.frame_of`.
      definition: what `sweep.json` holds.
      name: of the sweep, its title; without one it is the recipe.
      rates: learning rates that trials found, from `store.fair_rates`.

    Returns:
      An HTML document.
    """
    planned = definition["arms"]
    compared, left_out = at_fraction(frame)
    summary = _summary(frame, definition) + _outcome(frame, planned)
    sections: list[Section] = [
        ("summary", "What was swept", summary),
        *_compared_sections(compared, planned),
        *_fair_sections(rates),
        ("left-out", "Arms that are not compared", _left_out(frame, left_out, planned)),
    ]
    recipe = str(definition.get("recipe") or "")
    subtitle = "A sweep"
    if recipe and name:
        subtitle = html.render("sweep/subtitle", recipe=recipe)
    title = name or recipe or "Sweep"
    script = html.render("sweep/sort_script")
    return render_page(title, subtitle, sections, kind="sweep", script=script)


def _compared_sections(compared: pd.DataFrame, planned: Entries) -> list[Section]:
    settings = numbered_settings(compared, METRIC_KEYS, planned)
    if not len(settings):
        nothing = html.paragraph("No arm is done, so there is nothing to compare.")
        return [("settings", "Settings", nothing)]
    axes = short_names(axes_of(compared))
    packs = pack_note(compared)
    is_one_seed = has_one_seed(compared)
    matched = _columns_of(compared.columns, MATCHED)
    listed = _token_note(axes) + settings_table(settings, compared, matched, planned)
    traded = fronts(settings, axes, packs, is_one_seed)
    return [
        ("settings", "Settings", listed),
        ("effects", "Effect of each axis", effects(compared, axes, packs)),
        ("interactions", "Effect of pairs of axes", interactions(compared, axes)),
        ("parallel", "All settings at once", parallel(settings, axes, is_one_seed)),
        ("fronts", "Loss against drops and time", traded),
    ]


def _fair_sections(rates: Entries) -> list[Section]:
    return [("rates", "Learning rates", fair_section(rates))] if rates else []


def _token_note(axes: Iterable[str]) -> Markup:
    note = comparison_note(axis.removeprefix(OVERRIDE) for axis in axes)
    return html.paragraph(note)


def _summary(frame: pd.DataFrame, definition: Mapping[str, Any]) -> Markup:
    planned = definition["arms"]
    match = str(definition.get("match") or "")
    versions = definition.get("versions") or {}
    levels_by_key = _swept(planned)
    command = str(definition.get("command") or "not known")
    packs = definition.get("packs") or []
    rows: list[tuple[Any, Any]] = [
        ("Recipe", definition.get("recipe") or "not known"),
        ("Command", _command(command)),
        ("Arms", _arms(planned, levels_by_key.get("train.seed", []))),
    ]
    for key, levels in levels_by_key.items():
        rows.append((html.code(key), _levels(levels)))
    named = [f"{name} {version}" for name, version in versions.items()]
    rows += [
        ("Matched", MATCHES.get(match, match)),
        ("Packs", _packs(packs)),
        ("Versions", ", ".join(named)),
        ("Commit", definition.get("git_commit") or "not known"),
    ]
    devices = _devices(frame)
    if devices:
        title = "Device" if len(devices) == 1 else "Devices"
        rows.append((title, "; ".join(devices)))
    return table((), rows, "facts")


def _devices(frame: pd.DataFrame) -> list[str]:
    """Returns the devices that arms were trained on, each once."""
    if "device" not in frame:
        return []
    known = frame["device"].dropna()
    return list(map(str, dict.fromkeys(known)))


def _swept(planned: Entries) -> dict[str, list[Any]]:
    """Returns the keys that some arm overrides, with their levels."""
    overrides = [entry["overrides"] for entry in planned]
    keys: dict[str, None] = {}  # an ordered set
    for values in overrides:
        keys |= dict.fromkeys(values)
    found = {}
    for key in keys:
        found[key] = levels_of(values.get(key) for values in overrides)
    return found


def _arms(planned: Entries, seeds: Sequence[Any]) -> str:
    keys = {setting_key(entry["overrides"]) for entry in planned}
    settings = count(len(keys), "setting")
    of_seeds = count(len(seeds), "seed") if seeds else "no seed axis"
    return f"{len(planned)}: {settings}, {of_seeds}"


def _command(command: str) -> Markup:
    """Returns a command whose flags are not broken at their hyphens where a line ends."""
    return html.render("sweep/command", words=command.split())


def _levels(levels: Sequence[Any]) -> Markup:
    shown = [level_name(level, MAX_LETTERS) for level in levels[:MAX_LEVELS]]
    num_more = len(levels) - len(shown)
    return html.render("sweep/levels", levels=shown, num_more=num_more)


def _packs(packs: Sequence[Sequence[str]]) -> str:
    if not packs:
        return "none"
    largest = max(map(len, packs))
    if largest == 1:
        return "none: one arm at a time"
    return f"{len(packs)}, of at most {largest} arms trained together"


def _outcome(frame: pd.DataFrame, planned: Entries) -> Markup:
    """Says how many arms ended how, and which alarms they raised."""
    num_by_status = collections.Counter(frame["status"])
    ids = [entry["id"] for entry in planned]
    is_known = frame["arm"].isin(ids)
    num_missing = len(planned) - int(is_known.sum())
    parts = [f"{num_by_status['done']} done"]
    for status in OTHER_STATUSES:
        num_arms = num_by_status[status]
        if num_arms:
            parts.append(f"{num_arms} {status}")
    if num_missing:
        parts.append(f"{num_missing} not ended")
    return html.render(
        "sweep/outcome",
        is_bad=num_by_status["failed"] > 0 or num_by_status["stopped"] > 0,
        planned=count(len(planned), "arm"),
        parts=parts,
        alarms=_alarms(frame),
    )


def _alarms(frame: pd.DataFrame) -> Markup:
    arms_by_rule = _arms_by_rule(frame)
    if not arms_by_rule:
        return html.paragraph("No arm raised an alarm.")

    def num_arms(rule: str) -> int:
        return len(arms_by_rule[rule])

    rows = []
    found: set[str] = set()
    for rule in sorted(arms_by_rule, key=num_arms, reverse=True):
        arms = arms_by_rule[rule]
        rows.append((rule, str(len(arms)), _lines_of_code(arms)))
        found.update(arms)
    listed = table(("alarm", "arms", ""), rows, "events")
    num_found = len(found)
    all_arms = count(len(frame), "arm")
    raised = html.paragraph(f"{num_found} of {all_arms} raised alarms.", "warning")
    return raised + details("Which arms", listed, is_open=num_found <= MAX_OPEN)


def _arms_by_rule(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Returns the arms that raised each alarm, with their levels."""
    arms_by_rule: dict[str, list[str]] = {}
    if "alarm_rules" not in frame:
        return arms_by_rule
    names = short_names(_columns_of(frame.columns, OVERRIDE))
    for row in frame.to_dict("records"):
        arm = _arm_in_words(row, names)
        rules = json.loads(row["alarm_rules"] or "[]")
        for rule in rules:
            arms = arms_by_rule.setdefault(str(rule), [])
            arms.append(arm)
    return arms_by_rule


def _arm_in_words(row: Mapping[Any, Any], names: Mapping[str, str]) -> str:
    """Returns an arm's id with its levels."""
    arm = str(row["arm"])
    levels = []
    for axis, name in names.items():
        level = row[axis]
        if level is not None:
            levels.append(f"{name} {level_name(level)}")
    if not levels:
        return arm
    listed = ", ".join(levels)
    return f"{arm} ({listed})"


def _lines_of_code(lines: Sequence[str]) -> Markup:
    return html.render("sweep/lines_of_code", lines=lines)


def _left_out(frame: pd.DataFrame, left_out: pd.DataFrame, planned: Entries) -> Markup:
    """Returns a table of the arms that are not compared, with the reason of each."""
    reasons = _reasons(frame, left_out, planned)
    if not reasons:
        return html.paragraph("None: every arm is done and compared.")
    overrides = _overrides_by_arm(frame, planned)
    rows = []
    for arm, reason in reasons.items():
        rows.append((html.code(arm), _overrides(overrides[arm]), reason))
    listed = table(("arm", "overrides", "why"), rows, "events")
    num_arms = len(rows)
    if num_arms > MAX_OPEN:
        listed = details(f"All {num_arms}", listed)
    counted = count(num_arms, "arm")
    return html.paragraph(f"{counted}.") + listed


def _reasons(frame: pd.DataFrame, left_out: pd.DataFrame, planned: Entries) -> dict[str, str]:
    """Returns why arms are not compared, by id: those that have ended, then the others."""
    reasons = {row["arm"]: str(row["reason"]) for row in left_out.to_dict("records")}
    ended = set(frame["arm"])
    for entry in planned:
        arm = entry["id"]
        if arm not in ended:
            reasons[arm] = "not ended"
    return reasons


def _overrides_by_arm(frame: pd.DataFrame, planned: Entries) -> dict[str, Mapping[str, Any]]:
    """Returns what the sweep sets in each arm; what was recorded of arms that it does not know."""
    overrides = {}
    for entry in planned:
        arm = entry["id"]
        overrides[arm] = entry["overrides"]
    for row in frame.to_dict("records"):
        arm = row["arm"]
        if not overrides.get(arm):
            overrides[arm] = _recorded_overrides(row)
    return overrides


def _recorded_overrides(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the overrides in the row of an arm."""
    columns = _columns_of(row, OVERRIDE)
    return {name.removeprefix(OVERRIDE): row[name] for name in columns}


def _columns_of(columns: Iterable[Any], prefix: str) -> list[str]:
    """Returns the names that begin with a prefix, in order."""
    names = map(str, columns)
    return [name for name in names if name.startswith(prefix)]


def _overrides(values: Mapping[str, Any]) -> Markup:
    lines = []
    for key, value in values.items():
        if value is not None:
            lines.append(f"{key}={level_name(value, MAX_LETTERS)}")
    return _lines_of_code(lines)
