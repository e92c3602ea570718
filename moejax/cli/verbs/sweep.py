"""Train many configurations of one recipe: the arms of a sweep.

  moejax sweep --config=FILE --dir=DIR moe.num_experts=4,8,16 moe.balance_weight=log:1e-4..1e-1:5 --seeds=3
  moejax sweep --config=FILE --dry-run            what FILE's sweep() gives: every arm checked, counted and listed
  moejax sweep --config=FILE --search=tpe --trials=40 moe.balance_weight=log:1e-4..1e-1 moe.num_experts=4,8,16
  moejax sweep worker --study=NAME --storage=URL  joins a search from anywhere
  moejax sweep report DIR                         tables, effects and fronts in DIR/report.html
  moejax sweep dashboard --storage=URL            optuna-dashboard at 127.0.0.1

An axis is KEY=VALUE,VALUE,... or KEY=log:LOW..HIGH:NUMBER or KEY=lin:LOW..HIGH:NUMBER; a search
draws from ranges without a number. Every arm is checked before the first one trains. Arms that
differ in knobs and seeds alone train side by side in one program. The same command goes on after an
interruption, a crash or a change that adds arms.
"""

import logging
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import (
    define_config,
    define_json,
    read_config_flag,
    read_folder_to_write,
    recipe_text,
    refuse_several_processes,
)
from moejax.cli.printable import printable
from moejax.cli.recipe import explained, own_function, recipe_name, split_recipe
from moejax.cli.tables import print_result, print_table
from moejax.cli.verbs.sweep_search import (
    OF_DRAWS,
    OF_STUDIES,
    define_search,
    join_search,
    refuse_addresses,
    refuse_flags,
    search,
    show_dashboard,
    shown_command,
)
from moejax.paths import check_writable, resolve_path
from moejax.sweeps import Space, parse_axis, product, seeds, varied_keys
from moejax.sweeps.arms import Arm, Plan, describe, plan_arms
from moejax.sweeps.matching import short, training_flops
from moejax.sweeps.packing import pack_arms
from moejax.sweeps.report.effects import compare_settings
from moejax.sweeps.report.settings import PLANNED, numbered_settings, reference_setting
from moejax.sweeps.report.write import build_sweep_report
from moejax.sweeps.runners.packs import check_devices, check_open, prepare_devices, work
from moejax.sweeps.runners.pool import STOPPED, Share, run_pool, share_out
from moejax.sweeps.runners.slurm import Jobs, check_jobs, submit
from moejax.sweeps.store.directory import Sweep, open_sweep, write_sweep
from moejax.sweeps.store.records import read_definition, read_records
from moejax.sweeps.tables import BITS, LOSS, OVERRIDE, at_fraction, loss_of
from moejax.training.multihost.signals import StopSignals

FLAGS_OF = {
    "work": ("dir", "cores"), "worker": ("dir", "json", "study", "storage"), "report": ("dir", "json"),
    "dashboard": ("storage", "port"),
}  # fmt: skip
"""What each word that begins no axis makes of flags; without such a word all have a meaning but the last two."""

ACTIONS = tuple(FLAGS_OF)

RUNNERS_OF = {
    "processes": ("pool", "slurm"), "gpus": ("pool", "slurm"),
    "minutes": ("slurm",), "partition": ("slurm",), "account": ("slurm",),
}  # fmt: skip
"""Flags that say something to some runners alone."""

