"""Train the arms of a recipe at several budgets of compute, and fit the law of their losses.

  moejax ladder --config=FILE --budgets=1e12,4e12,1.6e13,6e13 moe.num_experts=0,8,32
  moejax ladder --config=FILE --dry-run          what would be trained, and what it could see
  moejax ladder report DIR [SCAN ...]            laws, the top rung's prediction: DIR/ladder.html
  moejax ladder gate BASELINE CANDIDATE ...      effective speed-ups and a verdict for each

A budget is in FLOPs of training. The recipe's rung(budget, arm) gives the shape of a model at a
budget; every arm trains the steps that the budget pays for. Arms are axes, KEY=VALUE,VALUE,... or
what the recipe's sweep() yields. BASELINE and CANDIDATE are DIR:ARM, or DIR where a ladder has one
arm. The same command goes on after an interruption, a crash, or with more budgets, arms or seeds.
"""

from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.ladder.plan import print_ladder, read_ladder
from moejax.cli.ladder.results import print_judgements, print_report
from moejax.cli.options import (
    define_config,
    define_json,
    read_folder_to_write,
    recipe_text,
    refuse_several_processes,
)
from moejax.cli.recipe import recipe_name
from moejax.cli.sweep.running import check_runners, define_runners, train_arms
from moejax.cli.sweep.search import refuse_flags
from moejax.paths import check_writable, resolve_path
from moejax.sweeps.ladder.directory import write_ladder
from moejax.sweeps.store.directory import Sweep

FLAGS_OF = {"report": ("json",), "gate": ("json",)}
"""By action, the flags that mean something to it; without one all do."""


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_json(values)
    flags.DEFINE_string(
        "dir",
        "",
        "the ladder's folder; default runs/ladder_NAME-OF-THE-RECIPE",
        flag_values=values,
    )
    flags.DEFINE_list(
        "budgets",
        None,
        "FLOPs of training of the rungs, such as 1e12,4e12,1.6e13; default: the recipe's BUDGETS",
        flag_values=values,
    )
    flags.DEFINE_integer("seeds", 3, "of each arm at each rung, from 0", flag_values=values)
    flags.DEFINE_bool("dry-run", False, "check and list all runs, and stop", flag_values=values)
    define_runners(values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Plans and trains, reports, or judges."""
    refuse_several_processes("ladder", "launch one; --runner=slurm makes jobs of its own")
    action = rest[0] if rest and "=" not in rest[0] else ""
    if not action:
        _ladder(values, rest)
        return
    if action not in FLAGS_OF:
        raise UsageError(
            f"{action} is neither an axis, KEY=VALUES, nor one of {', '.join(FLAGS_OF)}; see "
            "moejax ladder --help"
        )
    others = [name for name in values if name not in FLAGS_OF[action]]
    refuse_flags(values, others, f"is not for moejax ladder {action}; leave it out")
    if action == "report":
        _report(values, rest[1:])
    else:
        print_judgements(values, rest[1:])


def _ladder(values: FlagValues, axes: list[str]) -> None:
    """Plans the runs, and shows them or trains them."""
    check_runners(values)
    directory = None if values["dry-run"].value else _directory(values)
    planned, gate = read_ladder(values, axes)
    if directory is None:
        print_ladder(values, planned, gate)
        return

    def note_ladder(sweep: Sweep) -> None:
        write_ladder(sweep, planned, gate)

    if train_arms(values, directory, planned.plan, on_written=note_ladder):
        print_report(values, directory, [])


def _directory(values: FlagValues) -> Path:
    directory = values.dir or f"runs/ladder_{recipe_name(recipe_text(values))}"
    return read_folder_to_write(directory, "--dir")


def _report(values: FlagValues, folders: list[str]) -> None:
    if not folders:
        raise UsageError("name a ladder: moejax ladder report DIR")
    directory, *scans = [resolve_path(folder, "DIR") for folder in folders]
    check_writable(directory, "DIR")
    print_report(values, directory, scans)
