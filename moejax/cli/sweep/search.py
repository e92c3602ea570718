"""Searches of `moejax sweep`, by Optuna (extra `sweeps`)."""

import logging
import os
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import define_seed, read_config_flag, read_folder_to_write, recipe_text
from moejax.cli.tables import print_result, print_table
from moejax.compilation_cache import keep_compilation_cache
from moejax.paths import resolve_path
from moejax.sweeps import Space, varied_keys
from moejax.sweeps.search.definition import LOSS, Definition, StudyError, objective_of, search_axes
from moejax.sweeps.search.storage_address import HIDDEN, is_address, is_path, show_storage
from moejax.sweeps.search.study import (
    create_study,
    dashboard_command,
    definition_of,
    open_study,
    serve_dashboard,
)
from moejax.sweeps.search.trial import Trials, common_fractions
from moejax.sweeps.search.trials import best, trials_table, untrained
from moejax.sweeps.search.worker import work
from moejax.sweeps.store.directory import check_search
from moejax.training.multihost.signals import StopSignals

# Flags that mean something to some uses of the verb alone.
OF_GRIDS = ("seeds", "dry-run", "match", "adjust", "pack", "fair")
OF_RUNNERS = ("runner", "processes", "gpus", "minutes", "partition", "account")
OF_DRAWS = ("trials", "pruner", "search_seed")
OF_STUDIES = ("study", "storage")

log = logging.getLogger("moejax")


def define_search(values: FlagValues) -> None:
    """Flags of searches."""
    flags.DEFINE_enum(
        "search",
        "",
        ["", "random", "tpe"],
        "draw points instead of taking all",
        flag_values=values,
    )
    flags.DEFINE_integer("trials", 20, "--search: how many points", flag_values=values)
    flags.DEFINE_enum(
        "pruner",
        "none",
        ["none", "median", "halving"],
        "--search: which arms end early",
        flag_values=values,
    )
    define_seed(values, "search_seed", "--search: of the draws")
    flags.DEFINE_string("study", "", "the search's name; default that of --dir", flag_values=values)
    flags.DEFINE_string(
        "storage",
        "",
        "where workers meet: a path ending in .journal or .db, or a database's URL; default "
        "DIR/study.journal",
        flag_values=values,
    )
    flags.DEFINE_integer("port", 8080, "dashboard: at 127.0.0.1", flag_values=values)


def refuse_flags(values: FlagValues, names: Sequence[str], remedy: str) -> None:
    """Raises `UsageError` for a flag that was given and would change nothing here.

    Args:
      values: parsed flags.
      names: the flags.
      remedy: the end of the sentence that begins with the flag.
    """
    for name in names:
        if values[name].present:
            raise UsageError(f"--{name}={_shown_value(values, name)} {remedy}")


def _shown_value(values: FlagValues, name: str) -> Any:
    """Returns a flag's value as it was given, without what must not be shown."""
    if name == "storage":
        return show_storage(values.storage)
    return recipe_text(values) if name == "config" else values[name].value


def refuse_addresses(words: Sequence[str]) -> None:
    """Raises `UsageError` for a storage that is given without its flag.

    It may hold a password, so the message does not repeat it.
    """
    if any(map(is_address, words)):
        raise UsageError("an address is no axis; write --storage=ADDRESS")


def shown_command(arguments: Sequence[str]) -> str:
    """Returns a command line of moejax as it may be written down.

    What an address of a storage hides is replaced by `***`.
    """
    previous = ["", *arguments]
    shown = map(_shown_argument, previous, arguments)
    return shlex.join(["moejax", *shown])


