"""A sweep as one HTML page: what was swept and how it ended, every setting, and what the axes do to loss and balance.

Compared are the arms that are done, at the end of their schedule; all others are listed with the
reason. The page reads without its script, which sorts the table of settings.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from moejax.inspection import html
from moejax.inspection.report.page import Section, details, render_page, table
from moejax.inspection.runs.token_keys import comparison_note
from moejax.sweeps.report.effect_plots import effects, has_one_seed, interactions
from moejax.sweeps.report.plots import count, fronts, parallel
from moejax.sweeps.report.scale import level_name
from moejax.sweeps.report.settings import (
    METRIC_KEYS,
    SORT_SCRIPT,
    numbered_settings,
    pack_note,
    settings_table,
    short_names,
)
from moejax.sweeps.tables import MATCHED, OVERRIDE, at_fraction, axes_of, levels_of, setting_key

STATUSES = ("done", "stopped", "failed", "pruned")
MATCHES = {
    "": "none",
    "active_params": "equal active parameters",
    "total_params": "equal total parameters",
    "flops": "equal FLOPs per token",
}
MAX_LEVELS = 12  # of an axis, listed
MAX_OPEN = 20  # rows of a list that is open from the start


def build_sweep_page(frame: pd.DataFrame, definition: Mapping[str, Any], name: str = "") -> str:
    """Renders the page.

    Args:
      frame: rows of the arms that have ended, from `sweep_tables.frame_of`.
      definition: what `sweep.json` holds.
      name: of the sweep, its title; without one it is the recipe.

    Returns:
      An HTML document.
    """
    planned = definition["arms"]
    compared, left_out = at_fraction(frame)
    settings = numbered_settings(compared, METRIC_KEYS, planned)
    axes = short_names(axes_of(compared))
    sections: list[Section] = [
        ("summary", "What was swept", _summary(frame, definition) + _outcome(frame, planned))
    ]
    if len(settings):
        packs = pack_note(compared)
        matched = [str(name) for name in compared.columns if str(name).startswith(MATCHED)]
        sections += [
            (
                "settings",
                "Settings",
                _token_note(axes) + settings_table(settings, compared, matched, planned),
            ),
            ("effects", "Effect of each axis", effects(compared, axes, packs)),
            ("interactions", "Effect of pairs of axes", interactions(compared, axes)),
            ("parallel", "All settings at once", parallel(settings, axes, has_one_seed(compared))),
            (
                "fronts",
                "Loss against drops and time",
                fronts(settings, axes, packs, has_one_seed(compared)),
            ),
        ]
    else:
        sections.append(
            ("settings", "Settings", "<p>No arm is done, so there is nothing to compare.</p>")
        )
    sections.append(("left-out", "Arms that are not compared", _left_out(frame, left_out, planned)))
    recipe = str(definition.get("recipe") or "")
    subtitle = f"A sweep of <code>{html.text(recipe)}</code>" if recipe and name else "A sweep"
    return render_page(
        name or recipe or "Sweep", subtitle, sections, kind="sweep", script=SORT_SCRIPT
    )


def _token_note(axes: Mapping[str, str]) -> str:
    note = comparison_note(axis.removeprefix(OVERRIDE) for axis in axes)
    return f"<p>{html.text(note)}</p>" if note else ""


def _summary(frame: pd.DataFrame, definition: Mapping[str, Any]) -> str:
    planned = definition["arms"]
    keys = dict.fromkeys(key for entry in planned for key in entry["overrides"])
    axes = [(key, levels_of(entry["overrides"].get(key) for entry in planned)) for key in keys]
    settings = {setting_key(entry["overrides"]) for entry in planned}
    seeds = dict(axes).get("train.seed", [])
    match = str(definition.get("match") or "")
    rows = [
        ("Recipe", html.text(definition.get("recipe") or "not known")),
        ("Command", _command(str(definition.get("command") or "not known"))),
        (
            "Arms",
            f"{len(planned)}: {count(len(settings), 'setting')}, "
            + (count(len(seeds), "seed") if seeds else "no seed axis"),
        ),
        *((f"<code>{html.text(key)}</code>", _levels(levels)) for key, levels in axes),
        ("Matched", html.text(MATCHES.get(match, match))),
        ("Packs", _packs(definition.get("packs") or [])),
        (
            "Versions",
            html.text(", ".join(f"{k} {v}" for k, v in (definition.get("versions") or {}).items())),
        ),
        ("Commit", html.text(definition.get("git_commit") or "not known")),
    ]
    devices = list(dict.fromkeys(frame["device"].dropna())) if "device" in frame else []
    if devices:
        rows.append(
            ("Device" if len(devices) == 1 else "Devices", html.text("; ".join(map(str, devices))))
        )
    return table((), rows, "facts")


def _command(command: str) -> str:
    """A command whose flags are not broken at their hyphens where a line ends."""
    words = " ".join(f"<span>{html.text(word)}</span>" for word in command.split())
    return f"<code>{words}</code>"


def _levels(levels: Sequence[Any]) -> str:
    shown = ", ".join(
        f"<code>{html.text(level_name(level, 60))}</code>" for level in levels[:MAX_LEVELS]
    )
    return shown if len(levels) <= MAX_LEVELS else f"{shown} and {len(levels) - MAX_LEVELS} more"


def _packs(packs: Sequence[Sequence[str]]) -> str:
    if not packs:
        return "none"
    largest = max(map(len, packs))
    return (
        f"{len(packs)}, of at most {largest} arms trained together"
        if largest > 1
        else "none: one arm at a time"
    )


def _outcome(frame: pd.DataFrame, planned: Sequence[Mapping[str, Any]]) -> str:
    """How many arms ended how, and which alarms they raised."""
    counts = {status: int((frame["status"] == status).sum()) for status in STATUSES}
    missing = len(planned) - int(frame["arm"].isin([entry["id"] for entry in planned]).sum())
    parts = [f"{counts.pop('done')} done", *(f"{n} {status}" for status, n in counts.items() if n)]
    parts += [f"{missing} not ended"] if missing else []
    kind = "warning" if counts["failed"] or counts["stopped"] else ""
    text = f'<p class="{kind}"><strong>Of {count(len(planned), "arm")} planned: {", ".join(parts)}.</strong></p>'
    return text + _alarms(frame)


def _alarms(frame: pd.DataFrame) -> str:
    arms: dict[str, list[str]] = {}
    names = short_names([str(name) for name in frame.columns if str(name).startswith(OVERRIDE)])
    if "alarm_rules" in frame:
        for row in frame.to_dict("records"):
            levels = [
                f"{name} {level_name(row[axis])}"
                for axis, name in names.items()
                if row[axis] is not None
            ]
            arm = f"{row['arm']} ({', '.join(levels)})" if levels else str(row["arm"])
            for rule in json.loads(row["alarm_rules"] or "[]"):
                arms.setdefault(str(rule), []).append(arm)
    if not arms:
        return "<p>No arm raised an alarm.</p>"
    rows = [
        (
            html.text(rule),
            str(len(of_rule)),
            "<br>".join(f"<code>{html.text(arm)}</code>" for arm in of_rule),
        )
        for rule, of_rule in sorted(arms.items(), key=lambda item: -len(item[1]))
    ]
    total = len({arm for of_rule in arms.values() for arm in of_rule})
    text = table(("alarm", "arms", ""), rows, "events")
    return f'<p class="warning">{total} of {count(len(frame), "arm")} raised alarms.</p>' + (
        details("Which arms", text, is_open=total <= MAX_OPEN)
    )


def _left_out(
    frame: pd.DataFrame, left_out: pd.DataFrame, planned: Sequence[Mapping[str, Any]]
) -> str:
    overrides = {entry["id"]: entry["overrides"] for entry in planned}
    known = {
        row["arm"]: {
            str(k).removeprefix(OVERRIDE): v for k, v in row.items() if str(k).startswith(OVERRIDE)
        }
        for row in frame.to_dict("records")
    }
    reasons = {row["arm"]: str(row["reason"]) for row in left_out.to_dict("records")}
    ended = set(frame["arm"])
    reasons |= {arm: "not ended" for arm in overrides if arm not in ended}
    if not reasons:
        return "<p>None: every arm is done and compared.</p>"
    rows = [
        (
            f"<code>{html.text(arm)}</code>",
            _overrides(overrides.get(arm) or known.get(arm, {})),
            html.text(reason),
        )
        for arm, reason in reasons.items()
    ]
    listed = table(("arm", "overrides", "why"), rows, "events")
    return f"<p>{count(len(rows), 'arm')}.</p>" + (
        listed if len(rows) <= MAX_OPEN else details(f"All {len(rows)}", listed, is_open=False)
    )


def _overrides(values: Mapping[str, Any]) -> str:
    set_ = [(key, value) for key, value in values.items() if value is not None]
    return "<br>".join(
        f"<code>{html.text(key)}={html.text(level_name(value, 60))}</code>" for key, value in set_
    )
