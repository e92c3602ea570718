"""Train many configurations of one recipe: the arms of a sweep.

  moejax sweep --config=FILE moe.num_experts=4,8,16 moe.balance_weight=log:1e-4..1e-1:5 --seeds=3
  moejax sweep --config=FILE --fair=learning_rate moe.num_experts=4,8,16 --seeds=3
  moejax sweep --config=FILE --dry-run            what FILE's sweep() gives, checked and listed
  moejax sweep --config=FILE --search=tpe moe.balance_weight=log:1e-4..1e-1 moe.num_experts=4,8,16
  moejax sweep worker --study=NAME --storage=URL  joins a search from anywhere
  moejax sweep report DIR                         tables, effects and fronts in DIR/report.html
  moejax sweep dashboard --storage=URL            optuna-dashboard at 127.0.0.1

An axis is KEY=VALUE,VALUE,... or KEY=log:LOW..HIGH:NUMBER or KEY=lin:LOW..HIGH:NUMBER; a search
draws from ranges without a number. Every arm is checked before the first one trains. Arms that
differ in knobs and seeds alone train side by side in one program. The same command goes on after an
interruption, a crash or a change that adds arms.
"""

import logging
import os
import sys
from pathlib import Path

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
from moejax.cli.recipe import recipe_name
from moejax.cli.sweep.fair import check_fair, describe_trials, train_trials
from moejax.cli.sweep.running import (
    check_runners,
    define_runners,
    own_command,
    train_arms,
)
from moejax.cli.sweep.search import (
    OF_DRAWS,
    OF_STUDIES,
    define_search,
    join_search,
    refuse_addresses,
    refuse_flags,
    search,
    show_dashboard,
)
from moejax.cli.sweep.space import read_space
from moejax.cli.sweep.tables import print_plan, settings_rows
from moejax.cli.tables import print_result, print_table
from moejax.paths import check_writable, resolve_path
from moejax.sweeps import varied_keys
from moejax.sweeps.arms import Plan, plan_arms
from moejax.sweeps.packing import pack_arms
from moejax.sweeps.report.write import build_sweep_report
from moejax.sweeps.runners.packs import check_devices, check_open, prepare_devices, work
from moejax.sweeps.runners.pool import STOPPED
from moejax.sweeps.store.directory import open_sweep
from moejax.sweeps.store.fair_rates import read_rates
from moejax.sweeps.store.records import read_definition, read_records
from moejax.sweeps.tables import at_fraction
from moejax.training.multihost.signals import StopSignals

FLAGS_OF = {
    "work": ("dir", "cores"),
    "worker": ("dir", "json", "study", "storage"),
    "report": ("dir", "json"),
    "dashboard": ("storage", "port"),
}
"""By action, the flags that mean something to it; without one all do but `cores` and `port`."""

ACTIONS = tuple(FLAGS_OF)

