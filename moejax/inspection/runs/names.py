"""Names runs for readers: an arm of a sweep by its overrides, since its folder's name is a hash.

The sweep's `sweep.json`, two folders above an arm's run directory, says what each arm overrides.
"""

import collections
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from moejax.inspection.runs.paths import RunPathError, open_file

SWEEP, ARMS = "sweep.json", "arms"
MAX_SWEEP = 2**30  # bytes: an arm has about 4,000
SEED = "train.seed"
MAX_TEXT = 40  # of a value's characters


def arm_names(sweep: Path) -> dict[str, str]:
    """Names arms by the overrides in which they differ: `routing_sweep: top_k 2, seed 1`.

    Args:
      sweep: the sweep's directory.

    Returns:
      Names by arm id, empty if there is no `sweep.json` that can be read; arms that no override
      sets apart are named by their ids.
    """
    overrides = _read_overrides(sweep)
    keys = _differing_keys(overrides)
    names = {arm: _in_words(values, keys) for arm, values in overrides.items()}
    given = collections.Counter(names.values())
    prefix = sweep.resolve().name
    found = {}
    for arm, name in names.items():
        parts = [name, arm]
        if not name:
            parts = [arm]
        elif given[name] == 1:
            parts = [name]
        found[arm] = f"{prefix}: {', '.join(parts)}"
    return found


def _read_overrides(sweep: Path) -> dict[str, dict[str, Any]]:
    """Returns the overrides of each arm by its id; nothing if they cannot be read."""
    try:
        with open_file(sweep, SWEEP) as file:
            content = file.read(MAX_SWEEP)
        found = {}
        for entry in json.loads(content)["arms"]:
            arm = str(entry["id"])
            found[arm] = dict(entry["overrides"])
        return found
    except (OSError, RunPathError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # the sweep's own page says what is wrong with the file


def _differing_keys(overrides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the keys whose values are not the same in all arms; a missing value is one, too."""
    arms = overrides.values()
    keys: dict[str, None] = {}  # a set that keeps the order
    for values in arms:
        keys |= dict.fromkeys(values)
    differing = []
    for key in keys:
        texts = {_text(values.get(key)) for values in arms}
        if len(texts) > 1:
            differing.append(key)
    return differing


def arm_name(workdir: Path) -> str:
    """Returns the name of a run that is an arm of a sweep; empty if it is none."""
    workdir = workdir.resolve()
    arms = workdir.parent
    if arms.name != ARMS:
        return ""
    names = arm_names(arms.parent)
    return names.get(workdir.name, "")


class ArmNames:
    """The names of arms, read again only where `sweep.json` has changed."""

    def __init__(self) -> None:
        self._names: dict[Path, dict[str, str]] = {}
        self._seen: dict[Path, tuple[int, ...]] = {}  # the files that these names are of

    def name_of(self, workdir: Path, otherwise: str) -> str:
        """Returns the name of a run that is an arm of a sweep, or `otherwise` for other runs."""
        arms = workdir.parent
        if arms.name != ARMS:
            return otherwise
        sweep = arms.parent
        try:
            info = os.stat(sweep / SWEEP)
        except OSError:
            return otherwise
        now = (info.st_ino, info.st_size, info.st_mtime_ns)
        if self._seen.get(sweep) != now:
            self._names[sweep] = arm_names(sweep)
            self._seen[sweep] = now
        return self._names[sweep].get(workdir.name, otherwise)


def recipe_name(command: str) -> str:
    """Returns the recipe of a command line: `debug` for `--config=configs/debug.py`.

    Empty if it names none.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    for word, next_word in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--config="):
            return _recipe_of_path(word.removeprefix("--config="))
        if word == "--config":
            return _recipe_of_path(next_word)
    return ""


def _recipe_of_path(value: str) -> str:
    """Returns the name of a recipe's file; arguments of the recipe follow after a colon."""
    path, _, _ = value.partition(":")
    return PurePath(path).stem


def _in_words(overrides: Mapping[str, Any], keys: list[str]) -> str:
    """Returns the overrides under some keys in words, the seed last."""
    leaves = [_leaf(key) for key in keys]
    ordered = [key for key in keys if key != SEED]
    if SEED in keys:
        ordered.append(SEED)
    words = []
    for key in ordered:
        if key in overrides:
            leaf = _leaf(key)
            name = leaf if leaves.count(leaf) == 1 else key
            value = _text(overrides[key])
            words.append(f"{name} {value}")
    return ", ".join(words)


def _leaf(key: str) -> str:
    _, _, leaf = key.rpartition(".")
    return leaf


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
