"""Flags that several verbs share."""

import dataclasses
from pathlib import Path

from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from moejax.cli import UsageError
from moejax.config import Config, MeshConfig, resolve


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
