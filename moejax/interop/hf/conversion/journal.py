"""What an interrupted conversion has done, so that it goes on where it stopped.

The first line says what is converted; each further one a piece that is on disk, with a note. A line
that was not written completely, and all after it, count as absent.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.paths import replace_file

FILE = "journal.jsonl"


class Journal:
    """The pieces that are done.

    Args:
      folder: of the conversion; a journal of another one is written over.
      source: what is converted and how, as JSON: a conversion of something else begins again.

    Attributes:
      done: what was noted of each piece, by its number.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]):
        path = folder / FILE
        lines = _read_lines(path)
        is_continued = bool(lines) and lines[0] == source
        self.done: dict[int, Any] = {}
        for line in lines[1:] if is_continued else ():
            if not _is_note(line):
                break
            self.done[line["piece"]] = line["note"]
        notes = [_note(number, note) for number, note in self.done.items()]
        replace_file(path, b"".join(map(_line, [source, *notes])))
        self._file = path.open("ab")

    def add(self, done: Iterable[tuple[int, Any]]) -> None:
        """Notes pieces that are on disk by now."""
        for number, note in done:
            self.done[number] = note
            self._file.write(_line(_note(number, note)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _note(number: int, note: Any) -> dict[str, Any]:
    return {"piece": number, "note": note}


def _line(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _is_note(line: Any) -> bool:
    return isinstance(line, dict) and type(line.get("piece")) is int and "note" in line


def _read_lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):  # the end of a journal that was being written
            break
    return lines
