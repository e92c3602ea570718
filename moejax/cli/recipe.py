"""Reads recipes, Python files whose `get_config` returns a configuration, or runs' `config.json`.

What is wrong in a recipe is said in one line.
"""

import contextlib
import difflib
import inspect
import linecache
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from absl.flags import FlagValues
from ml_collections import ConfigDict, config_flags

from moejax.cli.errors import UsageError
from moejax.config import (
    SECTIONS,
    ConfigError,
    check_key,
    default,
    given_leaves,
    leaves,
    nearest,
)
from moejax.paths import SCHEME, resolve_path
from moejax.training.run_directory.layout import read_config

MODULE = "moejax_recipe"

RECORD = "config.json"
"""Of a run directory: its configuration is a recipe, too."""

UNKNOWN_KEY = (r'\W*Key "(\w+)" does not exist', r'\W*(\w+)\W+(?:n)?Did you mean "')
"""How a locked `ConfigDict` says that it lacks a key: when it is set, and when it is read."""

WRONG_TYPE = (
    r"Could not override field '(\w+)' .*?\. (.*) is of original type <class '(\w+)'> .* "
    r"type <class '(\w+)'>"
)


class RecipeError(UsageError):
    """A recipe cannot be used; the message names the file, the line, the cause and the remedy."""


class RecipeParser(flags.ArgumentParser):
    """Reads `--config=FILE[:ARG]`.

    Attributes:
      module: of the recipe that was read last, executed once; None before.
    """

    module: types.ModuleType | None = None

    def parse(self, path: str) -> ConfigDict:
        """Returns the locked `ConfigDict` of a recipe.

        Raises:
          RecipeError: there is none, or it is wrong.
        """
        file, argument = split_recipe(path)
        if Path(file).name == RECORD and argument is None:
            return _recorded(file)
        self.module = _execute(_find(file), file)
        found = _configuration(self.module, file, argument)
        if not isinstance(found, ConfigDict):
            found = ConfigDict(found)
        return found.lock()


def define_recipe(values: FlagValues, arguments: list[str], default: str | None) -> None:
    """Defines `--config=FILE[:ARG]`, and `--config.a.b=value` for each leaf in `arguments`."""
    # `--flagfile` of absl is no flag of ours.
    read = [word for word in arguments if not word.lstrip("-").startswith("flagfile")]
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a recipe, FILE[:ARG]; --config.section.leaf=value overrides a leaf",
        flag_values=values,
        sys_argv=["moejax", *read],
    )
    values["config"].parser = RecipeParser()
    if default is not None:
        values.set_default("config", default)


def _recorded(file: str) -> ConfigDict:
    """Returns the configuration of a run, from its `config.json`: data, of which nothing is run."""
    path = resolve_path(file, "--config")
    if not path.is_file():
        raise RecipeError(f"--config={file} does not exist; {_nearest(file, path)}")
    if b'"model_type"' in path.read_bytes():
        raise RecipeError(
            f"--config={file} is that of a released model; convert it first, by moejax convert "
            f"--hf={Path(file).parent} --workdir=RUN, and give RUN/{RECORD}"
        )
    recipe = default()
    for key, value in given_leaves(read_config(path.parent)).items():
        section, name = key.split(".")
        recipe[section][name] = value
    return recipe


def split_recipe(text: str) -> tuple[str, str | None]:
    """Returns the file and the argument of `FILE[:ARG]`; None if there is no argument."""
    stem, separator, argument = text.partition(".py:")
    if separator:
        return f"{stem}.py", argument
    if text.endswith(".py") or SCHEME.match(text) or Path(text).exists():
        return text, None
    file, separator, argument = text.partition(":")
    return file, argument if separator else None


def recipe_name(text: str) -> str:
    """Returns what runs of a recipe are called: the file's name, and after it the argument.

    A recipe that is a run's record has the run's name.
    """
    file, argument = split_recipe(text)
    path = Path(file)
    stem = path.resolve().parent.name if path.name == RECORD else path.stem
    if argument is None:
        return stem
    safe_argument = re.sub(r"[^A-Za-z0-9.-]", "_", argument)
    return f"{stem}_{safe_argument}"


def own_function(values: FlagValues, name: str) -> Callable[..., Any] | None:
    """Returns a function of the recipe that `--config` gave; None if it has none of that name."""
    found: Callable[..., Any] | None = own_value(values, name)
    return found


def own_value(values: FlagValues, name: str) -> Any:
    """Returns what the recipe that `--config` gave defines; None if it has nothing of that name."""
    parser = values["config"].parser
    if not isinstance(parser, RecipeParser):
        return None
    return getattr(parser.module, name, None)


@contextlib.contextmanager
def explained(file: str) -> Iterator[None]:
    """Turns whatever the code of a recipe raises into a `RecipeError`."""
    try:
        yield
    except (Exception, SystemExit) as error:  # it is the user's code: it may raise anything
        raise RecipeError(_explain(error, file)) from error


def _find(file: str) -> Path:
    """Returns the recipe's path, which is a file."""
    path = resolve_path(file, "--config")
    if path.is_file() and path.suffix == ".py":
        return path
    if path.is_file():
        raise RecipeError(
            f"--config={file} is no recipe, which is a Python file, NAME.py; docs/sweeps.md shows "
            "one"
        )
    if path.is_dir():
        found = sorted(path.glob("*.py"))
        example = f", such as --config={Path(file) / found[0].name}" if found else ""
        raise RecipeError(f"--config={file} is a folder; name a recipe in it{example}")
    raise RecipeError(f"--config={file} does not exist; {_nearest(file, path)}")


