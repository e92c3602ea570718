"""The folder `converting`, in which a conversion writes before anything is in its place.

It has a journal from the beginning, and a file `complete` once all is written and only to be moved.
What was moved counts only with `config.json`, which comes last; then the folder is removed.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moejax.interop.hf.conversion.journal import FILE as JOURNAL
from moejax.interop.hf.errors import ConversionInterruptedError, HfError
from moejax.training.run_directory.layout import CONVERTING

COMPLETE = "complete"


def check_target(folder: Path, source: Path, name: str) -> None:
    """Raises `HfError` if a folder holds more than an interrupted conversion.

    Args:
      folder: a path at which nothing needs to be.
      source: what is converted, which must not be in what will be removed.
      name: the flag that gave `folder`.
    """
    if folder.exists() and not folder.is_dir():
        raise HfError(f"{name}={folder} is a file; name a new folder")
    staging = folder / CONVERTING
    if staging.resolve() in (source.resolve(), *source.resolve().parents):
        raise HfError(f"{name}={folder}: {source} is in its folder {CONVERTING}; move it elsewhere")
    if staging.exists() and not _is_ours(staging):
        raise HfError(f"{name}={folder} holds {CONVERTING}; name a new folder")
    found = {path.name for path in folder.glob("*") if not path.name.startswith(".")}
    others = sorted(found - {CONVERTING})
    if others and not is_complete(folder):
        raise HfError(f"{name}={folder} holds {others[0]}; name a new folder")


def _is_ours(staging: Path) -> bool:
    """Whether a folder is empty, or one of a conversion."""
    if not staging.is_dir():
        return False
    names = {path.name for path in staging.iterdir()}
    return not names or any(name.startswith(JOURNAL) for name in names)


def is_complete(folder: Path) -> bool:
    """Whether everything was written, and is to be moved to its place."""
    return (folder / CONVERTING / COMPLETE).exists()


def mark_complete(folder: Path) -> None:
    """Notes that everything was written, once it is on disk."""
    os.sync()
    (folder / CONVERTING / COMPLETE).touch()
    os.sync()


def move_all(folder: Path, names: Iterable[str]) -> None:
    """Moves files and folders to their place, those that were not moved yet.

    Raises:
      ConversionInterruptedError: one is in neither place.
    """
    for name in names:
        staged = folder / CONVERTING / name
        if staged.exists():
            os.replace(staged, folder / name)
        elif not (folder / name).exists():
            raise ConversionInterruptedError(
                f"{folder}: {name} was written by the conversion and is gone; remove the folder, "
                "and convert again"
            )


def remove_staging(folder: Path) -> None:
    """Removes the folder of a conversion; a kill meanwhile leaves a hidden folder."""
    hidden = folder / f".{CONVERTING}"
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder / CONVERTING, hidden)
    shutil.rmtree(hidden)
