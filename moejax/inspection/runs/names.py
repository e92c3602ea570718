"""What a run is called: the arm of a sweep by what sets it apart, since its folder has a hash for a name.

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
    """Arms by id, named by the overrides in which they differ: `routing_sweep: top_k 2, seed 1`.

    Args:
      sweep: the sweep's directory.

    Returns:
      Nothing if there is no `sweep.json` that can be read; arms that no override sets apart are
      named by their ids.
    """
    try:
        with open_file(sweep, SWEEP) as file:
            entries = json.loads(file.read(MAX_SWEEP))["arms"]
        overrides = {str(entry["id"]): dict(entry["overrides"]) for entry in entries}
    except (OSError, RunPathError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # the sweep's own page says what is wrong with the file
    keys = dict.fromkeys(key for values in overrides.values() for key in values)
    differing = [
        key for key in keys if len({_text(values.get(key)) for values in overrides.values()}) > 1
    ]
    names = {arm: _in_words(values, differing) for arm, values in overrides.items()}
    given = collections.Counter(names.values())
    prefix = sweep.resolve().name
    return {
        arm: f"{prefix}: {name}"
        if name and given[name] == 1
        else f"{prefix}: {', '.join(filter(None, [name, arm]))}"
        for arm, name in names.items()
    }


def arm_name(workdir: Path) -> str:
    """The name of a run that is an arm of a sweep; empty if it is none."""
    workdir = workdir.resolve()
    if workdir.parent.name != ARMS:
        return ""
    return arm_names(workdir.parent.parent).get(workdir.name, "")


class ArmNames:
    """The names of arms, read again only where `sweep.json` has changed."""

    def __init__(self) -> None:
        self._names: dict[Path, tuple[tuple[int, ...], dict[str, str]]] = {}

    def name_of(self, workdir: Path, otherwise: str) -> str:
        """The name of a run that is an arm of a sweep, or what it is called otherwise."""
        if workdir.parent.name != ARMS:
            return otherwise
        sweep = workdir.parent.parent
        try:
            info = os.stat(sweep / SWEEP)
        except OSError:
            return otherwise
        now = (info.st_ino, info.st_size, info.st_mtime_ns)
        if self._names.get(sweep, ((), {}))[0] != now:
            self._names[sweep] = (now, arm_names(sweep))
        return self._names[sweep][1].get(workdir.name, otherwise)


def recipe_name(command: str) -> str:
    """The recipe of a command line: `debug` for `--config=configs/debug.py`; empty if it names none."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--config="):
            return PurePath(word.removeprefix("--config=").partition(":")[0]).stem
        if word == "--config":
            return PurePath(after.partition(":")[0]).stem
    return ""


def _in_words(overrides: Mapping[str, Any], keys: list[str]) -> str:
    """The overrides under some keys, the seed last."""
    ordered = [key for key in keys if key != SEED] + [key for key in keys if key == SEED]
    leaves = [key.rpartition(".")[2] for key in keys]
    names = {
        key: leaf if leaves.count(leaf) == 1 else key
        for key, leaf in zip(keys, leaves, strict=True)
    }
    return ", ".join(f"{names[key]} {_text(overrides[key])}" for key in ordered if key in overrides)


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
