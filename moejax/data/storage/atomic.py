"""Folders that appear complete or not at all: one process writes each while others wait."""

import contextlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from moejax.data.errors import DataError, os_reason
from moejax.locks import FolderLock, LockedError

INCOMPLETE = ".incomplete-"

_held: set[Path] = set()
"""Locks of this process, which must not wait for itself.

A second preparation in the same process goes on without the lock, and has an equal result.
"""
_held_guard = threading.Lock()


def complete_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes a folder unless it exists.

    If another process is making it, this one says so and waits.

    Args:
      folder: below a folder of its kind in `data.directory`; equal names hold equal contents.
      write: fills an empty folder, which then takes the name.

    Raises:
      DataError: the folder cannot be written.
    """
    _make_folder(folder.parent)
    with _lock(folder, waits=True) as is_alone:
        if folder.exists():
            return
        if is_alone:
            _remove_leftovers(folder)
        _write(folder, write)


def _make_folder(folder: Path, *, is_new: bool = False) -> None:
    try:
        folder.mkdir(parents=not is_new, exist_ok=not is_new)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be made ({error.strerror}); choose another data.directory"
        ) from error


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder under a temporary name, and renames it once it is complete."""
    mark = uuid.uuid4().hex[:8]
    temporary = folder.with_name(f"{folder.name}{INCOMPLETE}{mark}")
    _make_folder(temporary, is_new=True)
    try:
        write(temporary)
        _rename(temporary, folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({os_reason(error)}); free space there, or choose "
            "another data.directory"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    """Renames a folder, unless another preparation was faster: equal names hold equal contents."""
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise


@contextlib.contextmanager
def _lock(folder: Path, *, waits: bool) -> Iterator[bool]:
    """Locks the name of a folder.

    Yields:
      Whether this is the only preparation of the folder in this process.
    """
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
    """Removes what killed preparations have left next to `folder`, whose lock is held."""
    for leftover in folder.parent.iterdir():
        name, mark, _ = leftover.name.partition(INCOMPLETE)
        if not mark:
            continue
        if name == folder.name:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        # A leftover of another folder is removed only if no process is at work on that one.
        other = folder.with_name(name)
        with contextlib.suppress(LockedError), _lock(other, waits=False) as is_alone:
            if is_alone:
                shutil.rmtree(leftover, ignore_errors=True)
