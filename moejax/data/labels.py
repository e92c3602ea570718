"""Names and domains of the documents of a split: a file next to its rows, a line a document."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from jaxtyping import Int

from moejax.data.errors import DataError, prepare_again
from moejax.data.sources.document import Document
from moejax.data.storage.regular_files import read_regular

OTHER = "other"
"""The domain of documents whose own domain is too small to be shown."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """Names and domains of the documents of a split.

    Attributes:
      names: one for each document; empty if no document has a name.
      domains: the distinct domains, sorted; ("",) if none is known.
      domain_of_document: index into `domains` of each document, int32.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    domain_of_document: Int[np.ndarray, "documents"]

    def largest(self, number: int) -> "Labels":
        """Returns labels with at most `number` domains.

        If there are more, those with most documents are kept, and the others become "other".
        """
        num_domains = len(self.domains)
        if num_domains <= number:
            return self
        num_kept = number - 1
        counts = np.bincount(self.domain_of_document, minlength=num_domains)
        if OTHER in self.domains:
            counts[self.domains.index(OTHER)] = -1  # it is one of the others
        by_count = np.argsort(-counts, kind="stable")  # of equal counts, the first are kept
        kept = np.sort(by_count[:num_kept])
        new_index = np.full(num_domains, num_kept, np.int32)
        new_index[kept] = np.arange(num_kept)
        kept_domains = [self.domains[i] for i in kept]
        return Labels(
            names=self.names,
            domains=(*kept_domains, OTHER),
            domain_of_document=new_index[self.domain_of_document],
        )


class LabelsFile:
    """Writes `documents.SPLIT.jsonl`, a line `[name, domain]` for each document.

    There is no file if no document has either.

    Args:
      folder: of the prepared corpus.
      split: its name.
    """

    def __init__(self, folder: Path, split: str):
        self._path = _path(folder, split)
        self._file: TextIO | None = None
        self._num_unlabelled = 0  # so far, while there is no file

    def noting(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Passes documents on, and writes their labels."""
        for document in documents:
            self._write(document)
            yield document

    def _write(self, document: Document) -> None:
        """Writes one document's line, after those of documents before it that had no labels."""
        has_labels = bool(document.name or document.domain)
        if self._file is None and has_labels:
            self._file = self._path.open("w", encoding="utf-8")
            unlabelled = _line("", "")
            self._file.write(unlabelled * self._num_unlabelled)
        if self._file is None:
            self._num_unlabelled += 1
        else:
            line = _line(document.name, document.domain)
            self._file.write(line)

    def __enter__(self) -> "LabelsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def read_labels(
    folder: Path,
    split: str,
    num_documents: int,
    digests: Mapping[str, str] | None = None,
) -> Labels:
    """Returns the labels of a split; without a file, `num_documents` documents without labels.

    Args:
      folder: of the prepared corpus.
      split: its name.
      num_documents: of the split.
      digests: SHA-256 by the file's name, if it is known.

    Raises:
      DataError: the file is damaged.
    """
    path = _path(folder, split)
    digest = (digests or {}).get(path.name)
    if digest is None and not path.exists():
        return Labels((), ("",), np.zeros(num_documents, np.int32))
    try:
        pairs = _read_pairs(path, digest)
        if len(pairs) != num_documents:
            raise ValueError(f"{len(pairs)} lines for {num_documents} documents")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); {prepare_again(folder)}") from error
    return _from_pairs(pairs)


def _from_pairs(pairs: Sequence[tuple[str, str]]) -> Labels:
    """Returns the labels of documents with these names and domains."""
    names = tuple(name for name, _ in pairs)
    all_domains = [domain for _, domain in pairs]
    domains = tuple(sorted(set(all_domains)))
    index_of = {domain: i for i, domain in enumerate(domains)}
    indices = [index_of[domain] for domain in all_domains]
    domain_of_document = np.array(indices, np.int32)
    return Labels(names, domains, domain_of_document)


def _read_pairs(path: Path, digest: str | None) -> list[tuple[str, str]]:
    """Returns the name and the domain of each document.

    Raises:
      OSError, ValueError, TypeError, RecursionError: the file is damaged.
    """
    raw = read_regular(path)
    found_digest = hashlib.sha256(raw).hexdigest()
    if digest not in (None, found_digest):
        raise ValueError("it is not the file that was prepared")
    text = raw.decode("utf-8")
    *lines, _ = text.split("\n")
    pairs = []
    for line in lines:
        name, domain = json.loads(line)
        pairs.append((str(name), str(domain)))
    return pairs


def _line(name: str, domain: str) -> str:
    return json.dumps([name, domain]) + "\n"


def _path(folder: Path, split: str) -> Path:
    return folder / f"documents.{split}.jsonl"
