"""The words of a command line, checked before anything is done: none is dropped, none counts twice."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli.errors import UsageError
from moejax.config import check_key, leaves, nearest, read_value

OWN_CONFIGURATION = "takes the configuration that its run was trained with"

HIDDEN_FLAG = "storage"
"""Its value may hold a password."""

SYNONYMS = {
    "workdir": ("dir",), "dir": ("workdir",), "output_dir": ("workdir", "dir"), "logdir": ("workdir", "dir"),
    "run": ("workdir",), "max_new_tokens": ("max_tokens",), "num_tokens": ("max_tokens",), "topp": ("top_p",),
    "top-p": ("top_p",), "temp": ("temperature",), "checkpoint": ("step",), "dry_run": ("dry-run",),
}  # fmt: skip
"""Flags that people know by another name, and the names that a verb of ours may have for them."""

LEAF_SYNONYMS = {
    "lr": "optimizer.learning_rate", "steps": "train.num_steps", "batch": "train.batch_size", "bs": "train.batch_size",
    "experts": "moe.num_experts", "layers": "model.num_layers", "width": "model.d_model", "hidden": "model.d_model",
    "heads": "model.num_heads", "length": "data.seq_len", "max_steps": "train.num_steps", "dataset": "data.source",
}  # fmt: skip
"""Leaves that people know by another name."""


def check_arguments(
    verb: str, values: FlagValues, arguments: Sequence[str], takes_words: bool
) -> None:
    """Raises `UsageError` for a flag that the verb does not have or that is given twice, and for a word too many.

    Args:
      verb: of the command.
      values: its flags, not parsed yet.
      arguments: what follows the verb.
      takes_words: whether words that are no flags mean something to the verb.
    """
    given: dict[str, str] = {}
    for name, value in _parts(values, arguments):
        _check_text(name, value)
        if not name:
            if not takes_words:
                raise UsageError(_about_word(verb, values, value))
            continue
        if not _is_known(values, name):
            raise UsageError(_about_unknown(verb, values, name, value))
        key = _without_no(values, name)
        if key != name:
            value = "false"
        if (
            value == "" and key in values and key != "prompt"
        ):  # of a shell's variable that is not set
            raise UsageError(f"--{key}= has an empty value; give one, or leave the flag out")
        if key.startswith("config."):
            read_value(key.removeprefix("config."), value)
        if key in given and not (key in values and isinstance(values[key], flags.MultiFlag)):
            values_given = (
                ""
                if key == HIDDEN_FLAG
                else f", as {format_value(given[key])} and as {format_value(value)}"
            )
            raise UsageError(f"--{key} is given twice{values_given}; give it once")
        given[key] = value
    if "config" in values and "config" not in given and values["config"].default is None:
        overrides = [key for key in given if key.startswith("config.")]
        if overrides:
            raise UsageError(
                f"--{overrides[0]}={given[overrides[0]]} changes a recipe, and --config is missing; "
                "give one, such as --config=configs/tiny_moe.py"
            )


def config_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with `--config` before the leaves that it has, as `config_flags` wants them."""
    for i, argument in enumerate(arguments):
        if re.match(r"--?config(=|$)", argument):
            end = i + 1 if "=" in argument else i + 2
            return [*arguments[i:end], *arguments[:i], *arguments[end:]]
    return [*arguments]


@contextlib.contextmanager
def plain_errors(values: FlagValues) -> Iterator[None]:
    """Within it, a value that a flag cannot have is a `UsageError` in words that name what it must be."""
    try:
        yield
    except flags.IllegalFlagValueError as error:
        if isinstance(
            error.__context__, UsageError
        ):  # a recipe that is wrong, in the words of absl
            raise error.__context__ from error.__context__.__cause__
        raise UsageError(_about_value(error, values)) from error


def _about_value(error: flags.IllegalFlagValueError, values: FlagValues) -> str:
    match = re.match(r"flag --([^=]+)=(.*?): (.*)", str(error), re.DOTALL)
    if match is None:
        return str(error)
    name, value, reason = match.groups()
    kind = _kind(values, name)
    given = (
        f"{name.removeprefix('config.')}={value}"
        if name.startswith("config.")
        else f"--{name}={value}"
    )
    parser = values[name].parser if name in values else None
    if isinstance(parser, flags.EnumParser):
        choices = [choice for choice in parser.enum_values if choice]
        near = nearest(value, choices)
        return f"{given} must be one of {', '.join(choices)}; the nearest is {near}"
    if "range" in reason:
        return f"{given} must be {reason.partition(' is not ')[2]}"
    needed = {"int": "an integer", "float": "a number", "bool": "true or false"}.get(kind)
    return f"{given}: {reason}" if needed is None else f"{given} must be {needed}"


def verb_first(arguments: Sequence[str], verbs: Sequence[str]) -> str:
    """The message for flags that stand before the verb."""
    arguments = [format_value(argument) for argument in arguments]
    found = next((argument for argument in arguments if argument in verbs), None)
    if found is None:
        return f"{arguments[0]} is a flag, and the verb is missing: moejax VERB {arguments[0]}; see moejax --help"
    others = [argument for argument in arguments if argument != found]
    return f"{arguments[0]} stands before the verb; write moejax {found} {' '.join(others)}"


