"""`manifest.json` of a prepared folder: what is in it, with a digest that reveals damage."""

import hashlib
import json
from pathlib import Path
from typing import Any

from moejax.data.storage.regular_files import read_regular, regular_size

NAME = "manifest.json"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Writes the manifest, after everything else in `folder`."""
    signed = content | {"sha256": _digest(content)}
    text = json.dumps(signed, indent=2) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the content of the manifest.

    A manifest without a digest was written by an older version of moejax, and is accepted.

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
    recorded = content.pop("sha256", None)
    if recorded not in (None, _digest(content)):
        raise ValueError(f"{path} is corrupt: its content does not match its digest")
    return content


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(read_regular(path)).hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each file below a folder, by its path from there."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            sizes[name] = path.stat().st_size
    return sizes


def check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Raises `ValueError` unless each file is an ordinary file of its size, below `folder`."""
    for name, size in sizes.items():
        relative = Path(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{folder / NAME} is corrupt: {name!r} is no file of the folder")
        path = folder / relative
        found = regular_size(path)
        if found is None:
            raise ValueError(f"{path} is missing, or is no ordinary file")
        if found != size:
            raise ValueError(f"{path} has {found} bytes instead of {size}")
