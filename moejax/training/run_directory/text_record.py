"""What `config.json` records of where a run's text is, so that it is found from other folders."""

import glob
import os
from collections.abc import Mapping
from typing import Any

from moejax.config import DataConfig
from moejax.training.run_directory.signature import sign


def record_text(data: DataConfig, corpus: str) -> dict[str, str]:
    """Returns what `config.json` records of a run's text.

    That is its places as absolute paths, and a signature of them and of the name of the rows.
    """
    places = {
        "directory": _absolute(data.directory),
        "files": _absolute_files(data.files),
        "source_dir": _absolute(data.source_dir) if data.source_dir else "",
    }
    return {**places, "signature": sign(signed_text(data, places, corpus))}


def signed_text(data: DataConfig, places: Mapping[str, Any], corpus: str) -> list[Any]:
    """Returns what the signature covers: all that decides which files are read and written."""
    return [
        data.source,
        data.name,
        data.text_field,
        places["directory"],
        places["files"],
        places["source_dir"],
        corpus,
    ]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_files(files: str) -> str:
    """Returns the documents of `data.files` as absolute paths: one path, or globs with commas."""
    if not files:
        return ""
    if os.path.exists(os.path.expanduser(files)):
        return _absolute(files)
    items = [item.strip() for item in files.split(",")]
    return ",".join(_absolute_glob(item) for item in items if item)


def _absolute_glob(item: str) -> str:
    item = os.path.expanduser(item)
    if os.path.isabs(item) or os.path.exists(item):
        return os.path.abspath(item)
    # The glob is relative to a folder whose own name may have the letters of a glob.
    return os.path.join(glob.escape(os.getcwd()), item)
