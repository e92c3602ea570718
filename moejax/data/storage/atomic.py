"""Folders that appear complete or not at all, each written by one process while others wait for it."""

import contextlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from moejax.data.errors import DataError
from moejax.locks import FolderLock, LockedError

INCOMPLETE = ".incomplete-"

_held: set[Path] = set()
"""Locks of this process, which must not wait for itself: a second preparation in it works on, with an equal result."""
_held_guard = threading.Lock()


def complete_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder unless it is there; if another process is at it, waits for that one and says so.

    Args:
      folder: below a folder of its kind in `data.directory`; equal names hold equal contents.
      write: fills an empty folder, which then takes the name.

    Raises:
      DataError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder.parent} cannot be made ({error.strerror}); choose another data.directory"
        ) from error
    with _lock(folder, waits=True) as is_alone:
        if folder.exists():
            return
        if is_alone:
            _remove_leftovers(folder)
        _write(folder, write)


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f"{folder.name}{INCOMPLETE}{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir()
    except OSError as error:
        raise DataError(
            f"{temporary} cannot be made ({error.strerror}); choose another data.directory"
        ) from error
    try:
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # equal names hold equal contents: the first is kept
                raise
    except OSError as error:
        reason = error.strerror or next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise DataError(
            f"{folder} cannot be written ({reason}); free space there, or choose another data.directory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path, *, waits: bool) -> Iterator[bool]:
    """Locks the name of a folder; whether this was the only one to prepare it in this process."""
    path = folder.parents[1] / "locks" / f"{folder.parent.name}-{folder.name}"
    with _held_guard:
        is_alone = path not in _held
        _held.add(path)
    if not is_alone:
        yield False
        return
    try:
        with FolderLock(path, f"prepare {folder.name}", waits=waits):
            yield True
    finally:
        with _held_guard:
            _held.discard(path)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed preparations have left beside `folder`, whose own lock is held."""
    for leftover in folder.parent.iterdir():
        name, mark, _ = leftover.name.partition(INCOMPLETE)
        if not mark:
            continue
        if name == folder.name:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        with (
            contextlib.suppress(LockedError),
            _lock(folder.with_name(name), waits=False) as is_alone,
        ):
            if is_alone:
                shutil.rmtree(leftover, ignore_errors=True)