log = logging.getLogger("moejax")


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_json(values)
    flags.DEFINE_string(
        "dir",
        "",
        "the sweep's folder; default runs/sweep_NAME-OF-THE-RECIPE",
        flag_values=values,
    )
    flags.DEFINE_bool("dry-run", False, "check and list all arms, and stop", flag_values=values)
    flags.DEFINE_integer(
        "seeds",
        None,
        "each point with that many seeds, from 0",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "match",
        "",
        ["", "active_params", "total_params", "flops"],
        "what all arms have in common with the recipe; dense controls are added",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "adjust",
        "width",
        ["width", "steps"],
        "with --match: what is changed",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "fair",
        "",
        ["", "learning_rate"],
        "each setting at its own best, which short trials find before",
        flag_values=values,
    )
    define_runners(values)
    flags.DEFINE_string("cores", "", "work: CPU cores to run on, such as 0,1", flag_values=values)
    define_search(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Plans, trains, joins or reads."""
    refuse_several_processes("sweep", "launch one; --runner=slurm makes jobs of its own")
    action = _read_action(rest)
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
        join_search(values, own_command())
    elif action == "dashboard":
        show_dashboard(values)
    elif values.search:
        directory = _directory(values)
        search(values, read_space(values, rest), recipe_text(values), directory, own_command())
    else:
        _sweep(values, rest)


def _read_action(words: list[str]) -> str:
    """Returns the first word if it is an action, and nothing if it is an axis or absent."""
    action = words[0] if words and "=" not in words[0] else ""
    if action == "report" and any("://" in word for word in words):
        raise UsageError(
            "moejax sweep report takes a folder, no URL, and buckets are not supported yet"
        )
    refuse_addresses(words)
    if action.endswith(".py"):
        raise UsageError(f"{action} is a recipe; write --config={action}")
    if action and action not in ACTIONS:
        raise UsageError(
            f"{action} is neither an axis, KEY=VALUES, nor one of {', '.join(ACTIONS)}; see moejax "
            "sweep --help"
        )
    return action


def _refuse_flags_of_others(values: FlagValues, action: str) -> None:
    """Raises `UsageError` for a flag that was given and would change nothing."""
    if not action:
        refuse_flags(values, ("cores",), "is for moejax sweep work; leave it out")
        refuse_flags(values, ("port",), "is for moejax sweep dashboard; leave it out")
        return
    others = [name for name in values if name not in FLAGS_OF[action]]
    if action == "worker":
        remedy = (
            "is not for a worker, which does what the study says; leave it out, or give it to the "
            "command that made the study"
        )
    else:
        remedy = f"is not for moejax sweep {action}; leave it out"
    refuse_flags(values, others, remedy)


def _sweep(values: FlagValues, axes: list[str]) -> None:
    """Plans arms, and shows them, trains them, or submits them."""
    refuse_flags(
        values,
        (*OF_DRAWS, *OF_STUDIES),
        "goes with a search; add --search=random or tpe, or leave it out",
    )
    _check_flags(values)
    directory = None if values["dry-run"].value else _directory(values)
    plan = _plan(values, axes)
    if values.fair:
        check_fair(values, plan)
        log.info("%s", describe_trials(plan))
    if directory is None:
        print_plan(values, plan, pack_arms(plan.arms, values.pack))
        return
    if values.fair:
        found = train_trials(values, directory, plan)
        if found is None:
            return
        plan = found
    if train_arms(values, directory, plan, match=values.match):
        _finish(values, directory)


def _check_flags(values: FlagValues) -> None:
    """Raises `UsageError` for a number that cannot be, and for a flag that would change nothing."""
    check_runners(values)
    if values["adjust"].present and not values.match:
        raise UsageError(
            f"--adjust={values.adjust} says what --match changes; add --match, or leave it out"
        )


def _plan(values: FlagValues, axes: list[str]) -> Plan:
    """Returns the arms, each checked, and logs what was changed or left out."""
    space = read_space(values, axes)
    # Raises what is wrong with the recipe itself, apart from any point.
    read_config_flag(values, varied_keys(space))
    plan = plan_arms(values.config.to_dict(), space, match=values.match, adjust=values.adjust)
    for line in plan.changes:
        log.info("matched: %s", line)
    for overrides, arm_id in plan.duplicates:
        shown = " ".join(f"{key}={value}" for key, value in overrides.items())
        log.info("left out: %s, which is arm %s", shown, arm_id)
    return plan


def _directory(values: FlagValues) -> Path:
    directory = values.dir or f"runs/sweep_{recipe_name(recipe_text(values))}"
    return read_folder_to_write(directory, "--dir")


def _work(values: FlagValues) -> None:
    """Works on a sweep, as a process of a pool or a job of a cluster.

    A process that was stopped says by its exit code if arms are open.
    """
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
        wanted = set(map(int, cores.split(",")))
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, wanted)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"--cores={cores} must be numbers of cores that this machine has, such as 0,1"
        ) from error


def _report(values: FlagValues, others: list[str]) -> None:
    folders = [*others, values.dir] if values.dir else others
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
    rows = settings_rows(compared, read_definition(directory)["arms"])
    if values.json:
        rates = {"fair": read_rates(directory)}
        print_result(found | {"settings": rows} | rates, is_json=True)
        return
    if rows:
        print_table(
            rows,
            "settings, means over seeds, differences from the reference with 95 % intervals over "
            "seeds",
        )
    print_result(found, is_json=False)
