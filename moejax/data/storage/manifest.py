"""`manifest.json` of a prepared folder: what is in it, with a digest of itself, so that damage to it is found."""

import hashlib
import json
from pathlib import Path
from typing import Any

from moejax.data.storage.regular_files import read_regular, regular_size

NAME = "manifest.json"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest, after everything else in `folder`."""
    (folder / NAME).write_text(
        json.dumps(content | {"sha256": _digest(content)}, indent=2) + "\n", encoding="utf-8"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of the manifest.

    One without a digest is of an older version of moejax and is taken as it is.

    Raises:
      ValueError: it is missing or damaged; the message says what is wrong.
    """
    path = folder / NAME
    try:
        content = json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is missing or corrupt ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is corrupt: it holds no object")
    if content.pop("sha256", None) not in (None, _digest(content)):
        raise ValueError(f"{path} is corrupt: its content is not that of its digest")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(read_regular(path)).hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by its path from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Raises `ValueError` unless each file is an ordinary file of its size, below `folder`."""
    for name, size in sizes.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder / NAME} is corrupt: {name!r} is no file of the folder")
        found = regular_size(path)
        if found is None:
            raise ValueError(f"{path} is missing, or is no ordinary file")
        if found != size:
            raise ValueError(f"{path} has {found} bytes instead of {size}")