log = logging.getLogger("moejax")


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_json(values)
    flags.DEFINE_string(
        "dir", "", "the sweep's folder; default runs/sweep_NAME-OF-THE-RECIPE", flag_values=values
    )
    flags.DEFINE_bool("dry-run", False, "check and list all arms, and stop", flag_values=values)
    flags.DEFINE_integer("seeds", None, "each point with so many seeds, from 0", flag_values=values)
    flags.DEFINE_enum(
        "match", "", ["", "active_params", "total_params", "flops"],
        "what all arms have in common with the recipe; dense controls are added", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        "adjust", "width", ["width", "steps"], "with --match: what is changed", flag_values=values
    )
    flags.DEFINE_integer(
        "pack", 8, "arms that train side by side, at most; 1: none", flag_values=values
    )
    flags.DEFINE_enum("runner", "here", ["here", "pool", "slurm"], "who trains", flag_values=values)
    flags.DEFINE_integer("processes", 2, "--runner=pool: how many; slurm: jobs", flag_values=values)
    flags.DEFINE_integer(
        "gpus",
        0,
        "--runner=pool: GPUs to share out; slurm: of each job; 0: CPU",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "minutes", 240, "--runner=slurm: of a job, which is queued again", flag_values=values
    )
    flags.DEFINE_string("partition", "", "--runner=slurm", flag_values=values)
    flags.DEFINE_string("account", "", "--runner=slurm", flag_values=values)
    flags.DEFINE_string("cores", "", "work: CPU cores to run on, such as 0,1", flag_values=values)
    define_search(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Plans, trains, joins or reads."""
    refuse_several_processes("sweep", "launch one; --runner=slurm makes jobs of its own")
    action = rest[0] if rest and "=" not in rest[0] else ""
    if action == "report" and any("://" in word for word in rest):
        raise UsageError(
            "moejax sweep report takes a folder, no URL, and buckets are not supported yet"
        )
    refuse_addresses(rest)
    if action.endswith(".py"):
        raise UsageError(f"{action} is a recipe; write --config={action}")
    if action and action not in ACTIONS:
        words = ", ".join(ACTIONS)
        raise UsageError(
            f"{action} is neither an axis, KEY=VALUES, nor one of {words}; see moejax sweep --help"
        )
    others = rest[1:] if action else rest
    _refuse_flags_of_others(values, action)
    if action == "report":
        _report(values, others)
        return
    if action and others:
        raise UsageError(f"moejax sweep {action} takes flags alone, not {others[0]}; leave it out")
    if action == "work":
        _work(values)
    elif action == "worker":
        join_search(values, _command())
    elif action == "dashboard":
        show_dashboard(values)
    elif values.search:
        directory = _directory(values)
        search(values, _space(values, rest), recipe_text(values), directory, _command())
    else:
        _sweep(values, rest)


def _refuse_flags_of_others(values: FlagValues, action: str) -> None:
    """Raises `UsageError` for a flag that was given and would change nothing."""
    if not action:
        refuse_flags(values, ("cores",), "is for moejax sweep work; leave it out")
        refuse_flags(values, ("port",), "is for moejax sweep dashboard; leave it out")
        return
    others = [name for name in values if name not in FLAGS_OF[action]]
    if action == "worker":
        remedy = (
            "is not for a worker, which does what the study says; leave it out, or give it to the command that made "
            "the study"
        )
    else:
        remedy = f"is not for moejax sweep {action}; leave it out"
    refuse_flags(values, others, remedy)


def _sweep(values: FlagValues, rest: list[str]) -> None:
    refuse_flags(
        values,
        (*OF_DRAWS, *OF_STUDIES),
        "goes with a search; add --search=random or tpe, or leave it out",
    )
    _check_flags(values)
    directory = None if values["dry-run"].value else _directory(values)
    plan = _plan(values, rest)
    packs = pack_arms(plan.arms, values.pack)
    if directory is None:
        _show(values, plan, packs)
        return
    parts: list[Share] = []
    if values.runner == "slurm":  # what cannot be is said before a directory is taken up
        check_jobs(_jobs(values))
    elif values.runner == "pool":
        parts = share_out(values.processes, values.gpus)
    else:
        prepare_devices(packs)
        check_devices(plan.arms)
    sweep = write_sweep(
        directory, plan, largest_pack=values.pack, recipe=recipe_text(values), match=values.match,
        command=_command(),
    )  # fmt: skip
    if values.runner == "slurm":
        _submit(values, sweep)
        return
    with StopSignals() as stop:
        if values.runner == "pool":
            run_pool(sweep, parts, stop)
        else:
            work(sweep, stop)
        if stop:
            log.info("%s: saved in %s; the same command continues", stop.received, sweep.directory)
            return
    check_open(sweep)
    _finish(values, sweep.directory)


def _check_flags(values: FlagValues) -> None:
    """Raises `UsageError` for a number that cannot be, and for a flag that would change nothing."""
    for flag, number, least in (
        ("pack", values.pack, 1),
        ("processes", values.processes, 1),
        ("gpus", values.gpus, 0),
    ):
        if number < least:
            raise UsageError(f"--{flag}={number} must be at least {least}")
    for flag, known in RUNNERS_OF.items():
        if values[flag].present and values.runner not in known:
            raise UsageError(
                f"--{flag}={values[flag].value} goes with --runner={' or '.join(known)}, not {values.runner}; "
                "leave one out"
            )
    if values["adjust"].present and not values.match:
        raise UsageError(
            f"--adjust={values.adjust} says what --match changes; add --match, or leave it out"
        )


def _plan(values: FlagValues, rest: list[str]) -> Plan:
    space = _space(values, rest)
    read_config_flag(
        values, varied_keys(space)
    )  # says what is wrong with the recipe itself, apart from any point
    plan = plan_arms(values.config.to_dict(), space, match=values.match, adjust=values.adjust)
    for line in plan.changes:
        log.info("matched: %s", line)
    for overrides, arm_id in plan.duplicates:
        log.info(
            "left out: %s, which is arm %s",
            " ".join(f"{k}={v}" for k, v in overrides.items()),
            arm_id,
        )
    return plan


def _space(values: FlagValues, rest: list[str]) -> Space:
    """The points: of the recipe's `sweep()`, times the axes given, times the seeds."""
    spaces: list[Any] = _own_space(values)
    spaces += [parse_axis(text) for text in rest]
    if values.seeds is not None:
        if values.seeds < 1:
            raise UsageError(
                f"--seeds={values.seeds} must be at least 1: how many seeds each point gets"
            )
        spaces.append(seeds(values.seeds))
    if not spaces:
        raise UsageError(
            "nothing varies; give axes such as moe.num_experts=4,8,16, or --seeds, or a recipe with a sweep()"
        )
    keys = [axis.key for space in spaces if isinstance(space, Space) for axis in space.axes or ()]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UsageError(
            f"{twice[0]} is given twice; give it once: as an axis, by --seeds, or in the recipe's sweep()"
        )
    return product(*spaces)


def _own_space(values: FlagValues) -> list[Space | list[Any]]:
    """What a recipe's `sweep()` gives; nothing if it has none."""
    recipe, _ = split_recipe(recipe_text(values))
    function = own_function(values, "sweep")
    if function is None:
        return []
    with explained(recipe):
        found = function()
        points = [*found] if isinstance(found, Iterable) and not isinstance(found, Space) else found
    if not isinstance(points, Space | list | None):
        raise UsageError(
            f"{recipe}: sweep() returns {points!r}; return a space, such as product(...), or yield points"
        )
    if points is None or points == []:
        raise UsageError(
            f"{recipe}: sweep() gives nothing; return a space, such as product(...), or yield points"
        )
    if not isinstance(points, Space) and (
        wrong := [point for point in points if not isinstance(point, Mapping)]
    ):
        raise UsageError(
            f"{recipe}: sweep() yields {wrong[0]!r}, which is no point; yield dicts, as {{'moe.top_k': 2}}"
        )
    return [points]


def _directory(values: FlagValues) -> Path:
    return read_folder_to_write(
        values.dir or f"runs/sweep_{recipe_name(recipe_text(values))}", "--dir"
    )


def _command() -> str:
    return shown_command(sys.argv[1:])


def _show(values: FlagValues, plan: Plan, packs: tuple[tuple[str, ...], ...]) -> None:
    """The arms as a table or as JSON: what they change, what they cost."""
    pack_of = {arm_id: number for number, pack in enumerate(packs) for arm_id in pack}
    costs = {arm.id: training_flops(arm.config, arm.count) for arm in plan.arms}
    summary = {
        "arms": len(plan.arms),
        "packs": len(packs),
        "duplicates": len(plan.duplicates),
        "steps": sum(arm.config.train.num_steps for arm in plan.arms),
        "FLOPs": sum(costs.values()),
    }
    if values.json:
        rows = [
            arm.to_json() | {"pack": pack_of[arm.id], "flops_total": costs[arm.id]}
            for arm in plan.arms
        ]
        print_result(summary | {"list": rows, "matched": list(plan.changes)}, is_json=True)
        return
    keys = dict.fromkeys(key for arm in plan.arms for key in (*arm.overrides, *arm.matched))
    print_table(
        [_row(arm, list(keys), pack_of[arm.id], costs[arm.id]) for arm in plan.arms], "arms"
    )
    print_result({**summary, "FLOPs": short(summary["FLOPs"])}, is_json=False)


def _row(arm: Arm, keys: list[str], pack: int, cost: int) -> dict[str, Any]:
    changed = arm.overrides | arm.matched
    return {
        "arm": arm.id,
        "pack": pack,
        **{key: None if key not in changed else f"{changed[key]}" for key in keys},
        "parameters": short(arm.count.total),
        "active": short(arm.count.active),
        "FLOPs/token": short(arm.count.flops_per_token),
        "steps": arm.config.train.num_steps,
        "FLOPs": short(cost),
    }


def _jobs(values: FlagValues) -> Jobs:
    return Jobs(values.processes, values.gpus, 8, values.minutes, values.partition, values.account)


def _submit(values: FlagValues, sweep: Sweep) -> None:
    for job in submit(sweep, _jobs(values)):
        log.info("job %s: logs in %s", job.job_id, job.paths.stdout)
    print(f"moejax sweep report {printable(str(sweep.directory))}  shows what has ended")


def _work(values: FlagValues) -> None:
    """A process of a pool, or a job of a cluster; one that was told to stop says by its exit code if arms are open."""
    if not values.dir:
        raise UsageError("--dir is missing; name the folder of a sweep")
    directory = read_folder_to_write(values.dir, "--dir")
    if values.cores:
        _run_on(values.cores)
    sweep = open_sweep(directory)
    prepare_devices(sweep.packs)
    check_devices(sweep.arms.values())
    with StopSignals() as stop:
        is_done = work(sweep, stop)
        if stop and not is_done:
            sys.exit(STOPPED)
    check_open(sweep)


def _run_on(cores: str) -> None:
    """Keeps this process on some cores, where the system can do that."""
    try:
        wanted = {int(core) for core in cores.split(",")}
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, wanted)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"--cores={cores} must be numbers of cores that this machine has, such as 0,1"
        ) from error


