"""The part of `moejax sweep` that searches through Optuna (extra `sweeps`)."""

import logging
import os
import socket
from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import read_config_flag
from moejax.cli.tables import print_result, print_table
from moejax.sweeps import Space
from moejax.sweeps.programs import keep_programs
from moejax.sweeps.search import Definition, search_axes
from moejax.sweeps.study import create_study, dashboard_command, definition_of, open_study, serve_dashboard
from moejax.sweeps.trial import Trials, fractions_of
from moejax.sweeps.trials import best, trials_table
from moejax.sweeps.worker import work
from moejax.training.signals import StopSignals

log = logging.getLogger("moejax")


def define_search(values: FlagValues) -> None:
    """Flags of searches."""
    flags.DEFINE_enum("search", "", ["", "random", "tpe"], "draw points instead of taking all", flag_values=values)
    flags.DEFINE_integer("trials", 20, "--search: how many points", flag_values=values)
    flags.DEFINE_enum(
        "pruner", "none", ["none", "median", "halving"], "--search: which arms end early", flag_values=values
    )
    flags.DEFINE_integer("search_seed", 0, "--search: of the draws", flag_values=values)
    flags.DEFINE_string("study", "", "the search's name; default that of --dir", flag_values=values)
    flags.DEFINE_string(
        "storage", "", "where workers meet: a path ending in .journal or .db, or a database's URL; default "
        "DIR/study.journal", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("port", 8080, "dashboard: at 127.0.0.1", flag_values=values)


def search(values: FlagValues, space: Space, recipe: str, directory: Path, command: str) -> None:
    """Makes a study, or finds it, and works on it."""
    if space.axes is None:
        raise UsageError("--search draws from axes; a sweep() that yields points has none: return a product of axes")
    for flag in ("match", "seeds", "dry-run"):
        if values[flag].value:
            raise UsageError(f"--{flag} goes with a sweep of given points, not with --search; leave one out")
    definition = Definition(
        recipe=recipe,
        base=values.config.to_dict(),
        axes=search_axes(space.axes),
        sampler=values.search,
        pruner=values.pruner,
        seed=values.search_seed,
        trials=values.trials,
        fractions=fractions_of(read_config_flag(values)),
    )
    directory.mkdir(parents=True, exist_ok=True)
    name, storage = values.study or directory.name, values.storage or str(directory / "study.journal")
    study = create_study(storage, name, definition)
    log.info("others join with moejax sweep worker --study=%s --storage=%s --dir=%s", name, storage, directory)
    log.info("%s shows it", dashboard_command(storage))
    with StopSignals() as stop:
        _work(values, study, Trials(directory, definition, command, stop, space.allows))


def join_search(values: FlagValues, command: str) -> None:
    """A worker of a study that exists."""
    for flag in ("study", "storage"):
        if not values[flag].value:
            raise UsageError(f"--{flag} is missing; moejax sweep --search says which")
    study = open_study(values.storage, values.study)
    directory = Path(values.dir or f"runs/{values.study}")
    with StopSignals() as stop:
        _work(values, study, Trials(directory, definition_of(study), command, stop))


def _work(values: FlagValues, study, trials: Trials) -> None:
    keep_programs()
    told = work(
        study,
        trials.run,
        arm_of=trials.arm_of,
        known=trials.known,
        worker_id=f"{socket.gethostname()}-{os.getpid()}",
        should_stop=lambda: bool(trials.stop),
    )
    if trials.stop:
        log.info("%s: the same command, or another worker, goes on", trials.stop.received)
        return
    rows = trials_table(study)
    if not values.json and rows:
        print_table(rows, "trials")
    found = best(study)
    print_result(
        {"trials told by this worker": told, "best": found if values.json else found and str(found)},
        is_json=values.json,
    )


def show_dashboard(values: FlagValues) -> None:
    """optuna-dashboard, until it is interrupted."""
    if not values.storage:
        raise UsageError("--storage is missing; moejax sweep --search says which")
    serve_dashboard(values.storage, port=values.port)