def _nearest(file: str, path: Path) -> str:
    """Returns a hint at recipes with nearly the name of one that is missing."""
    folder = path.parent
    candidates = [*Path("configs").rglob("*.py"), *folder.glob("*.py")]
    recipes = {recipe.stem: recipe for recipe in candidates}
    near = difflib.get_close_matches(path.stem, recipes, n=2, cutoff=0.6)
    if not near:
        return "give the path of a recipe, such as --config=configs/tiny_moe.py"
    paths = [_short_path(recipes[name]) for name in near]
    meant = " or ".join(f"--config={path}" for path in paths)
    return f"did you mean {meant}?"


def _short_path(path: Path) -> Path:
    """Returns a path as it is written in the current folder, or the full path of one elsewhere."""
    full = path.resolve()
    here = Path.cwd()
    if full.is_relative_to(here):
        return full.relative_to(here)
    return full


def _execute(path: Path, file: str) -> types.ModuleType:
    """Returns a new module of the recipe: two recipes of one process do not see each other."""
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    sys.modules[MODULE] = module  # where dataclasses look up their annotations
    code = path.read_bytes()
    with explained(file):
        exec(compile(code, path, "exec"), module.__dict__)
    return module


def _configuration(
    module: types.ModuleType,
    file: str,
    argument: str | None,
) -> Mapping[str, Any] | ConfigDict:
    """Returns what the recipe's `get_config` returns."""
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise RecipeError(
            f"{file} has no function get_config; define one that returns a ConfigDict, as configs/ "
            "does"
        )
    arguments = [] if argument is None else [argument]
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        if argument is None:
            message = f"{file}: get_config needs an argument; write --config={file}:ARG"
        else:
            message = f"{file}: get_config takes no argument; leave :{argument} out"
        raise RecipeError(message) from error
    with explained(file):
        config = get_config(*arguments)
    if config is None:
        line = get_config.__code__.co_firstlineno if hasattr(get_config, "__code__") else 1
        raise RecipeError(
            f"{file}, line {line}: get_config returns nothing; end it with `return config`"
        )
    if not isinstance(config, Mapping | ConfigDict):
        raise RecipeError(
            f"{file}: get_config returns {type(config).__name__}; it must return a ConfigDict"
        )
    return config


def _explain(error: BaseException, file: str) -> str:
    """Returns the file, the line, the cause and the remedy, in one line."""
    path = str(resolve_path(file))
    if isinstance(error, SyntaxError) and error.filename == path:
        text = error.text or ""
        source = text.strip() or "no text"
        return f"{file}, line {error.lineno}: {error.msg}: {source}; correct that line"
    line = _line_in(path, error)
    if not line:
        cause = _cause(error, "")
        return f"{file}: {cause}"
    source = linecache.getline(path, line)
    cause = _cause(error, source.strip())
    return f"{file}, line {line}: {cause}"


def _line_in(path: str, error: BaseException) -> int | None:
    """Returns the innermost line of a file that an error came through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == path:
            return frame.lineno
    return None


def _cause(error: BaseException, source: str) -> str:
    """Returns what happened at a line of a recipe, and what to do."""
    if type(error).__module__.startswith("moejax."):  # our own errors name the remedy
        return str(error)
    if isinstance(error, SystemExit):
        return (
            f"`{source}` ends the program; a recipe returns a configuration, or raises an error "
            "that says why not"
        )
    if isinstance(error, ImportError) and "relative import" in str(error):
        return (
            f"`{source}` is relative, and a recipe is read from its file alone; import by full "
            "name, with the folder on PYTHONPATH"
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error}; install it in this environment, correct the name, or put its folder on "
            "PYTHONPATH"
        )
    text = " ".join(str(error).split())
    missing = _missing_key(error, text)
    if missing:
        return _unknown_leaf(missing, source)
    if wrong := re.match(WRONG_TYPE, text):
        key, value, found, wanted = wrong.groups()
        return f"`{source}`: {key}={value} is {found}; it must be {wanted}"
    place = f", at `{source}`" if source else ""
    return f"{type(error).__name__}: {text}{place}; correct it, or see the traceback with --debug"


def _missing_key(error: BaseException, text: str) -> str | None:
    """Returns the key that a locked `ConfigDict` lacks, if that is what an error says."""
    if not isinstance(error, AttributeError | KeyError):
        return None
    for pattern in UNKNOWN_KEY:
        if found := re.match(pattern, text):
            return found.group(1)
    return None


def _unknown_leaf(name: str, source: str) -> str:
    """Returns that a name is no key of the configuration, and the nearest that is."""
    before_name = re.search(rf"(\w+)(?:\.|['\"]?\]?\[['\"]){name}\b", source)
    section = before_name.group(1) if before_name else ""
    if section in SECTIONS:
        try:
            check_key(f"{section}.{name}")
        except ConfigError as error:
            return str(error)
    key_of = {name: name for name in SECTIONS}
    for key, _ in leaves():
        _, _, last_part = key.rpartition(".")
        key_of[last_part] = key
    near = nearest(name, key_of)
    return f"{name} is not a config key; the nearest is {key_of[near]}"
