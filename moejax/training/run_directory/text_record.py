"""What `config.json` records of where a run's text is, so that it is found from other folders."""

import glob
import os
from collections.abc import Mapping
from typing import Any

from moejax.config import DataConfig
from moejax.training.run_directory.signature import sign


def record_text(data: DataConfig, corpus: str) -> dict[str, str]:
    """What `config.json` records of a run's text: its places as absolute paths, signed with the name of the rows."""
    places = {
        "directory": os.path.abspath(os.path.expanduser(data.directory)),
        "files": _absolute_files(data.files),
        "source_dir": os.path.abspath(os.path.expanduser(data.source_dir))
        if data.source_dir
        else "",
    }
    return {**places, "signature": sign(signed_text(data, places, corpus))}


def signed_text(data: DataConfig, places: Mapping[str, Any], corpus: str) -> list[Any]:
    """What the signature covers: all that decides which files are read and written."""
    return [
        data.source,
        data.name,
        data.text_field,
        places["directory"],
        places["files"],
        places["source_dir"],
        corpus,
    ]


def _absolute_files(files: str) -> str:
    if not files or os.path.exists(os.path.expanduser(files)):
        return os.path.abspath(os.path.expanduser(files)) if files else ""
    return ",".join(_absolute_item(item.strip()) for item in files.split(",") if item.strip())


def _absolute_item(item: str) -> str:
    item = os.path.expanduser(item)
    if os.path.isabs(item) or os.path.exists(item):
        return os.path.abspath(item)
    return os.path.join(glob.escape(os.getcwd()), item)  # a glob, below a folder whose name is none
