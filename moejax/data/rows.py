"""Prepares a corpus once, as rows on disk, and opens it from then on.

`prepare` finds or learns the tokenizer, then finds or writes the rows. Each is a folder below
`data.directory` whose name ends in a hash of everything that determines its contents. It is written
under another name first and renamed when complete, so an interrupted preparation leaves nothing
that could be mistaken for a finished one.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.config import DataConfig
from moejax.data.errors import DataError, prepare_again
from moejax.data.labels import Labels, LabelsFile, read_labels
from moejax.data.packing import Row, pack
from moejax.data.sources.choose import SPLITS, Source, data_directory, open_source
from moejax.data.sources.document import Document
from moejax.data.storage.atomic import complete_folder
from moejax.data.storage.manifest import NAME as MANIFEST
from moejax.data.storage.manifest import (
    check_sizes,
    digest_of,
    file_sizes,
    read_manifest,
    write_manifest,
)
from moejax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    train_sentencepiece,
)

if TYPE_CHECKING:
    from moejax.data.storage.records import Rows

__all__ = ["Corpus", "DataError", "prepare"]

ROWS_VERSION = 2  # raise it when packing or storing changes what is in a row
BPE_VERSION = 2  # raise it when `train_sentencepiece` changes

ROWS_NAME = re.compile(r"[\w.+-]+-[0-9a-f]{12}")
"""Names of prepared rows; none of them leads to another folder."""

REPORT_SECONDS = 20.0  # between two progress messages of a long preparation

_log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Attributes:
      tokenizer: the one that made the ids in the rows.
      seq_len: L; a row has L + 1 slots.
      num_rows: rows by split.
      num_tokens: targets by split: every token of every document and its end, each once.
      num_bytes: UTF-8 bytes of the documents by split.
      num_documents: documents by split.
      directory: where the rows are.
      digests: SHA-256 of the small files next to the rows, by name; older versions wrote none.
    """

    tokenizer: Tokenizer
    seq_len: int
    num_rows: dict[str, int]
    num_tokens: dict[str, int]
    num_bytes: dict[str, int]
    num_documents: dict[str, int]
    directory: Path
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def rows(self, split: str) -> "Rows":
        """Returns random access to the rows of a split: dicts of int32 arrays [L + 1].

        `packing.pack` describes them.

        Raises:
          DataError: the rows are damaged; also raised when a damaged row is read.
        """
        from moejax.data.storage.records import Rows

        if split not in self.num_rows:
            raise ValueError(f"split={split!r} must be one of {', '.join(self.num_rows)}")
        rows = Rows(self.directory, split, self.seq_len)
        expected = self.num_rows[split]
        if len(rows) != expected:
            raise _damaged(
                self.directory,
                f"{self.directory}: {split} has {len(rows)} rows instead of {expected}",
            )
        return rows

    def labels(self, split: str) -> Labels:
        """Returns names and domains of the documents of a split.

        Their order is the one in which `documents` of the rows counts.

        Raises:
          DataError: their file is damaged.
        """
        return read_labels(self.directory, split, self.num_documents[split], self.digests)


def prepare(data: DataConfig, tokenizer: Tokenizer | None = None, *, only: str = "") -> Corpus:
    """Returns the corpus that `data` describes, and prepares it first if that was never done.

    Args:
      data: source, tokenizer, sequence length and the folder to keep the result in.
      tokenizer: used instead of the one `data` describes; a run passes its own.
      only: the name of the rows of a run; text that gives other rows is refused.

    Raises:
      ConfigError: `data` names no documents, or its vocabulary does not fit them.
      DataError: documents or prepared files are missing or damaged.
    """
    source = open_source(data)
    tokenizer = tokenizer or _tokenizer(data, source)
    key = _key(source.identity, tokenizer.fingerprint, data.seq_len)
    name = f"{source.name}-{tokenizer.kind}{tokenizer.vocab_size}-{data.seq_len}-{key}"
    if only not in ("", name):
        raise DataError(
            f"the text of data.source={data.source} gives the rows {name}, not {only}, on which "
            "the run was trained: it has changed since; restore it"
        )
    folder = data_directory(data) / "rows" / name

    def write(temporary: Path) -> None:
        _log.info("preparing rows: %s", folder)
        start = time.monotonic()
        _write(temporary, source, tokenizer, data.seq_len)
        _log.info("prepared rows in %.1f s", time.monotonic() - start)

    if not folder.exists():
        complete_folder(folder, write)
    corpus = _open(folder, tokenizer, data.seq_len)
    for split in SPLITS:
        sizes = (
            f"{corpus.num_rows[split]} rows, {corpus.num_tokens[split]} tokens, "
            f"{corpus.num_bytes[split]} bytes, {corpus.num_documents[split]} documents"
        )
        _log_once(folder, f"{source.name} {split}: {sizes}")
        if not corpus.num_bytes[split]:
            raise DataError(
                f"data.source={data.source}: all documents of its {split} split are empty; add text"
            )
    return corpus


@functools.cache
def _log_once(folder: Path, line: str) -> None:
    """Logs a line about rows unless this process has: a run opens them to train and to report."""
    _log.info(line)


def find_rows(data: DataConfig, name: str, tokenizer: Tokenizer) -> Corpus | None:
    """Returns the rows of this name, or None if `data.directory` has no such rows.

    Their documents are not needed.

    Args:
      data: where to look.
      name: `corpus` of a run's `config.json`.
      tokenizer: of the run.

    Raises:
      DataError: the rows are damaged, or are not those of the name.
    """
    if not ROWS_NAME.fullmatch(name):
        raise DataError(
            f"{name!r} is no name of prepared rows; restore the run's config.json from a copy"
        )
    folder = data_directory(data) / "rows" / name
    return _open(folder, tokenizer, data.seq_len) if folder.is_dir() else None