def format_value(text: str) -> str:
    """An argument as it may be repeated: what may be an address with a password is left out."""
    return "***" if ":/" in text and ("@" in text or "?" in text) else text


def _parts(values: FlagValues, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the name and the value of each flag in turn, as absl reads them; a word that is none has no name."""
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--":
            for word in remaining:
                yield "", word
            return
        if not argument.strip("-") or not argument.startswith("-"):
            yield "", argument
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        if equals or not _is_known(values, name):
            yield name, value
        elif _is_boolean(values, name):
            yield name, "true"
        else:
            yield name, _next_value(values, name, remaining)


def _next_value(values: FlagValues, name: str, remaining: Iterator[str]) -> str:
    """The word after a flag, which is its value."""
    value = next(remaining, None)
    if value is None or (value.startswith("--") and _is_known(values, value[2:].partition("=")[0])):
        raise UsageError(f"--{name} lacks its value; write --{name}=VALUE")
    return value


def _is_known(values: FlagValues, name: str) -> bool:
    name = _without_no(values, name)
    return name in values or ("config" in values and name.startswith("config."))


def _without_no(values: FlagValues, name: str) -> str:
    """The flag that `--noFLAG` switches off; other names as they are."""
    if name in values or not name.startswith("no"):
        return name
    rest = name[2:]
    is_flag = rest in values and values[rest].boolean
    is_leaf = "config" in values and rest.startswith("config.") and _kind(values, rest) == "bool"
    return rest if is_flag or is_leaf else name


def _is_boolean(values: FlagValues, name: str) -> bool:
    return _kind(values, _without_no(values, name)) == "bool"


def _kind(values: FlagValues, name: str) -> str:
    """What a flag's value is: int, float, bool or something else."""
    if name.startswith("config."):
        annotation = dict(leaves()).get(name.removeprefix("config."))
        return getattr(annotation, "__name__", "text")
    flag = values[name]
    return "bool" if flag.boolean else flag.flag_type()


def _check_text(name: str, value: str) -> None:
    """Raises `UsageError` for bytes of the command line that are not UTF-8; a prompt replaces its own."""
    if name == "prompt":
        return
    try:
        f"{name}={value}".encode()
    except UnicodeEncodeError as error:
        escaped = os.fsencode(value).decode(errors="backslashreplace")
        where = f"--{name}={escaped}" if name else escaped
        raise UsageError(
            f"{where} is not UTF-8; give names that are, such as plain letters"
        ) from error


def _about_unknown(verb: str, values: FlagValues, name: str, value: str) -> str:
    """Why `--name` is refused, and what was probably meant."""
    start = f"--{name} is no flag of moejax {verb}"
    equals = f"={value}" if value else ""
    for synonym in SYNONYMS.get(name, ()):
        if synonym in values:
            return f"{start}; write --{synonym}{equals}"
    leaf = _leaf(name)
    if "config" not in values and (leaf or name == "config" or name.startswith("config.")):
        return (
            f"{start}, which {OWN_CONFIGURATION}; leave it out"
            if "workdir" in values
            else f"{start}; leave it out"
        )
    if leaf:
        return f"{start}; write --config.{leaf}{equals}"
    known = [flag for flag in values if flag != "h"]
    tails = {key.partition(".")[2]: key for key, _ in leaves()} if "config" in values else {}
    candidates = [*known, *(f"config.{key}" for key in tails.values()), *tails]
    near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    if not near:
        return f"{start}; see moejax {verb} --help"
    flag = f"config.{tails[near[0]]}" if near[0] in tails and near[0] not in values else near[0]
    return f"{start}; the nearest is --{flag}; see moejax {verb} --help"


def _about_word(verb: str, values: FlagValues, word: str) -> str:
    """Why a word that is no flag is refused, and what was probably meant."""
    key, equals, value = word.partition("=")
    start = f"moejax {verb} takes flags alone, not {format_value(word)}"
    if equals and key in values:
        return f"{start}; write --{format_value(word)}"
    leaf = _leaf(key) if equals else None
    if leaf and "config" in values:
        return f"{start}; write --config.{leaf}={value}"
    if leaf:
        return f"{start}; it {OWN_CONFIGURATION}: leave that out"
    if equals and "." in key and "config" in values:
        check_key(key.removeprefix("config."))  # names the nearest
    if "config" in values and word.partition(".py:")[0].removesuffix(".py") != word:
        return f"{start}; write --config={word}"
    if "workdir" in values and Path(word).is_dir():
        return f"{start}; write --workdir={word}"
    if word.lower() in ("true", "false"):
        return f"{start}; a flag that is true or false has its value after an equals sign, --FLAG={word.lower()}"
    return f"{start}; leave it out, or see moejax {verb} --help"


def _leaf(name: str) -> str | None:
    """The leaf that a name means for certain: its key, its last part if no other has it, or a common synonym.

    Schedules have the last parts of what they schedule, which is meant by a name alone.
    """
    name = name.removeprefix("config.")
    keys = [key for key, _ in leaves()]
    if name in keys:
        return name
    ends = [
        key for key in keys if key.partition(".")[2] == name and not key.startswith("schedule.")
    ]
    return ends[0] if len(ends) == 1 else LEAF_SYNONYMS.get(name)
