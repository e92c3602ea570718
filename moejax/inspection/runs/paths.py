"""Opens files of a run directory that anyone may have made: only regular files inside of it.

A named pipe, a device or a link to a file elsewhere may stand where a run has its file. Opening a
pipe waits for ever, a device may never end, and a link would show what the run does not own.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moejax.data.storage.regular_files import open_regular


class RunPathError(ValueError):
    """A file of a run directory is not read: the message names it, why, and the remedy."""


def check_file(workdir: Path, name: str) -> None:
    """Checks that a file of a run may be read, without opening it.

    Args:
      workdir: the run directory.
      name: of a file in it.

    Raises:
      RunPathError: it is a link that leads out of the run directory, or no regular file.
      OSError: it does not exist, or its folder cannot be read.
    """
    path = workdir / name
    if leads_out(path, workdir):
        raise RunPathError(
            f"{path} is a link that leads out of the run directory; replace it by the file"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise RunPathError(f"{path} is no regular file; remove it")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path, once its links are followed, is outside of a folder."""
    return not path.resolve().is_relative_to(folder.resolve())


def open_file(workdir: Path, name: str) -> BinaryIO:
    """Opens a file of a run for reading; raises as `check_file` does."""
    check_file(workdir, name)
    return os.fdopen(open_regular((workdir / name).resolve()), "rb")


def check_folder(workdir: Path, name: str) -> None:
    """Checks that a folder of a run holds only folders and regular files.

    A folder that does not exist passes.

    Raises:
      RunPathError: it holds a link or something that is neither, or is one itself.
    """
    folder = workdir / name
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise RunPathError(f"{folder} is no folder of the run; remove it")
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            check_folder(folder, entry.name)
        elif not entry.is_file(follow_symlinks=False):
            raise RunPathError(f"{entry.path} is no regular file; remove it")
