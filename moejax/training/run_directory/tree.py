"""Checks that a run directory consists of folders and ordinary files only.

A link would lead out of it, and reading a pipe would wait.
"""

import os
from pathlib import Path


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
                folders += [entry.path for entry in entries if _check(entry, root)]
        except FileNotFoundError:
            continue


def _check(entry: os.DirEntry[str], root: str) -> bool:
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
