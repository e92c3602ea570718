"""Reads a run directory: its configuration, its metrics, and which steps are saved.

Before that, `check_run_tree` makes sure that it consists of folders and ordinary files only: a link
would lead out of it, and reading a pipe would wait. What to do about a file that is missing or
damaged is for the caller to say. Nothing here imports jax, so that a run opens at once.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.paths import is_number
from moejax.training.run_directory.line_file import Line, read_lines

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"


class LineError(ValueError):
    """A damaged line: the message is its number, from 1, and what is wrong with it."""


class RunDirectory:
    """The files of a run, read on demand.

    Args:
      workdir: the run directory; it may lack any file.

    Attributes:
      config: path of `config.json`.
      metrics: path of `metrics.jsonl`.
    """

    def __init__(self, workdir: Path):
        self.config = workdir / CONFIG_FILE
        self.metrics = workdir / METRICS_FILE
        self._checkpoints = workdir / "checkpoints"

    def read_facts(self) -> Any:
        """Reads `config.json`: any JSON value.

        Raises:
          OSError: it is missing, or cannot be read.
          ValueError, RecursionError: it is not a JSON document.
        """
        return json.loads(self.config.read_bytes().decode())

    def metric_lines(self) -> Iterator[Line]:
        """Yields the lines of `metrics.jsonl`, damaged ones too; see `read_lines`.

        Raises:
          OSError: the file is missing, or cannot be read.
        """
        with self.metrics.open("rb") as file:
            yield from read_lines(file)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Yields the objects of the lines of `metrics.jsonl`.

        Raises:
          OSError: the file is missing, or cannot be read.
          LineError: a line is damaged.
        """
        for line in self.metric_lines():
            if line.values is None:
                raise LineError(f"line {line.number} is damaged ({line.fault})")
            yield line.values

    def saved_steps(self) -> list[int]:
        """Returns the steps that have an entry in `checkpoints`, increasing.

        Orbax gives a checkpoint its name once it is complete. An entry may be damaged, or not even
        a folder: restoring it reports that.
        """
        if not self._checkpoints.is_dir():
            return []
        return sorted(
            int(path.name) for path in self._checkpoints.iterdir() if is_number(path.name)
        )


class RunTreeError(ValueError):
    """A run directory with a link out of it, a named pipe or a device.

    The message names it and the remedy.
    """


def check_run_tree(workdir: str | Path) -> None:
    """Checks the kind of every file of a run directory, before any of them is opened.

    Libraries that read checkpoints and logs follow links and open whatever has the right name, so
    this comes first. The directory itself may be reached by links. A file that disappears meanwhile
    is skipped: the run may be training.

    Raises:
      RunTreeError: a symbolic link out of the directory, or something that is neither a file
        nor a folder.
    """
    root = os.path.realpath(workdir)
    folders = [root]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                folders += [entry.path for entry in entries if _is_folder(entry, root)]
        except FileNotFoundError:
            continue


def _is_folder(entry: os.DirEntry[str], root: str) -> bool:
    """Whether an entry is a folder; raises `RunTreeError` for what must not be there."""
    if entry.is_dir(follow_symlinks=False):
        return True
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if os.path.commonpath([root, target]) != root:
            raise RunTreeError(
                f"{entry.path!r} is a symbolic link out of the run directory, which is not "
                "followed; put what it means in its place, or remove it"
            )
    elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
        raise RunTreeError(f"{entry.path!r} is neither a file nor a folder; remove it")
    return False