def _shown_argument(previous: str, argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if equals and flag.lstrip("-") == "storage":
        return f"{flag}={show_storage(value)}"
    if previous in ("-storage", "--storage"):
        return show_storage(argument)
    if not argument.startswith("-") and is_address(argument):
        return HIDDEN
    return argument


def search(values: FlagValues, space: Space, recipe: str, directory: Path, command: str) -> None:
    """Makes a study, or finds it, and works on it."""
    _check_search(values, space)
    definition = _define(values, space, recipe)
    if definition.objective != LOSS:
        log.info("axes change what a token is: points are compared by %s", definition.objective)
    check_search(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = values.study or directory.name
    storage = _storage(values) or str(directory / "study.journal")
    study = create_study(storage, name, definition)
    if definition.is_filtered:
        log.info("others join with the same command")
    else:
        join = ["sweep", "worker", f"--study={name}", f"--storage={storage}", f"--dir={directory}"]
        log.info("others join with %s", shown_command(join))
    log.info("%s shows it", dashboard_command(storage))
    with StopSignals() as stop:
        _work(values, study, Trials(directory, definition, command, stop, space.allows))


def _check_search(values: FlagValues, space: Space) -> None:
    """Raises `UsageError` for points that cannot be drawn, and for flags of other sweeps."""
    if space.axes is None:
        raise UsageError(
            "--search draws from axes; a sweep() that yields points has none: return a product of "
            "axes"
        )
    refuse_flags(
        values, OF_GRIDS, "goes with a sweep of given points, not with --search; leave one out"
    )
    refuse_flags(
        values,
        OF_RUNNERS,
        "is for sweeps of given points; leave it out, and start moejax sweep worker, or the same "
        "command, as often as you like",
    )


def _define(values: FlagValues, space: Space, recipe: str) -> Definition:
    axes = search_axes(space.axes or ())
    config = read_config_flag(values, varied_keys(space))
    return Definition(
        recipe=recipe,
        base=values.config.to_dict(),
        axes=axes,
        sampler=values.search,
        pruner=values.pruner,
        seed=values.search_seed,
        trials=values.trials,
        fractions=common_fractions(config, axes),
        is_filtered=space.is_filtered,
        objective=objective_of(axes),
    )


def join_search(values: FlagValues, command: str) -> None:
    """Works on a study that exists."""
    for flag in ("study", "storage"):
        if not values[flag].value:
            raise UsageError(f"--{flag} is missing; moejax sweep --search says which")
    directory = read_folder_to_write(values.dir or f"runs/{values.study}", "--dir")
    study = open_study(_storage(values), values.study)
    definition = definition_of(study)
    if definition.is_filtered:
        raise StudyError(
            f"study {values.study!r} leaves points out by a where(...) of its recipe "
            f"{definition.recipe}, which a worker does not know; join with the command that made "
            "the study, moejax sweep --config=... --search=..., with the same flags and axes"
        )
    check_search(directory)
    with StopSignals() as stop:
        _work(values, study, Trials(directory, definition, command, stop))


def _work(values: FlagValues, study, trials: Trials) -> None:
    """Trains points until the study has enough, and prints them."""
    keep_compilation_cache()
    num_reported = work(
        study,
        trials.run,
        arm_of=trials.arm_of,
        worker_id=f"{socket.gethostname()}-{os.getpid()}",
        should_stop=lambda: bool(trials.stop),
    )
    if trials.stop:
        log.info("%s: the same command, or another worker, goes on", trials.stop.received)
        return
    rows = trials_table(study)
    if not values.json and rows:
        print_table(rows, "trials")
    found: Any = best(study)
    if found and not values.json:
        found = str(found)
    print_result({"trials told by this worker": num_reported, "best": found}, is_json=values.json)
    failed = untrained(study)
    if failed:
        first = failed[0]
        raise StudyError(
            f"{len(failed)} of {len(rows)} points could not be trained (arm {first['arm']}: "
            f"{first['error']}); leave such points out, or search again under another --study"
        )


def show_dashboard(values: FlagValues) -> None:
    """Serves optuna-dashboard until it is interrupted."""
    if not values.storage:
        raise UsageError("--storage is missing; moejax sweep --search says which")
    if not 0 < values.port < 65536:
        raise UsageError(f"--port={values.port} must be between 1 and 65535")
    serve_dashboard(_storage(values), port=values.port)


def _storage(values: FlagValues) -> str:
    """Returns where a study is: a URL as it was given, or a path, resolved."""
    if not values.storage or not is_path(values.storage):
        return values.storage
    return str(resolve_path(values.storage, "--storage"))
