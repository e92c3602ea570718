"""Flags that several verbs share."""

import contextlib
import dataclasses
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from moejax.cli import UsageError
from moejax.cli.init_source import complete_source
from moejax.cli.recipe import define_recipe
from moejax.cli.vocabulary import complete_vocabulary
from moejax.config import Config, MeshConfig, resolve
from moejax.paths import check_run_folder, check_writable, check_writable_file, resolve_path
from moejax.seeds import LARGEST_SEED
from moejax.training.multihost import processes
from moejax.training.run_directory.text import TextPlaces

LONGEST_WAIT_S = 86400.0
"""A day, for processes that wait for each other at the start."""

log = logging.getLogger("moejax")


def define_config(values: FlagValues, arguments: list[str], default: str | None = None) -> None:
    """Defines `--config=FILE[:ARG]` and `--config.a.b=value` for every leaf."""
    define_recipe(values, arguments, default)


def read_config_flag(values: FlagValues, varied: Collection[str] = ()) -> Config:
    """Returns the resolved configuration; paths in the recipe become absolute.

    Args:
      values: parsed flags.
      varied: keys that a sweep varies: leaves of the recipe that need them may be read in some of
        its arms.

    Raises:
      UsageError: no `--config`.
      ConfigError: a value that cannot work.
      DataError: a tokenizer's file that cannot be used.
    """
    recipe_text(values)  # raises the error where there is none
    overrides = config_flags.get_override_values(values["config"])
    complete_vocabulary(values.config)
    complete_source(values.config)
    return resolve(values.config, typed=overrides, varied=varied)


def recipe_text(values: FlagValues) -> str:
    """Returns `FILE[:ARG]` as it was given.

    Raises:
      UsageError: no `--config`.
    """
    if values["config"].value is None:
        raise UsageError("--config is missing; give a recipe, such as --config=configs/tiny_moe.py")
    return str(config_flags.get_config_filename(values["config"]))


def define_processes(values: FlagValues) -> None:
    """Defines `--distributed`, or `--coordinator`, `--num_processes` and `--process_id`."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "one of several processes, as SLURM, Open MPI, a TPU pod or GKE say",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT at which process 0 listens to the others",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "with --coordinator: how many there are",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "with --coordinator: which one this is, from 0",
        flag_values=values,
    )
    flags.DEFINE_float(
        "wait_s",
        processes.START_WAIT_S,
        "seconds that processes wait for each other at the start",
        flag_values=values,
    )


def distributed_context(values: FlagValues, verb: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which several processes are one machine, if the flags ask for that.

    The flags are those of `define_processes`.

    Raises:
      UsageError: half of the flags, values that cannot work, or several processes launched that
        would not meet.
    """
    if not 1 <= values.wait_s <= LONGEST_WAIT_S:
        raise UsageError(
            f"--wait_s={values.wait_s:g} must be between 1 and {LONGEST_WAIT_S:g} seconds"
        )
    if values.coordinator:
        _check_coordinator(values)
        return _initialize_distributed(
            values.coordinator,
            values.num_processes,
            values.process_id,
            values.wait_s,
        )
    for flag, value in _given_numbers(values).items():
        if value is not None:
            raise UsageError(
                f"{flag}={value} needs --coordinator=HOST:PORT of process 0; add it, or use "
                "--distributed"
            )
    if values.distributed:
        return _initialize_distributed(wait_s=values.wait_s)
    if values["wait_s"].present:
        raise UsageError(
            f"--wait_s={values.wait_s:g} needs --distributed or --coordinator; add one, or leave "
            "it out"
        )
    refuse_several_processes(f"{verb} without --distributed", "add --distributed, or launch one")
    return contextlib.nullcontext()


def _given_numbers(values: FlagValues) -> dict[str, int | None]:
    return {"--num_processes": values.num_processes, "--process_id": values.process_id}


def _check_coordinator(values: FlagValues) -> None:
    """Raises `UsageError` for an address or numbers of processes that cannot work."""
    coordinator, number = values.coordinator, values.num_processes
    if values.distributed:
        raise UsageError(
            f"--distributed and --coordinator={coordinator} exclude each other; give one"
        )
    for flag, value in _given_numbers(values).items():
        if value is None:
            raise UsageError(f"--coordinator={coordinator} needs {flag}, too; add it")
    address = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not address or not 0 < int(address.group(1)) < 2**16:
        raise UsageError(
            f"--coordinator={coordinator} must be HOST:PORT with a port up to 65535, such as "
            "node1:8476"
        )
    if number < 1 or not 0 <= values.process_id < number:
        raise UsageError(
            f"--process_id={values.process_id} must be between 0 and --num_processes={number} "
            "less one"
        )


@contextlib.contextmanager
def _initialize_distributed(*address: Any, **wait: Any) -> Iterator[None]:
    """Enters `initialize_distributed` with a clean standard output.

    Gloo prints a greeting there, where one JSON document must stand alone: file descriptor 1 is
    standard error meanwhile, and what Python prints goes to the original.
    """
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            os.fdopen(original, "w", closefd=False) as output,
            contextlib.redirect_stdout(output),
            processes.initialize_distributed(*address, **wait),
        ):
            yield
    finally:
        os.dup2(original, 1)
        os.close(original)


def refuse_several_processes(verb: str, remedy: str = "launch one") -> None:
    """Raises `UsageError` if a launcher started several processes, which would do the same work."""
    number, variable = processes.launched()
    if number > 1:
        raise UsageError(
            f"moejax {verb} works in one process, and a launcher started at least {number} "
            f"({variable}); {remedy}"
        )


def define_workdir(values: FlagValues, text: str = "the run directory") -> None:
    """Defines `--workdir=DIR`."""
    flags.DEFINE_string("workdir", "", text, flag_values=values)


