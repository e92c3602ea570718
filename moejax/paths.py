"""Paths as users write them: resolved once, where they enter; refused there if they cannot work.

After that a path is absolute, without `~`, links and `..`: libraries differ in how they read those.
"""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""A URL, also one of whose slashes `Path` has left one; a letter and a colon are a drive."""


class PathError(ValueError):
    """A path that cannot work: the message names it, the reason and the remedy."""


def resolve_path(given: str | os.PathLike[str], name: str = "") -> Path:
    """Returns the absolute path that a user means; nothing needs to be there.

    Args:
      given: as written; `~` stands for the home folder.
      name: what it was given as, such as `--workdir`, for errors.

    Raises:
      PathError: it is a URL, or no path on this machine can have that name.
    """
    text = os.fspath(given)
    shown = f"{name}={text}" if name else text
    if SCHEME.match(text):
        raise PathError(
            f"{shown} is a URL, and buckets are not supported yet; "
            "name a folder of a mounted file system"
        )
    try:
        path = Path(text).expanduser().resolve()
    # A null byte, a home that is unknown, or links in a circle.
    except (ValueError, RuntimeError, OSError) as error:
        raise PathError(f"{shown} cannot be a path ({error}); name another") from error
    _check_encoding(path, shown)
    return path


def _check_encoding(path: Path, shown: str) -> None:
    """Raises `PathError` unless the name has the same bytes in the locale's encoding and in UTF-8.

    Array libraries always write file names in UTF-8, Python in the encoding of the locale.
    """
    try:
        is_same = os.fsencode(path) == str(path).encode("utf-8")
    except UnicodeEncodeError:
        is_same = False
    if not is_same:
        raise PathError(
            f"{shown}: the name of the folder, {path}, is not UTF-8 here; "
            "use a folder with a plain name, or a locale with UTF-8, such as LC_ALL=C.UTF-8"
        )


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file in one rename: a reader finds all of it, or the file as it was before.

    For files that only one process at a time writes; what a killed process left is overwritten.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def replace_shared_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file that several processes may write at once, in one rename.

    Each writes a temporary file of its own, so that no file mixes what two have written.

    Args:
      path: of the file, in a folder that exists.
      write: writes the content into the open file that it gets.
    """
    with tempfile.NamedTemporaryFile(
        "wb", dir=path.parent, suffix=".partial", delete=False
    ) as file:
        try:
            write(file)
            file.close()
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def sync_path(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_number(name: str) -> bool:
    """Whether a file is named by a number, such as a step, in digits that Python writes.

    `²` is a digit, too, but no number that Python reads.
    """
    return name.isascii() and name.isdigit()


def check_writable(folder: Path, name: str) -> None:
    """Raises `PathError` unless files can be made in `folder`; leaves nothing there.

    If the folder does not exist, the nearest folder above it is checked.

    Args:
      folder: a resolved path.
      name: what it was given as, for errors.
    """
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise PathError(
            f"{name}={folder} cannot be written: {existing} is not a folder; name another"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PathError(
            f"{name}={folder} cannot be written: {existing}: {error.strerror}; name another folder"
        ) from error


def check_run_folder(folder: Path, name: str) -> None:
    """Raises `PathError` unless runs can be kept in `folder`, or in folders below it.

    Orbax 0.12 finds the parts of a checkpoint by a pattern that begins with the folder's own path:
    in a folder such as `p[1]` it finds none, and what it saves cannot be read.

    Args:
      folder: a resolved path.
      name: what it was given as, for errors.
    """
    if found := re.search(r"[*?[]", str(folder)):
        raise PathError(
            f"{name}={folder} has {found[0]} in it, "
            "which is read as a pattern where checkpoints are saved; "
            "use a folder whose path has none of *, ? and ["
        )
    check_writable(folder, name)


def check_writable_file(file: Path, name: str) -> None:
    """Raises `PathError` unless `file` can be written, in a folder that exists.

    Leaves nothing there.

    Args:
      file: a resolved path.
      name: what it was given as, for errors.
    """
    if not file.parent.is_dir():
        raise PathError(
            f"{name}={file} cannot be written: {file.parent} is not a folder; make it first"
        )
    if file.exists() and not file.is_file():  # a device would be replaced
        raise PathError(f"{name}={file} must be a file, and is something else; name another")
    if file.exists() and not os.access(file, os.W_OK):
        raise PathError(f"{name}={file} cannot be written: the file is read-only; name another")
    check_writable(file.parent, name)
