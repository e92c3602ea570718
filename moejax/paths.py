"""Paths as users write them: resolved once, where they enter, and refused there if they cannot work.

Behind that door a path is absolute, without `~`, links and `..`: libraries differ in what they
make of those.
"""

import os
import re
import tempfile
from pathlib import Path

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
            f"{shown} is a URL, and buckets are not supported yet; name a folder of a mounted file system"
        )
    try:
        path = Path(text).expanduser().resolve()
    except (
        ValueError,
        RuntimeError,
        OSError,
    ) as error:  # a null byte, a home that is unknown, links in a circle
        raise PathError(f"{shown} cannot be a path ({error}); name another") from error
    _check_encoding(path, shown)
    return path


def _check_encoding(path: Path, shown: str) -> None:
    """Array libraries write file names in UTF-8 always, Python in the encoding of the locale: they must agree."""
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
    """Writes a file in one rename: it is there whole, or as it was."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def is_number(name: str) -> bool:
    """Whether a file is named by a number, such as a step, in the digits that Python writes: `²` is none."""
    return name.isascii() and name.isdigit()


def check_writable(folder: Path, name: str) -> None:
    """Raises `PathError` unless files can be made in `folder`, or in the nearest folder above it; leaves nothing there.

    Args:
      folder: a resolved path.
      name: what it was given as, for errors.
    """
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise PathError(f"{name}={folder} cannot be written: {there} is not a folder; name another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PathError(
            f"{name}={folder} cannot be written: {there}: {error.strerror}; name another folder"
        ) from error


def check_run_folder(folder: Path, name: str) -> None:
    """Raises `PathError` unless runs can be kept in `folder`, or in folders below it; arguments as of `check_writable`.

    Orbax 0.12 finds the parts of a checkpoint by a pattern that begins with the folder's own path:
    in a folder such as `p[1]` it finds none, and what it saves cannot be read.
    """
    if found := re.search(r"[*?[]", str(folder)):
        raise PathError(
            f"{name}={folder} has {found[0]} in it, which is read as a pattern where checkpoints are saved; "
            "use a folder whose path has none of *, ? and ["
        )
    check_writable(folder, name)


def check_writable_file(file: Path, name: str) -> None:
    """Raises `PathError` unless `file` can be written, in a folder that exists; leaves nothing there.

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
