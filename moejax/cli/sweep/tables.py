"""Tables of `moejax sweep`: the arms that are planned, and the settings from best to worst."""

import math
from typing import Any

import pandas as pd
from absl.flags import FlagValues

from moejax.cli.tables import print_result, print_table
from moejax.sweeps.arms import Arm, Plan, describe
from moejax.sweeps.matching import short, training_flops
from moejax.sweeps.report.effects import compare_settings
from moejax.sweeps.report.settings import PLANNED, numbered_settings, reference_setting
from moejax.sweeps.tables import BITS, LOSS, OVERRIDE, loss_of

LOSS_NAMES = {LOSS: "validation loss", BITS: "bits per byte"}


def print_plan(values: FlagValues, plan: Plan, packs: tuple[tuple[str, ...], ...]) -> None:
    """Prints the arms as a table or as JSON: what they change, and what they cost."""
    pack_of: dict[str, int] = {}
    for number, pack in enumerate(packs):
        pack_of |= dict.fromkeys(pack, number)
    costs = {arm.id: training_flops(arm.config, arm.count) for arm in plan.arms}
    summary = {
        "arms": len(plan.arms),
        "packs": len(packs),
        "duplicates": len(plan.duplicates),
        "steps": sum(arm.config.train.num_steps for arm in plan.arms),
        "FLOPs": sum(costs.values()),
    }
    if values.json:
        listed = []
        for arm in plan.arms:
            cost = {"pack": pack_of[arm.id], "flops_total": costs[arm.id]}
            listed.append(arm.to_json() | cost)
        print_result(summary | {"list": listed, "matched": list(plan.changes)}, is_json=True)
        return
    keys = _changed_keys(plan)
    rows = [_arm_row(arm, keys, pack_of[arm.id], costs[arm.id]) for arm in plan.arms]
    print_table(rows, "arms")
    print_result({**summary, "FLOPs": short(summary["FLOPs"])}, is_json=False)


def _changed_keys(plan: Plan) -> list[str]:
    """Returns the keys that any arm changes, in the order of the arms."""
    keys: dict[str, None] = {}
    for arm in plan.arms:
        keys |= dict.fromkeys((*arm.overrides, *arm.matched))
    return list(keys)


def _arm_row(arm: Arm, keys: list[str], pack: int, cost: int) -> dict[str, Any]:
    changed = arm.overrides | arm.matched
    row: dict[str, Any] = {"arm": arm.id, "pack": pack}
    for key in keys:
        row[key] = f"{changed[key]}" if key in changed else None
    return row | {
        "parameters": short(arm.count.total),
        "active": short(arm.count.active),
        "FLOPs/token": short(arm.count.flops_per_token),
        "steps": arm.config.train.num_steps,
        "FLOPs": short(cost),
    }


def settings_rows(compared: pd.DataFrame, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each setting, the best first.

    Args:
      compared: records of the arms that are compared.
      planned: the arms of the sweep's definition.
    """
    loss = loss_of(compared)
    settings = numbered_settings(compared, [loss], planned).to_dict("records")
    if not settings:
        return []
    reference = reference_setting(settings, planned)
    arms_of_settings = [setting["arms"] for setting in settings]
    differences = compare_settings(compared, loss, reference["arms"], arms_of_settings)
    rows = []
    for setting, difference in zip(settings, differences, strict=True):
        is_reference = setting is reference
        row = {
            "setting": _describe_setting(setting),
            "arms": len(setting["arms"]),
            "planned": setting[PLANNED],
            LOSS_NAMES[loss]: _rounded(setting[loss]),
            "standard error": _rounded(setting[f"{loss}/se"]),
            "difference": "reference" if is_reference else _rounded(difference.mean),
            "low": None if is_reference else _rounded(difference.low),
            "high": None if is_reference else _rounded(difference.high),
        }
        rows.append(row)
    return rows


def _describe_setting(setting: dict[str, Any]) -> str:
    keys = [key for key in setting if key.startswith(OVERRIDE)]
    return describe({key.removeprefix(OVERRIDE): setting[key] for key in keys})


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
