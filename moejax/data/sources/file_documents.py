"""The documents of a file, one after the other; an error names the file and the line.

A file of records (JSON lines, Parquet) is never in memory completely. Its documents have the names
and domains of the fields `name` and `domain`, like those of a prepared dataset.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moejax.config import nearest
from moejax.data.errors import DataError
from moejax.data.sources.document import Document
from moejax.data.sources.text_files import TextFile, unreadable

BATCH_ROWS = 128  # rows of Parquet that are read at a time
PARQUET_BYTES = 1 << 20  # bytes that are read at a time
MAX_SHOWN_FIELDS = 12
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LEAVE_OUT = "leave it out of data.files"


class Place(NamedTuple):
    """The place of a document, for errors and names: "line 3" of a file, "row 3" of a table."""

    file: TextFile
    word: str
    number: int

    def __str__(self) -> str:
        return f"{self.file.path}, {self.word} {self.number}"


def read_documents(file: TextFile, text_field: str) -> Iterator[Document]:
    """Yields all documents of a file in order, including empty ones.

    Args:
      file: from `find_text_files`.
      text_field: the field of a record that holds its text.

    Raises:
      DataError: the file or one of its documents cannot be read.
    """
    readers = {"text": _read_text, "lines": _read_lines, "parquet": _read_parquet}
    return readers[file.kind](file, text_field)


def _read_text(file: TextFile, text_field: str) -> Iterator[Document]:
    with file.open() as stream:
        try:
            raw = stream.read()
        except OSError as error:
            raise unreadable(file.path, error) from error
    try:
        yield Document(raw.decode("utf-8"), file.stem, file.domain)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file.path} is not UTF-8 text (byte {error.start}); convert it, or {LEAVE_OUT}; it "
            f"is in line {line}"
        ) from error


def _read_lines(file: TextFile, text_field: str) -> Iterator[Document]:
    offset = 0  # bytes before the content of the line, for errors
    for number, line in enumerate(_lines(file), start=1):
        content = line
        if number == 1:
            content = line.removeprefix(BYTE_ORDER_MARK)
            offset = len(line) - len(content)
        if content.strip():
            place = Place(file, "line", number)
            record = _parse(content, place, offset)
            yield _document(record, text_field, place)
        offset += len(content)


def _lines(file: TextFile) -> Iterator[bytes]:
    with file.open() as stream:
        try:
            yield from stream
        except OSError as error:
            raise unreadable(file.path, error) from error


def _parse(line: bytes, place: Place, offset: int) -> Mapping[str, Any]:
    """Returns the record of a line, which starts at byte `offset` of its file."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 text (byte {offset + error.start}); convert the file, or "
            f"{LEAVE_OUT}"
        ) from error
    except json.JSONDecodeError as error:
        raise _no_json(place, f"{error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise _no_json(place, str(error)) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{place}: a JSON {_kind(record)} and no object; write one object a line, or "
            f"{LEAVE_OUT}"
        )
    return record


def _no_json(place: Place, reason: str) -> DataError:
    return DataError(
        f"{place}: no JSON ({reason}); a line must be one complete object; repair the line, or "
        f"{LEAVE_OUT}"
    )


def _read_parquet(file: TextFile, text_field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    if file.compression:
        raise DataError(
            f"{file.path}: Parquet in a compressed file cannot be read; decompress the file"
        )
    number = 0
    try:
        # Pages are read as they are needed: a row group may be larger than the memory.
        with parquet.ParquetFile(file.path, buffer_size=PARQUET_BYTES, pre_buffer=False) as table:
            fields = table.schema_arrow.names
            if text_field not in fields:
                raise _no_field(str(file.path), text_field, fields, fields)
            columns = [name for name in (text_field, "name", "domain") if name in fields]
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, text_field, Place(file, "row", number))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.path}, after row {number}: not UTF-8 text; convert it, or {LEAVE_OUT}"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(file.path, error) from error


def _document(record: Mapping[str, Any], text_field: str, place: Place) -> Document:
    """Returns the document of a record."""
    if text_field not in record:
        fields = list(record)
        texts = [name for name, value in record.items() if isinstance(value, str)]
        raise _no_field(str(place), text_field, fields, texts or fields)
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: the field {text_field!r} holds {_kind(text)} and must be text; repair it, "
            "or set data.text_field to a field of text"
        )
    _check_characters(text, place)
    file = place.file
    name = _label(record, "name", place)
    domain = _label(record, "domain", place)
    return Document(text, name or f"{file.stem} {place.number}", domain or file.domain)


def _label(record: Mapping[str, Any], field: str, place: Place) -> str:
    """Returns a name or domain: text, or a number in digits; empty if the record has none."""
    value = record.get(field)
    if value is None:
        return ""
    if isinstance(value, bool | int | float | str):
        label = str(value)
        _check_characters(label, place)
        return label
    raise DataError(
        f"{place}: the field {field!r} holds {_kind(value)} and must be text or a number; repair it"
    )


def _check_characters(text: str, place: Place) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a pair of UTF-16
        code = ord(text[error.start])
        raise DataError(
            f"{place}: \\u{code:04x} alone is no character of text; repair the line, or {LEAVE_OUT}"
        ) from error


def _no_field(
    where: str,
    text_field: str,
    fields: Sequence[str],
    texts: Sequence[str],
) -> DataError:
    """Returns the error for a missing field of text.

    Args:
      where: the file, with the line if there is one.
      text_field: what is missing.
      fields: those that exist.
      texts: those of them that could be meant.
    """
    if not fields:
        return DataError(
            f"{where}: no field {text_field!r}, and no other; repair it, or {LEAVE_OUT}"
        )
    shown = ", ".join(fields[:MAX_SHOWN_FIELDS])
    if len(fields) > MAX_SHOWN_FIELDS:
        shown += ", ..."
    near = nearest(text_field, texts)
    return DataError(
        f"{where}: no field {text_field!r} but {shown}; the nearest is {near}: set "
        f"data.text_field={near}, or repair it"
    )


def _kind(value: Any) -> str:
    """Returns a JSON value's type in words."""
    if value is None:
        return "null"
    kinds = {
        dict: "object",
        list: "array",
        str: "string",
        bool: "true or false",
        int: "number",
        float: "number",
    }
    return kinds.get(type(value), type(value).__name__)
