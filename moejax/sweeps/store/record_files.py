"""The joint files of a sweep's rows: a JSON object a line, and the same as Parquet.

A column of Parquet has one type. Integers stay integers, a mix of integers and floats becomes
floats, and a column of other mixed kinds (an axis with 0.01 and "auto") is JSON text. The file's
metadata names those columns, so that reading gives the values back. Both files are replaced in one
rename.

A sweep's directory may come from someone else: nothing in it is executed, no link is followed out
of it, and only ordinary files are opened.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from moejax.paths import replace_shared_file
from moejax.strict_json import to_json

JSON_COLUMNS = b"moejax.json_columns"
REMEDY = "remove it and run the sweep again: it joins the rows again"
MAX_INTEGER = 2**63
FOLDERS = ("arms", "claims", "logs", "slurm")
"""The folders of a sweep's directory in which files are written."""


class RecordError(ValueError):
    """Records of a sweep that cannot be made or read; the message names the file and the remedy."""


def check_inside(directory: Path, *paths: Path) -> None:
    """Raises `RecordError` if a path is a link that leads out of a sweep's directory.

    Args:
      directory: of the sweep; its folders are checked, too.
      paths: to check.
    """
    home = directory.resolve()
    for path in (*(directory / name for name in FOLDERS), *paths):
        if not path.resolve().is_relative_to(home):
            raise RecordError(
                f"{path} is a link out of {directory}, which is not followed; "
                "put what it names in its place"
            )


def read_text(path: Path) -> str:
    """Returns the text of an ordinary file in UTF-8 that is no link out of its folder.

    Raises:
      FileNotFoundError: there is none.
      RecordError: it is something else, or a link.
      OSError: it cannot be read.
      UnicodeDecodeError: it is no text.
    """
    check_inside(path.parent, path)
    # O_NONBLOCK: opening a named pipe must not wait for its other end.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise RecordError(f"{path} is no ordinary file; remove it")
        return opened.read().decode()


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one row a line, in one rename."""
    text = "".join(to_json(row) + "\n" for row in rows)
    _replace(path, lambda file: file.write(text.encode()))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file that `write_jsonl` wrote.

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
    """Writes the union of the rows' columns, in one rename.

    A row has null where it has no such column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: dict[str, None] = {}  # a set in order
    for row in rows:
        names |= dict.fromkeys(row)
    columns, json_columns = {}, []
    for name in names or ["arm", "status"]:
        values = [row.get(name) for row in rows]
        kind = _column_kind(values)
        if kind == "json":
            json_columns.append(name)
            columns[name] = pa.array(_convert_known(values, json.dumps), pa.string())
        elif kind == "float64":
            columns[name] = pa.array(_convert_known(values, float), pa.float64())
        else:
            columns[name] = pa.array(values, pa.null() if kind == "null" else kind)
    metadata = {JSON_COLUMNS: json.dumps(json_columns).encode()}
    table = pa.table(columns).replace_schema_metadata(metadata)
    _replace(path, lambda file: pq.write_table(table, file))


def _column_kind(values: Sequence[Any]) -> str:
    """Returns Arrow's name of a column's type, "null" if all values are None, or "json"."""
    known = [value for value in values if value is not None]
    types = {type(value) for value in known}
    if not types:
        return "null"
    if types == {int} and all(-MAX_INTEGER <= value < MAX_INTEGER for value in known):
        return "int64"
    if types <= {int, float}:
        return "float64"
    if types == {bool}:
        return "bool"
    return "string" if types == {str} else "json"


def _convert_known(values: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
    return [None if value is None else convert(value) for value in values]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file that `write_parquet` wrote; None where a row had no such column.

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
        metadata = table.schema.metadata or {}
        json_columns = json.loads(metadata.get(JSON_COLUMNS, b"[]"))
        rows = table.to_pylist()
        for row in rows:
            row |= {name: json.loads(row[name]) for name in json_columns if row[name] is not None}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RecordError(f"{path} is damaged ({reason}); {REMEDY}") from error
    return rows


def _replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replaces a joint file, see `replace_shared_file`; raises `RecordError` if it is a folder."""
    if path.is_dir():
        raise RecordError(f"{path} is a folder; remove it")
    replace_shared_file(path, write)
