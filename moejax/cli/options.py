"""Flags that several verbs share."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from moejax.cli import UsageError
from moejax.config import Config, MeshConfig, resolve
from moejax.training import processes
from moejax.training.run_text import TextPlaces


def define_config(values: FlagValues, arguments: list[str], default: str | None = None) -> None:
    """`--config=FILE[:ARG]` and `--config.a.b=value` for every leaf."""
    config_flags.DEFINE_config_file(
        "config",
        default,
        "a recipe, FILE[:ARG]; --config.section.leaf=value overrides a leaf",
        flag_values=values,
        sys_argv=["moejax", *arguments],
    )


def read_config_flag(values: FlagValues) -> Config:
    """The resolved configuration.

    Raises:
      UsageError: no `--config`, or its file cannot be used.
      ConfigError: a value that cannot work.
    """
    if values["config"].value is None:
        raise UsageError("--config is missing; give a recipe, such as --config=configs/tiny_moe.py")
    try:
        recipe = values.config
        recipe.keys()  # a file that failed to load says so on first use
    except OSError as error:
        raise UsageError(
            f"--config={config_flags.get_config_filename(values['config'])} cannot be read: {error}"
        ) from error
    return resolve(recipe)


def define_processes(values: FlagValues) -> None:
    """`--distributed`, or `--coordinator`, `--num_processes` and `--process_id`."""
    flags.DEFINE_bool(
        "distributed", False, "one of several processes, as SLURM, Open MPI, a TPU pod or GKE say", flag_values=values
    )
    flags.DEFINE_string("coordinator", "", "HOST:PORT at which process 0 listens to the others", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "with --coordinator: how many there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "with --coordinator: which one this is, from 0", flag_values=values)


def meet_as_flagged(values: FlagValues, verb: str) -> contextlib.AbstractContextManager[None]:
    """What `define_processes` asks for: within it, several processes are one machine.

    Raises:
      UsageError: half of the flags, values that cannot work, or several processes launched that would not meet.
    """
    given = {"--num_processes": values.num_processes, "--process_id": values.process_id}
    if not values.coordinator:
        for flag, value in given.items():
            if value is not None:
                raise UsageError(
                    f"{flag}={value} needs --coordinator=HOST:PORT of process 0; add it, or use --distributed"
                )
        if values.distributed:
            return _meet()
        refuse_several_processes(f"{verb} without --distributed", "add --distributed, or launch one")
        return contextlib.nullcontext()
    if values.distributed:
        raise UsageError(f"--distributed and --coordinator={values.coordinator} exclude each other; give one")
    for flag, value in given.items():
        if value is None:
            raise UsageError(f"--coordinator={values.coordinator} needs {flag}, too; add it")
    if not re.fullmatch(r".+:\d{1,5}", values.coordinator):
        raise UsageError(f"--coordinator={values.coordinator} must be HOST:PORT, such as node1:8476")
    if values.num_processes < 1 or not 0 <= values.process_id < values.num_processes:
        raise UsageError(
            f"--process_id={values.process_id} must be between 0 and --num_processes={values.num_processes} less one"
        )
    return _meet(values.coordinator, values.num_processes, values.process_id)


@contextlib.contextmanager
def _meet(*address: Any) -> Iterator[None]:
    """`processes.meet`, with a clean standard output: gloo greets there, where one JSON document must stand alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            os.fdopen(kept, "w", closefd=False) as output,
            contextlib.redirect_stdout(output),
            processes.meet(*address),
        ):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def refuse_several_processes(verb: str, remedy: str = "launch one") -> None:
    """Raises `UsageError` if a launcher started several processes, each of which would do the same work alone."""
    number, variable = processes.launched()
    if number > 1:
        raise UsageError(f"moejax {verb} works in one process, and {variable}={number} were launched; {remedy}")


def define_workdir(values: FlagValues, text: str = "the run directory") -> None:
    """`--workdir=DIR`."""
    flags.DEFINE_string("workdir", "", text, flag_values=values)


def read_workdir(values: FlagValues) -> Path:
    """The run directory, which must exist.

    Raises:
      UsageError: the flag is missing or names no directory.
    """
    if not values.workdir:
        raise UsageError("--workdir is missing; name the folder of a run, such as --workdir=runs/tiny_moe")
    path = Path(values.workdir)
    if not path.is_dir():
        raise UsageError(f"--workdir={path} is not a folder; train a run there first")
    return path


def define_text(values: FlagValues) -> None:
    """`--data.directory=`, `--data.files=` and `--data.source_dir=`: where a run's text is now."""
    flags.DEFINE_string(
        "data.directory", "", "where the run's rows are, or are prepared again; default as it was recorded by you",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("data.files", "", "where the text of data.source=files is now", flag_values=values)
    flags.DEFINE_string("data.source_dir", "", "where the dataset of data.source=tfds is now", flag_values=values)


def read_text_places(values: FlagValues) -> TextPlaces:
    """What the flags of `define_text` say."""
    return TextPlaces(values["data.directory"].value, values["data.files"].value, values["data.source_dir"].value)


def define_json(values: FlagValues) -> None:
    """`--json`."""
    flags.DEFINE_bool("json", False, "print one JSON document instead of a table", flag_values=values)


def define_mesh(values: FlagValues, text: str) -> None:
    """`--mesh=data=2,expert=4`."""
    flags.DEFINE_string("mesh", "", f"{text}, such as data=2,expert=4", flag_values=values)


def parse_mesh(text: str) -> MeshConfig:
    """From `data=2,expert=4`; axes that are not named have size 1.

    Raises:
      UsageError: text that is no list of axes and sizes.
    """
    sizes = {field.name: 1 for field in dataclasses.fields(MeshConfig)}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise UsageError(f"--mesh={text}: {part!r} must be AXIS=SIZE, such as expert=4, of {', '.join(sizes)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