def _report(values: FlagValues, others: list[str]) -> None:
    folders = [*others, *([values.dir] if values.dir else [])]
    if len(folders) != 1:
        raise UsageError("name one sweep: moejax sweep report DIR")
    directory = resolve_path(folders[0], "--dir")
    check_writable(directory, "--dir")
    _finish(values, directory)


def _finish(values: FlagValues, directory: Path) -> None:
    """Writes the page, and prints the settings from the best to the worst."""
    path = build_sweep_report(directory)
    compared, left_out = at_fraction(read_records(directory))
    found = {"compared": len(compared), "left out": len(left_out), "report": str(path)}
    rows = _settings_rows(compared, read_definition(directory)["arms"])
    if values.json:
        print_result(found | {"settings": rows}, is_json=True)
        return
    if rows:
        print_table(
            rows,
            "settings, means over seeds, differences from the reference with 95 % intervals over seeds",
        )
    print_result(found, is_json=False)


def _settings_rows(compared: pd.DataFrame, planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a setting, the best first."""
    loss = loss_of(compared)
    settings = numbered_settings(compared, [loss], planned).to_dict("records")
    if not settings:
        return []
    reference = reference_setting(settings, planned)
    differences = compare_settings(
        compared, loss, reference["arms"], [row["arms"] for row in settings]
    )
    names = {LOSS: "validation loss", BITS: "bits per byte"}
    return [
        {
            "setting": describe(
                {key.removeprefix(OVERRIDE): row[key] for key in row if key.startswith(OVERRIDE)}
            ),
            "arms": len(row["arms"]),
            "planned": row[PLANNED],
            names[loss]: _rounded(row[loss]),
            "standard error": _rounded(row[f"{loss}/se"]),
            "difference": "reference" if row is reference else _rounded(difference.mean),
            "low": None if row is reference else _rounded(difference.low),
            "high": None if row is reference else _rounded(difference.high),
        }
        for row, difference in zip(settings, differences, strict=True)
    ]


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