def read_workdir(values: FlagValues) -> Path:
    """Returns the run directory, which must exist.

    Raises:
      UsageError: the flag is missing or names no directory.
    """
    if not values.workdir:
        raise UsageError(
            "--workdir is missing; name the folder of a run, such as --workdir=runs/tiny_moe"
        )
    path = resolve_path(values.workdir, "--workdir")
    if not path.is_dir():
        raise UsageError(f"--workdir={values.workdir} is not a folder; train a run there first")
    return path


def define_hf(
    values: FlagValues,
    text: str = "a released model's folder in the Hugging Face layout, in place of --workdir",
) -> None:
    """Defines `--hf=DIR`."""
    flags.DEFINE_string("hf", "", text, flag_values=values)


def read_hf(values: FlagValues) -> Path | None:
    """Returns the folder of a released model; None if a run directory is given.

    Raises:
      UsageError: both are given, or the folder does not exist.
    """
    if not values.hf:
        return None
    if values.workdir:
        raise UsageError("--hf and --workdir exclude each other; give one")
    return read_hf_folder(values)


def read_hf_folder(values: FlagValues) -> Path:
    """Returns the folder of `--hf`, which must exist.

    Raises:
      UsageError: it does not.
    """
    path = resolve_path(values.hf, "--hf")
    if not path.is_dir():
        raise UsageError(f"--hf={values.hf} is not a folder; name one with config.json")
    return path


def read_workdir_to_write(values: FlagValues) -> Path:
    """Returns the run directory, which must exist and be writable.

    Raises:
      UsageError: the flag is missing or names no directory.
      PathError: nothing can be written there.
    """
    path = read_workdir(values)
    check_writable(path, "--workdir")
    return path


def read_folder_to_write(given: str, name: str) -> Path:
    """Returns the path of a folder of one or several runs, which can be written or made.

    Args:
      given: the flag's value.
      name: the flag, such as `--workdir`.

    Raises:
      PathError: nothing can be written there, or no checkpoint.
    """
    path = resolve_path(given, name)
    check_run_folder(path, name)
    return path


def read_file_to_write(given: str, name: str) -> Path:
    """Returns the path of a file that can be written, in a folder that exists.

    Args:
      given: the flag's value.
      name: the flag, such as `--csv`.

    Raises:
      PathError: it cannot be written.
    """
    path = resolve_path(given, name)
    check_writable_file(path, name)
    return path


def define_seed(values: FlagValues, name: str, text: str) -> None:
    """Defines a flag of a seed, 0 by default, in the range that all seeds have."""
    flags.DEFINE_integer(name, 0, text, lower_bound=0, upper_bound=LARGEST_SEED, flag_values=values)


def define_text(values: FlagValues) -> None:
    """Defines `--data.directory=`, `--data.files=` and `--data.source_dir=`.

    They say where a run's text is now.
    """
    flags.DEFINE_string(
        "data.directory",
        "",
        "where the run's rows are, or are prepared again; default as it was recorded by you",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data.files",
        "",
        "where the text of data.source=files is now",
        flag_values=values,
    )
    flags.DEFINE_string(
        "data.source_dir",
        "",
        "where the dataset of data.source=tfds is now",
        flag_values=values,
    )


def read_text_places(values: FlagValues) -> TextPlaces:
    """Returns what the flags of `define_text` say."""
    names = [field.name for field in dataclasses.fields(TextPlaces)]
    places = {name: values[f"data.{name}"].value or "" for name in names}
    return TextPlaces(**places)


def read_prompts(values: FlagValues) -> list[str]:
    """Returns the texts of `--prompt`, with bytes that are not UTF-8 replaced and logged."""
    return [_as_text(prompt) for prompt in values.prompt or ()]


def _as_text(prompt: str) -> str:
    # Python keeps bytes of the command line that it could not decode.
    if not any("\udc80" <= character <= "\udcff" for character in prompt):
        return prompt
    text = os.fsencode(prompt).decode("utf-8", errors="replace")
    log.warning("--prompt has bytes that are not UTF-8, which are replaced: %s", text)
    return text


def define_json(values: FlagValues) -> None:
    """Defines `--json`."""
    flags.DEFINE_bool(
        "json",
        False,
        "print one JSON document instead of a table",
        flag_values=values,
    )


def define_average(values: FlagValues) -> None:
    """Flag of which weights of a run are taken."""
    flags.DEFINE_string(
        "average",
        "",
        "of weights: moving, as the run keeps it (train.average_decay), or how many of the newest "
        "checkpoints; default: none",
        flag_values=values,
    )


def define_mesh(values: FlagValues, text: str) -> None:
    """Defines `--mesh=data=2,expert=4`."""
    flags.DEFINE_string("mesh", "", f"{text}, such as data=2,expert=4", flag_values=values)


def parse_mesh(text: str) -> MeshConfig:
    """Reads `data=2,expert=4`; axes that are not named have size 1.

    Raises:
      UsageError: text that is no list of axes and sizes.
    """
    sizes = {field.name: 1 for field in dataclasses.fields(MeshConfig)}
    parts = text.split(",")
    axes = [part.partition("=")[0] for part in parts]
    for part in parts:
        axis, _, size = part.partition("=")
        is_number = size.removeprefix("-").isdecimal()
        if axis not in sizes or not is_number:
            raise UsageError(
                f"--mesh={text}: {part!r} must be AXIS=SIZE, such as expert=4, of "
                f"{', '.join(sizes)}"
            )
        if axes.count(axis) > 1:
            raise UsageError(
                f"--mesh={text}: {axis} is given {axes.count(axis)} times; give each axis once"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
