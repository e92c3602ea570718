"""What an interrupted conversion has done, so that it goes on where it stopped.

The first line says what is converted; each further one a piece that is on disk, and what it
contributes to the digests of its arrays. A line that was not written completely counts as absent.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


class Journal:
    """The pieces that are done.

    Args:
      path: of the file; one of another conversion is written over.
      source: what is converted and how, as JSON: a conversion of something else begins again.

    Attributes:
      done: what was noted of each piece, by its number.
    """

    def __init__(self, path: Path, source: Mapping[str, Any]):
        self.done: dict[int, Any] = {}
        lines = _read_lines(path)
        is_continued = bool(lines) and lines[0] == source
        if is_continued:
            self.done = {line["piece"]: line["note"] for line in lines[1:]}
        self._file: BinaryIO = path.open("wb")
        self._write([source])
        self.add(self.done.items())

    def add(self, done: Iterable[tuple[int, Any]]) -> None:
        """Notes pieces that are on disk by now."""
        new = dict(done)
        self.done |= new
        self._write({"piece": number, "note": note} for number, note in new.items())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _read_lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:  # the end of a journal that was being written
            break
    return lines
