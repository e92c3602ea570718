"""The documents of the user's own files, split by what is in them.

A document's digest decides its split: it does not change when files are moved, renamed or joined,
and equal documents fall into the same split. Only sixteen bytes are kept of a document, so a corpus
may be larger than the memory.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from array import array
from collections.abc import Iterator
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
    """How documents are split.

    Attributes:
      last_key: documents with keys up to this one are held out.
      is_single: whether all documents are equal, so that the text itself is cut.
    """

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
        self._files = sorted(found, key=self._rank)

    @property
    def identity(self) -> str:
        """A digest of all that determines the documents, their labels, order and splits."""
        lines = [self._line(file) for file in self._files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _rank(self, file: TextFile) -> tuple[str, Path]:
        return self._digests[file], file.path

    def _line(self, file: TextFile) -> str:
        """Returns a file's part of the identity: its digest, and what its bytes do not say."""
        digest = self._digests[file]
        properties: dict[str, str] = {}
        if file.domain:
            properties["domain"] = file.domain
        if file.kind != "text":
            properties["kind"] = file.kind
            properties["text_field"] = self._data.text_field
        if file.compression:
            properties["compression"] = file.compression
        if file.path.stat().st_size == 0:
            properties["empty"] = "left out"
        if not properties:
            return digest
        return f"{digest} {json.dumps(properties, sort_keys=True)}"

    def documents(self, split: str) -> Iterator[Document]:
        """Yields the documents of "train" or "validation" that are not empty."""
        if self._split.is_single:
            yield self._part(split)
            return
        is_validation = split == "validation"
        for file in self._files:
            if self._can_skip(file, is_validation):
                continue
            for document in self._read(file):
                if self._is_held_out(_key(document.text)) == is_validation:
                    yield document

    def _is_held_out(self, key: int) -> bool:
        return key <= self._split.last_key

    def _can_skip(self, file: TextFile, is_validation: bool) -> bool:
        """Whether a file is known to be of the other split before it is read."""
        if not _is_plain(file):
            return False
        return self._is_held_out(split_key(self._digests[file])) != is_validation

    def _read(self, file: TextFile) -> Iterator[Document]:
        """Yields the documents of a file that are not empty."""
        for document in read_documents(file, self._data.text_field):
            if document.text:
                yield document

    def _part(self, split: str) -> Document:
        """Returns part of the only text: the last twentieth is for validation."""
        path, document = self._first()
        text = document.text
        if len(text) < 2:
            raise ConfigError(
                f"{path}, the only text of data.files, is too short to hold out a part; add text"
            )
        cut = len(text) - max(1, len(text) // 20)
        part = text[cut:] if split == "validation" else text[:cut]
        return document._replace(text=part)

    def _first(self) -> tuple[Path, Document]:
        """Returns the first document that is not empty, and its file."""
        for file in self._files:
            for document in self._read(file):
                return file.path, document
        raise DataError(f"data.files={self._data.files!r} has no text any more; restore it")

    @functools.cached_property
    def _split(self) -> _Split:
        """Reads every document once, and decides how they are split."""
        keys = array("Q")
        sizes = array("Q")
        num_empty = 0
        first_empty = ""
        for file in self._files:
            for number, (key, size) in enumerate(self._keys(file), start=1):
                if size:
                    keys.append(key)
                    sizes.append(size)
                else:
                    first_empty = first_empty or f"number {number} of {file.path}"
                    num_empty += 1
        if num_empty:
            num_documents = num_empty + len(keys)
            log.warning(
                "data.files: %d of %d documents are empty and left out; the first is %s",
                num_empty,
                num_documents,
                first_empty,
            )
        if not keys:
            raise DataError(
                f"data.files={self._data.files!r} names no document with text, only empty ones; "
                "add text"
            )
        all_keys = np.frombuffer(keys, np.uint64)
        if (all_keys == all_keys[0]).all():
            return _Split(last_key=0, is_single=True)
        last_key = last_held_out(all_keys, np.frombuffer(sizes, np.uint64))
        return _Split(last_key, is_single=False)

    def _keys(self, file: TextFile) -> Iterator[tuple[int, int]]:
        """Yields the key of each document and its size in bytes."""
        if _is_plain(file):
            digest = self._digests[file]
            yield split_key(digest), file.path.stat().st_size
            return
        for document in read_documents(file, self._data.text_field):
            text = document.text
            size = len(text.encode("utf-8"))
            yield _key(text), size


def _is_plain(file: TextFile) -> bool:
    """Whether the file's bytes are those of its only document."""
    return file.kind == "text" and not file.compression


def _key(text: str) -> int:
    """Returns a document's key: that of its digest, as if it were a file of its own."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return split_key(digest)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
