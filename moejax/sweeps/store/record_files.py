"""The joint files of a sweep's rows: a JSON object a line, and the same as Parquet.

A column of Parquet has one type. Integers stay integers, a mix of integers and floats becomes
floats, and a column of other mixed kinds (an axis with 0.01 and "auto") is JSON text; the
file's metadata names those columns, so that reading gives the values back. Both files are
replaced in one rename.

A sweep's directory may be another's: nothing in it is executed, no link is followed out of it, and
what is no ordinary file is not opened.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moejax.paths import replace_shared_file
from moejax.strict_json import to_json

JSON_COLUMNS = b"moejax.json_columns"
REMEDY = "remove it and run the sweep again: it joins the rows anew"
MAX_INTEGER = 2**63
FOLDERS = ("arms", "claims", "logs", "slurm")
"""Of a sweep's directory, into which something is written."""


class RecordError(ValueError):
    """Records of a sweep that cannot be made or read: the message names the file and the remedy."""


def check_inside(directory: Path, *paths: Path) -> None:
    """Raises `RecordError` if one of these paths, or of the folders of a sweep, is a link that leads out of it."""
    home = directory.resolve()
    for path in (*(directory / name for name in FOLDERS), *paths):
        if not path.resolve().is_relative_to(home):
            raise RecordError(
                f"{path} is a link out of {directory}, which is not followed; put what it names in its place"
            )


def read_text(path: Path) -> str:
    """The text of an ordinary file in UTF-8, which is no link out of its folder.

    Raises:
      FileNotFoundError: there is none.
      RecordError: it is something else, or a link.
      OSError: it cannot be read.
      UnicodeDecodeError: it is no text.
    """
    check_inside(path.parent, path)
    file = os.open(
        path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    )  # a named pipe must not make us wait
    with os.fdopen(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise RecordError(f"{path} is no ordinary file; remove it")
        return opened.read().decode()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a row a line, in one rename."""
    text = "".join(to_json(row) + "\n" for row in rows)
    _replace(path, lambda file: file.write(text.encode()))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of `write_jsonl`.

    Raises:
      RecordError: a line is damaged.
    """
    rows = []
    try:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line:
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            rows.append(row)
    except RecordError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged ({error}); {REMEDY}") from error
    return rows


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the union of the rows' columns, in one rename; a row has null where it has no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = dict.fromkeys(name for row in rows for name in row)
    columns, as_json = {}, []
    for name in names or ["arm", "status"]:
        values = [row.get(name) for row in rows]
        kind = _kind(values)
        if kind == "json":
            as_json.append(name)
            values = [None if value is None else json.dumps(value) for value in values]
        elif kind == "float64":
            values = [None if value is None else float(value) for value in values]
        columns[name] = pa.array(
            values, {"json": pa.string(), "null": pa.null()}.get(kind) or pa.type_for_alias(kind)
        )
    table = pa.table(columns).replace_schema_metadata({JSON_COLUMNS: json.dumps(as_json).encode()})
    _replace(path, lambda file: pq.write_table(table, file))


def _kind(values: Iterable[Any]) -> str:
    """The type of a column: Arrow's name of it, "null" if nothing is known, or "json"."""
    known = [value for value in values if value is not None]
    kinds = {type(value) for value in known}
    if not kinds:
        return "null"
    if kinds == {int} and all(-MAX_INTEGER <= value < MAX_INTEGER for value in known):
        return "int64"
    if kinds <= {int, float}:
        return "float64"
    return {frozenset({bool}): "bool", frozenset({str}): "string"}.get(frozenset(kinds), "json")


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of `write_parquet`; None where a row had no such column.

    Raises:
      RecordError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_inside(path.parent, path)
    if not path.is_file():
        raise RecordError(f"{path} is no ordinary file; remove it")
    try:
        table = pq.ParquetFile(path).read()
        as_json = json.loads((table.schema.metadata or {}).get(JSON_COLUMNS, b"[]"))
        rows = table.to_pylist()
        for row in rows:
            row |= {name: json.loads(row[name]) for name in as_json if row[name] is not None}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RecordError(f"{path} is damaged ({reason}); {REMEDY}") from error
    return rows


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file of a name of its own beside `path` and renames it: two writers do not mix their halves."""
    if path.is_dir():
        raise RecordError(f"{path} is a folder; remove it")
    replace_shared_file(path, write)
