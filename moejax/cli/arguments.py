"""Checks the words of a command line before anything runs: none is dropped, none counts twice."""

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

NEEDED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
}
"""What a value must be, by the type of its flag."""

SYNONYMS = {
    "workdir": ("dir",),
    "dir": ("workdir",),
    "output_dir": ("workdir", "dir"),
    "logdir": ("workdir", "dir"),
    "run": ("workdir",),
    "max_new_tokens": ("max_tokens",),
    "num_tokens": ("max_tokens",),
    "topp": ("top_p",),
    "top-p": ("top_p",),
    "temp": ("temperature",),
    "checkpoint": ("step",),
    "dry_run": ("dry-run",),
}
"""Flags that people know by another name, and the names that a verb of ours may have for them."""

LEAF_SYNONYMS = {
    "lr": "optimizer.learning_rate",
    "steps": "train.num_steps",
    "max_steps": "train.num_steps",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "experts": "moe.num_experts",
    "layers": "model.num_layers",
    "width": "model.d_model",
    "hidden": "model.d_model",
    "heads": "attention.num_heads",
    "length": "data.seq_len",
    "dataset": "data.source",
}
"""Leaves that people know by another name."""


def check_arguments(
    verb: str,
    values: FlagValues,
    arguments: Sequence[str],
    takes_words: bool,
) -> None:
    """Raises `UsageError` for what the verb does not take.

    That is a flag that it does not have, a flag that is given twice or without a value, and a word
    that is no flag.

    Args:
      verb: of the command.
      values: its flags, not parsed yet.
      arguments: what follows the verb.
      takes_words: whether words that are no flags mean something to the verb.
    """
    given: dict[str, str] = {}
    for name, value in _parts(values, arguments):
        _check_text(name, value)
        if not name and not takes_words:
            raise UsageError(_about_word(verb, values, value))
        if name and not _is_known(values, name):
            raise UsageError(_about_unknown(verb, values, name, value))
        if name:
            _check_flag(values, name, value, given)
    _check_recipe_given(values, given)


def _check_flag(values: FlagValues, name: str, value: str, given: dict[str, str]) -> None:
    """Checks one flag of the verb, and adds it to those given."""
    key = _without_no(values, name)
    if key != name:
        value = "false"
    # A prompt may be empty; other values are empty because a variable of the shell is not set.
    if value == "" and key in values and key != "prompt":
        raise UsageError(f"--{key}= has an empty value; give one, or leave the flag out")
    if key.startswith("config."):
        leaf = key.removeprefix("config.")
        read_value(leaf, value)
    is_repeatable = key in values and isinstance(values[key], flags.MultiFlag)
    if key in given and not is_repeatable:
        raise UsageError(_about_twice(key, given[key], value))
    given[key] = value


def _about_twice(key: str, first: str, second: str) -> str:
    """Returns that a flag is given twice, with both values unless they are hidden."""
    if key == HIDDEN_FLAG:
        return f"--{key} is given twice; give it once"
    shown = f"as {format_value(first)} and as {format_value(second)}"
    return f"--{key} is given twice, {shown}; give it once"


def _check_recipe_given(values: FlagValues, given: dict[str, str]) -> None:
    """Raises `UsageError` for settings that change a recipe where none is given."""
    if "config" not in values or "config" in given or values["config"].default is not None:
        return
    for key, value in given.items():
        if key.startswith("config."):
            raise UsageError(
                f"--{key}={value} changes a recipe, and --config is missing; "
                "give one, such as --config=configs/tiny_moe.py"
            )


