"""What is known about the documents of a split: a file beside its rows, one line a document."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

import numpy as np
from jaxtyping import Int

from moejax.data.errors import DataError
from moejax.data.sources.document import Document
from moejax.data.storage.regular_files import read_regular


@dataclasses.dataclass(frozen=True)
class Labels:
    """Names and domains of the documents of a split.

    Attributes:
      names: of each document; empty if none has one.
      domains: the distinct domains, sorted; ("",) if none is known.
      domain_of_document: index into `domains` of each document, int32.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    domain_of_document: Int[np.ndarray, "documents"]

    def largest(self, number: int) -> "Labels":
        """The same with at most `number` domains: of more, those with most documents are kept, the others "other"."""
        if len(self.domains) <= number:
            return self
        counts = np.bincount(self.domain_of_document, minlength=len(self.domains))
        counts[[name == "other" for name in self.domains]] = -1  # is one of the others
        kept = sorted(np.argsort(-counts, kind="stable")[: number - 1].tolist())
        place = np.full(len(self.domains), number - 1, np.int32)
        place[kept] = np.arange(number - 1)
        return Labels(
            self.names, (*(self.domains[i] for i in kept), "other"), place[self.domain_of_document]
        )


class LabelsFile:
    """Writes `documents.SPLIT.jsonl`, a line `[name, domain]` each; no file if no document has either.

    Args:
      folder: of the prepared corpus.
      split: its name.
    """

    def __init__(self, folder: Path, split: str):
        self._path = _path(folder, split)
        self._file: TextIO | None = None
        self._unlabelled = 0  # so far, while there is no file

    def noting(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Passes documents on."""
        for document in documents:
            if self._file is None and (document.name or document.domain):
                self._file = self._path.open("w", encoding="utf-8")
                self._file.write('["", ""]\n' * self._unlabelled)
            if self._file is None:
                self._unlabelled += 1
            else:
                self._file.write(json.dumps([document.name, document.domain]) + "\n")
            yield document

    def __enter__(self) -> "LabelsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def read_labels(
    folder: Path, split: str, num_documents: int, digests: Mapping[str, str] | None = None
) -> Labels:
    """The labels of a split; without a file, `num_documents` documents without labels.

    Args:
      folder: of the prepared corpus.
      split: its name.
      num_documents: of the split.
      digests: SHA-256 by the file's name, where it is known.

    Raises:
      DataError: the file is damaged.
    """
    path = _path(folder, split)
    digest = (digests or {}).get(path.name)
    if digest is None and not path.exists():
        return Labels((), ("",), np.zeros(num_documents, np.int32))
    try:
        raw = read_regular(path)
        if digest is not None and hashlib.sha256(raw).hexdigest() != digest:
            raise ValueError("it is not the file that was prepared")
        lines = [json.loads(line) for line in raw.decode("utf-8").split("\n")[:-1]]
        pairs = [(str(name), str(domain)) for name, domain in lines]
        if len(pairs) != num_documents:
            raise ValueError(f"{len(pairs)} lines for {num_documents} documents")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged ({error}); remove the folder {folder} and run the command again: it is prepared anew"
        ) from error
    domains = tuple(sorted({domain for _, domain in pairs}))
    index = {domain: i for i, domain in enumerate(domains)}
    return Labels(
        tuple(name for name, _ in pairs),
        domains,
        np.array([index[domain] for _, domain in pairs], np.int32),
    )


def _path(folder: Path, split: str) -> Path:
    return folder / f"documents.{split}.jsonl"
