"""The documents of the user's own files, split by what is in them.

A document's digest decides its split: moving, renaming or joining files changes nothing about it,
and equal documents fall into the same split. Nothing is kept of a document but sixteen bytes, so
that a corpus may exceed the memory.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moejax.config import ConfigError, DataConfig
from moejax.data.errors import DataError
from moejax.data.sources.document import Document
from moejax.data.sources.file_documents import read_documents
from moejax.data.sources.splits import last_held_out, split_key
from moejax.data.sources.text_files import TextFile, find_text_files, unreadable

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class _Split:
    """How documents are split: those with keys up to `last_key` are held out; `is_single` says that all are equal."""

    last_key: int
    is_single: bool


class FileDocuments:
    """The documents of the files that `data.files` names, in the order of the files' digests.

    Args:
      data: with the files, and the field of records that holds their text.

    Raises:
      ConfigError: no such files.
      DataError: a file cannot be read.
    """

    def __init__(self, data: DataConfig):
        self._data = data
        found = find_text_files(data.files)
        self._digests = {file: _digest(file.path) for file in found}
        self._files = sorted(found, key=lambda file: (self._digests[file], file.path))

    @property
    def identity(self) -> str:
        """A digest of all that determines the documents, their labels, their order and their splits."""
        lines = [self._line(file) for file in self._files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _line(self, file: TextFile) -> str:
        digest = self._digests[file]
        more = {"domain": file.domain} if file.domain else {}
        if file.kind != "text":
            more |= {"kind": file.kind, "text_field": self._data.text_field}
        if file.compression:
            more["compression"] = file.compression
        if not file.path.stat().st_size:
            more["empty"] = "left out"
        return f"{digest} {json.dumps(more, sort_keys=True)}" if more else digest

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of "train" or "validation" that are not empty."""
        if self._split.is_single:
            yield self._part(split)
            return
        wanted = split == "validation"
        # A text's digest says its split before it is read.
        files = [
            file for file in self._files if not _is_plain(file) or self._is_held_out(file) == wanted
        ]
        for document in self._all(files):
            if (_key(document.text) <= self._split.last_key) == wanted:
                yield document

    def _is_held_out(self, file: TextFile) -> bool:
        return split_key(self._digests[file]) <= self._split.last_key

    def _all(self, files: Sequence[TextFile]) -> Iterator[Document]:
        for file in files:
            yield from (
                document
                for document in read_documents(file, self._data.text_field)
                if document.text
            )

    def _part(self, split: str) -> Document:
        """Of the only text the last twentieth for validation, the rest for training."""
        path, document = next(
            (file.path, document) for file in self._files for document in self._all([file])
        )
        text = document.text
        if len(text) < 2:
            raise ConfigError(
                f"{path}, the only text of data.files, is too short to hold out a part; add text"
            )
        cut = len(text) - max(1, len(text) // 20)
        return document._replace(text=text[cut:] if split == "validation" else text[:cut])

    @functools.cached_property
    def _split(self) -> _Split:
        """Reads every document once."""
        keys, sizes = array("Q"), array("Q")
        num_empty, first_empty = 0, ""
        for file in self._files:
            for number, (key, size) in enumerate(self._keys(file), start=1):
                if size:
                    keys.append(key)
                    sizes.append(size)
                else:
                    first_empty = first_empty or f"number {number} of {file.path}"
                    num_empty += 1
        if num_empty:
            log.warning(
                "data.files: %d of %d documents are empty and left out; the first is %s",
                num_empty, num_empty + len(keys), first_empty,
            )  # fmt: skip
        if not keys:
            raise DataError(
                f"data.files={self._data.files!r} names no document with text, only empty ones; add text"
            )
        keys_D, sizes_D = np.frombuffer(keys, np.uint64), np.frombuffer(sizes, np.uint64)
        if (keys_D == keys_D[0]).all():
            return _Split(0, is_single=True)
        return _Split(last_held_out(keys_D, sizes_D), is_single=False)

    def _keys(self, file: TextFile) -> Iterator[tuple[int, int]]:
        """The key of each document and its size in bytes."""
        if _is_plain(file):
            yield split_key(self._digests[file]), file.path.stat().st_size
            return
        for document in read_documents(file, self._data.text_field):
            yield _key(document.text), len(document.text.encode("utf-8"))


def _is_plain(file: TextFile) -> bool:
    """Whether the file's bytes are those of its only document."""
    return file.kind == "text" and not file.compression


def _key(text: str) -> int:
    return split_key(hashlib.sha256(text.encode("utf-8")).hexdigest())


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
