"""The part of `moejax sweep` that searches through Optuna (extra `sweeps`)."""

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

OF_GRIDS = ("seeds", "dry-run", "match", "adjust", "pack")
OF_RUNNERS = ("runner", "processes", "gpus", "minutes", "partition", "account")
OF_DRAWS = ("trials", "pruner", "search_seed")
OF_STUDIES = ("study", "storage")

log = logging.getLogger("moejax")


def define_search(values: FlagValues) -> None:
    """Flags of searches."""
    flags.DEFINE_enum(
        "search", "", ["", "random", "tpe"], "draw points instead of taking all", flag_values=values
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
        "storage", "", "where workers meet: a path ending in .journal or .db, or a database's URL; default "
        "DIR/study.journal", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("port", 8080, "dashboard: at 127.0.0.1", flag_values=values)


def refuse_flags(values: FlagValues, names: Sequence[str], remedy: str) -> None:
    """Raises `UsageError` for a flag that was given and would change nothing here; `remedy` ends the sentence."""
    for name in names:
        if values[name].present:
            raise UsageError(f"--{name}={_shown_value(values, name)} {remedy}")


def _shown_value(values: FlagValues, name: str) -> Any:
    """A flag's value as it was given, without what must not be repeated."""
    if name == "storage":
        return show_storage(values.storage)
    return recipe_text(values) if name == "config" else values[name].value


def refuse_addresses(words: Sequence[str]) -> None:
    """Raises `UsageError` for a storage that is given without its flag; it may hold a password and is not repeated."""
    if any(map(is_address, words)):
        raise UsageError("an address is no axis; write --storage=ADDRESS")


def shown_command(arguments: Sequence[str]) -> str:
    """A command line of moejax as it may be written down: what a storage's address hides is replaced by `***`."""
    shown = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag, equals, value = argument.partition("=")
        if equals and flag.lstrip("-") == "storage":
            argument = f"{flag}={show_storage(value)}"
        elif before in ("-storage", "--storage"):
            argument = show_storage(argument)
        elif not argument.startswith("-") and is_address(argument):
            argument = HIDDEN
        shown.append(argument)
    return shlex.join(["moejax", *shown])


def search(values: FlagValues, space: Space, recipe: str, directory: Path, command: str) -> None:
    """Makes a study, or finds it, and works on it."""
    if space.axes is None:
        raise UsageError(
            "--search draws from axes; a sweep() that yields points has none: return a product of axes"
        )
    refuse_flags(
        values, OF_GRIDS, "goes with a sweep of given points, not with --search; leave one out"
    )
    refuse_flags(
        values, OF_RUNNERS, "is for sweeps of given points; leave it out, and start moejax sweep worker, or the same "
        "command, as often as you like",
    )  # fmt: skip
    axes = search_axes(space.axes)
    definition = Definition(
        recipe=recipe,
        base=values.config.to_dict(),
        axes=axes,
        sampler=values.search,
        pruner=values.pruner,
        seed=values.search_seed,
        trials=values.trials,
        fractions=common_fractions(read_config_flag(values, varied_keys(space)), axes),
        is_filtered=space.is_filtered,
        objective=objective_of(axes),
    )
    if definition.objective != LOSS:
        log.info("axes change what a token is: points are compared by %s", definition.objective)
    check_search(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name, storage = (
        values.study or directory.name,
        _storage(values) or str(directory / "study.journal"),
    )
    study = create_study(storage, name, definition)
    if definition.is_filtered:
        log.info("others join with the same command")
    else:
        join = ["sweep", "worker", f"--study={name}", f"--storage={storage}", f"--dir={directory}"]
        log.info("others join with %s", shown_command(join))
    log.info("%s shows it", dashboard_command(storage))
    with StopSignals() as stop:
        _work(values, study, Trials(directory, definition, command, stop, space.allows))


def join_search(values: FlagValues, command: str) -> None:
    """A worker of a study that exists."""
    for flag in ("study", "storage"):
        if not values[flag].value:
            raise UsageError(f"--{flag} is missing; moejax sweep --search says which")
    directory = read_folder_to_write(values.dir or f"runs/{values.study}", "--dir")
    study = open_study(_storage(values), values.study)
    definition = definition_of(study)
    if definition.is_filtered:
        raise StudyError(
            f"study {values.study!r} leaves points out by a where(...) of its recipe {definition.recipe}, which a "
            "worker does not know; join with the command that made the study, moejax sweep --config=... --search=..., "
            "with the same flags and axes"
        )
    check_search(directory)
    with StopSignals() as stop:
        _work(values, study, Trials(directory, definition, command, stop))


def _work(values: FlagValues, study, trials: Trials) -> None:
    keep_compilation_cache()
    told = work(
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
    found = best(study)
    print_result(
        {
            "trials told by this worker": told,
            "best": found if values.json else found and str(found),
        },
        is_json=values.json,
    )
    failed = untrained(study)
    if failed:
        raise StudyError(
            f"{len(failed)} of {len(rows)} points could not be trained (arm {failed[0]['arm']}: {failed[0]['error']}); "
            "leave such points out, or search again under another --study"
        )


def show_dashboard(values: FlagValues) -> None:
    """optuna-dashboard, until it is interrupted."""
    if not values.storage:
        raise UsageError("--storage is missing; moejax sweep --search says which")
    if not 0 < values.port < 65536:
        raise UsageError(f"--port={values.port} must be between 1 and 65535")
    serve_dashboard(_storage(values), port=values.port)


def _storage(values: FlagValues) -> str:
    """Where a study is: a URL as it was given, or a path, resolved."""
    if not values.storage or not is_path(values.storage):
        return values.storage
    return str(resolve_path(values.storage, "--storage"))