def _key(source: str, tokenizer: str, seq_len: int) -> str:
    """Returns what the name of prepared rows ends in."""
    return _hash([ROWS_VERSION, source, tokenizer, seq_len])


def _hash(determines: list[Any]) -> str:
    text = json.dumps(determines)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tokenizer(data: DataConfig, source: Source) -> Tokenizer:
    """Returns the tokenizer that `data` describes; BPE is learnt from the training split, once."""
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.has_tokenizer_file:
        return open_tokenizer(data.tokenizer, "data.tokenizer")
    key = _hash([BPE_VERSION, source.identity, data.vocab_size])
    name = f"{source.name}-bpe{data.vocab_size}-{key}"
    folder = data_directory(data) / "tokenizers" / name

    def write(temporary: Path) -> None:
        _log.info("learning a tokenizer of %d pieces: %s", data.vocab_size, folder)
        start = time.monotonic()
        texts = (document.text for document in source.documents("train"))
        tokenizer = train_sentencepiece(texts, data.vocab_size)
        tokenizer.save(temporary)
        _log.info("learnt the tokenizer in %.1f s", time.monotonic() - start)

    if not folder.exists():
        complete_folder(folder, write)
    return load_tokenizer(folder)


@dataclasses.dataclass
class _Counts:
    """The counts of one split in the manifest."""

    num_rows: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_documents: int = 0


def _write(folder: Path, source: Source, tokenizer: Tokenizer, seq_len: int) -> None:
    """Writes the rows of every split and, last, the manifest."""
    from moejax.data.storage.records import write_rows

    counts = {split: _Counts() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        rows = {}
        for split in SPLITS:
            labels = stack.enter_context(LabelsFile(folder, split))
            documents = labels.noting(source.documents(split))
            streams = _streams(documents, tokenizer, split, counts[split])
            rows[split] = _counted(pack(streams, seq_len), split, counts[split])
        write_rows(folder, rows, seq_len)
    labels_files = sorted(folder.glob("documents.*.jsonl"))
    digests = {path.name: digest_of(path) for path in labels_files}
    counts_of_splits = {split: dataclasses.asdict(count) for split, count in counts.items()}
    manifest: dict[str, Any] = {
        "seq_len": seq_len,
        "tokenizer": tokenizer.fingerprint,
        "source": source.identity,
        "files": file_sizes(folder),
        "digests": digests,
        "splits": counts_of_splits,
    }
    write_manifest(folder, manifest)


def _streams(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    split: str,
    counts: _Counts,
) -> Iterator[list[int]]:
    """Yields the ids of each document, counted as they pass; reports progress now and then."""
    reported = time.monotonic()
    for document in documents:
        ids = tokenizer.encode(document.text)
        counts.num_documents += 1
        counts.num_bytes += len(document.text.encode("utf-8"))
        counts.num_tokens += len(ids) + 1  # the end of the document is a target, too
        now = time.monotonic()
        if now - reported > REPORT_SECONDS:
            reported = now
            megabytes = counts.num_bytes / 1e6
            _log.info("%s: %d documents, %.1f MB so far", split, counts.num_documents, megabytes)
        yield [tokenizer.bos_id, *ids, tokenizer.eos_id]


def _counted(rows: Iterator[Row], split: str, counts: _Counts) -> Iterator[Row]:
    """Yields the rows of a split, counted as they pass; one without documents is refused."""
    for row in rows:
        counts.num_rows += 1
        yield row
    if counts.num_documents == 0:
        raise DataError(f"the split {split} of the data has no documents; add some")


def _open(folder: Path, tokenizer: Tokenizer, seq_len: int) -> Corpus:
    """Reads the manifest and checks the files against it, by size.

    What is inside of them is checked when it is read.
    """
    try:
        manifest = read_manifest(folder)
        counts = _read_counts(manifest["splits"])
        recorded_digests = manifest.get("digests", {})
        digests = {str(name): str(digest) for name, digest in recorded_digests.items()}
        key = _key(manifest["source"], manifest["tokenizer"], manifest["seq_len"])
        check_sizes(folder, manifest["files"])
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(
            folder, f"{folder / MANIFEST} is corrupt ({type(error).__name__}: {error})"
        ) from error
    except ValueError as error:
        raise _damaged(folder, str(error)) from error
    if not folder.name.endswith(f"-{key}"):
        raise _damaged(folder, f"{folder / MANIFEST} is that of other rows")
    if (manifest["tokenizer"], manifest["seq_len"]) != (tokenizer.fingerprint, seq_len):
        raise DataError(
            f"{folder} holds rows of {manifest['seq_len']} tokens that another tokenizer made "
            "than the run's; restore the run's tokenizer from a copy"
        )
    return Corpus(tokenizer, seq_len, directory=folder, digests=digests, **counts)


def _read_counts(splits: Any) -> dict[str, dict[str, int]]:
    """Returns each count of a manifest by split.

    Raises:
      KeyError, TypeError, ValueError: a split or a count is missing or damaged.
    """
    counts = {}
    for field in dataclasses.fields(_Counts):
        name = field.name
        counts[name] = {split: int(splits[split][name]) for split in SPLITS}
    return counts


def _damaged(folder: Path, problem: str) -> DataError:
    return DataError(f"{problem}; {prepare_again(folder)}")