def config_first(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with `--config` before its leaves, as `config_flags` wants them."""
    for start, argument in enumerate(arguments):
        if not re.match(r"--?config(=|$)", argument):
            continue
        has_value = "=" in argument  # else its value is the next word
        end = start + 1 if has_value else start + 2
        config = arguments[start:end]
        before = arguments[:start]
        after = arguments[end:]
        return [*config, *before, *after]
    return [*arguments]


@contextlib.contextmanager
def plain_errors(values: FlagValues) -> Iterator[None]:
    """Turns absl's errors about values of flags into `UsageError`, which says what they must be."""
    try:
        yield
    except flags.IllegalFlagValueError as error:
        cause = error.__context__
        if isinstance(cause, UsageError):  # about a recipe, which absl has put in its own words
            raise cause from cause.__cause__
        raise UsageError(_about_value(error, values)) from error


def _about_value(error: flags.IllegalFlagValueError, values: FlagValues) -> str:
    """Returns what a value is and what it must be."""
    match = re.match(r"flag --([^=]+)=(.*?): (.*)", str(error), re.DOTALL)
    if match is None:
        return str(error)
    name, value, reason = match.groups()
    leaf = name.removeprefix("config.")
    given = f"{leaf}={value}" if leaf != name else f"--{name}={value}"
    parser = values[name].parser if name in values else None
    if isinstance(parser, flags.EnumParser):
        choices = [choice for choice in parser.enum_values if choice]
        shown = ", ".join(choices)
        near = nearest(value, choices)
        return f"{given} must be one of {shown}; the nearest is {near}"
    if "range" in reason:
        _, _, limits = reason.partition(" is not ")
        return f"{given} must be {limits}"
    kind = _kind(values, name)
    if kind not in NEEDED:
        return f"{given}: {reason}"
    return f"{given} must be {NEEDED[kind]}"


def verb_first(arguments: Sequence[str], verbs: Sequence[str]) -> str:
    """Returns the message for flags that come before the verb."""
    shown = [format_value(argument) for argument in arguments]
    first, *_ = shown
    found = [argument for argument in shown if argument in verbs]
    if not found:
        return f"{first} is a flag, and the verb is missing: moejax VERB {first}; see moejax --help"
    verb, *_ = found
    others = [argument for argument in shown if argument != verb]
    words = " ".join([verb, *others])
    return f"{first} stands before the verb; write moejax {words}"


def format_value(text: str) -> str:
    """Returns an argument as it may be shown, without what may be an address with a password."""
    is_address = ":/" in text
    has_credentials = "@" in text or "?" in text
    if is_address and has_credentials:
        return "***"
    return text


def _parts(values: FlagValues, arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the name and the value of each flag in turn, as absl reads them.

    A word that is no flag has an empty name.
    """
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
    """Returns the word after a flag, which is its value."""
    value = next(remaining, None)
    if value is None or _is_flag(values, value):
        raise UsageError(f"--{name} lacks its value; write --{name}=VALUE")
    return value


def _is_flag(values: FlagValues, word: str) -> bool:
    """Whether a word is a flag of the verb, with or without a value."""
    name, _, _ = word.removeprefix("--").partition("=")
    return word.startswith("--") and _is_known(values, name)


def _is_known(values: FlagValues, name: str) -> bool:
    """Whether the verb has that flag, or takes it as a leaf of the recipe."""
    name = _without_no(values, name)
    is_leaf = "config" in values and name.startswith("config.")
    return name in values or is_leaf


def _without_no(values: FlagValues, name: str) -> str:
    """Returns the flag that `--noFLAG` switches off; other names as they are."""
    if name in values or not name.startswith("no"):
        return name
    rest = name.removeprefix("no")
    if rest in values and values[rest].boolean:
        return rest
    is_leaf = "config" in values and rest.startswith("config.")
    if is_leaf and _kind(values, rest) == "bool":
        return rest
    return name


def _is_boolean(values: FlagValues, name: str) -> bool:
    """Whether a flag is true or false."""
    return _kind(values, _without_no(values, name)) == "bool"


def _kind(values: FlagValues, name: str) -> str:
    """Returns the type of a flag's value: int, float, bool or something else."""
    if name.startswith("config."):
        annotation = dict(leaves()).get(name.removeprefix("config."))
        return getattr(annotation, "__name__", "text")
    flag = values[name]
    if flag.boolean:
        return "bool"
    return flag.flag_type()


def _check_text(name: str, value: str) -> None:
    """Raises `UsageError` for bytes of the command line that are not UTF-8.

    Those of a prompt are replaced, by its verb.
    """
    if name == "prompt":
        return
    try:
        f"{name}={value}".encode()
    except UnicodeEncodeError as error:
        escaped = os.fsencode(value).decode(errors="backslashreplace")
        where = f"--{name}={escaped}" if name else escaped
        message = f"{where} is not UTF-8; give names that are, such as plain letters"
        raise UsageError(message) from error


def _about_unknown(verb: str, values: FlagValues, name: str, value: str) -> str:
    """Returns why `--name` is refused, and what was probably meant."""
    start = f"--{name} is no flag of moejax {verb}"
    equals = f"={value}" if value else ""
    for synonym in SYNONYMS.get(name, ()):
        if synonym in values:
            return f"{start}; write --{synonym}{equals}"
    leaf = _leaf(name)
    is_of_recipe = leaf or name == "config" or name.startswith("config.")
    if "config" not in values and is_of_recipe:
        reason = f", which {OWN_CONFIGURATION}" if "workdir" in values else ""
        return f"{start}{reason}; leave it out"
    if leaf:
        return f"{start}; write --config.{leaf}{equals}"
    nearest = _nearest_flag(values, name)
    if nearest is None:
        return f"{start}; see moejax {verb} --help"
    return f"{start}; the nearest is --{nearest}; see moejax {verb} --help"


def _nearest_flag(values: FlagValues, name: str) -> str | None:
    """Returns the flag or leaf whose name is most like this one; None if none is."""
    # By each name that may be meant, the flag that it stands for.
    flag_of: dict[str, str] = {}
    if "config" in values:
        for key, _ in leaves():
            leaf_flag = f"config.{key}"
            flag_of[_last_part(key)] = leaf_flag
            flag_of[leaf_flag] = leaf_flag
    for flag in values:
        if flag != "h":
            flag_of[flag] = flag
    near = difflib.get_close_matches(name, flag_of, n=1, cutoff=0.5)
    if not near:
        return None
    return flag_of[near[0]]


def _last_part(key: str) -> str:
    """Returns a leaf's key without its section."""
    _, _, last_part = key.partition(".")
    return last_part


def _about_word(verb: str, values: FlagValues, word: str) -> str:
    """Returns why a word that is no flag is refused, and what was probably meant."""
    key, equals, value = word.partition("=")
    start = f"moejax {verb} takes flags alone, not {format_value(word)}"
    has_config = "config" in values
    if equals and key in values:
        return f"{start}; write --{format_value(word)}"
    leaf = _leaf(key) if equals else None
    if leaf and has_config:
        return f"{start}; write --config.{leaf}={value}"
    if leaf:
        return f"{start}; it {OWN_CONFIGURATION}: leave that out"
    if equals and "." in key and has_config:
        check_key(key.removeprefix("config."))  # its error names the nearest key
    if has_config and _is_recipe(word):
        return f"{start}; write --config={word}"
    if "workdir" in values and Path(word).is_dir():
        return f"{start}; write --workdir={word}"
    if word.lower() in ("true", "false"):
        return (
            f"{start}; a flag that is true or false has its value after an equals sign, "
            f"--FLAG={word.lower()}"
        )
    return f"{start}; leave it out, or see moejax {verb} --help"


def _is_recipe(word: str) -> bool:
    """Whether a word looks like `FILE.py` or `FILE.py:ARG`."""
    return word.endswith(".py") or ".py:" in word


def _leaf(name: str) -> str | None:
    """Returns the leaf that a name means for certain, or None.

    It means its key, a key of which it is the last part if no other has that, or a common synonym.
    Schedules have the last parts of what they schedule; a name alone means the latter.
    """
    name = name.removeprefix("config.")
    keys = [key for key, _ in leaves()]
    if name in keys:
        return name
    own_keys = [key for key in keys if not key.startswith("schedule.")]
    matching = [key for key in own_keys if _last_part(key) == name]
    if len(matching) == 1:
        return matching[0]
    return LEAF_SYNONYMS.get(name)
