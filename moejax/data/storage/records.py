"""Examples on disk: ArrayRecord files, written and read without TensorFlow.

What an example consists of is known here and passed in: nothing that a folder says about its own
contents is believed, because it could name Python modules to import. Loading this module loads
tensorflow-datasets; the others import it where they need it.
"""

import contextlib
import functools
import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moejax.data.errors import DataError
from moejax.data.packing import FEATURES, Row

ROWS_FILE = "rows/1.0.0/rows-{split}.array_record-00000-of-00001"
GROUPING = "group_size:1"  # rows are read one by one, in any order
# What array_record and the example decoder raise for damaged files.
READ_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, OSError)


class LocalInfo(tfds.core.DatasetInfo):
    """A dataset's description that is not looked for in the bucket of tensorflow-datasets, which has none of ours."""

    def initialize_from_bucket(self) -> None:
        """Does nothing; the original also leaves an empty folder in the temporary directory at each call."""


def run_builder(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Prepares a builder, made with `data_dir=folder`, as ArrayRecord; prints nothing to standard output."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    downloads = (
        folder / "downloads"
    )  # tensorflow-datasets makes it even when there is nothing to download
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record", download_dir=str(downloads))
    shutil.rmtree(downloads, ignore_errors=True)


@functools.cache
def row_features(seq_len: int) -> tfds.features.FeaturesDict:
    """What a row of `seq_len` predictions consists of."""
    raw = tfds.features.Encoding.BYTES
    tensor = functools.partial(
        tfds.features.Tensor, shape=(seq_len + 1,), dtype=np.int32, encoding=raw
    )
    return tfds.features.FeaturesDict({name: tensor() for name in FEATURES})


def write_rows(folder: Path, rows: Mapping[str, Iterator[Row]], seq_len: int) -> None:
    """Writes the rows, [seq_len + 1], of each split below `folder`, as they come: none is kept in memory.

    Raises:
      OSError: they cannot be written, such as on a full disk.
    """
    for split, of_split in rows.items():
        path = folder / ROWS_FILE.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_examples(path, of_split, row_features(seq_len))


def _write_examples(
    path: Path, examples: Iterator[Row], features: tfds.features.FeaturesDict
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    with contextlib.ExitStack() as stack:
        writer = ArrayRecordWriter(str(path), GROUPING)
        stack.callback(writer.close)
        for example in examples:
            writer.write(serializer.serialize_example(features.encode_example(example)))
        stack.pop_all()
    try:
        writer.close()  # it writes in the background, and says here what went wrong
    except RuntimeError as error:
        raise OSError(first_line(error)) from error


class Examples:
    """Random access to the examples of ArrayRecord files.

    Args:
      paths: of the files, in order.
      features: what an example consists of.
      where: for errors, such as a folder and a split.
      remedy: for errors.
      word: for an example, in errors.

    Raises:
      DataError: a file cannot be opened; also when a damaged example is read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        features: tfds.features.FeaturesDict,
        where: str,
        remedy: str,
        *,
        word: str = "document",
    ):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.features = features
        self._where = where
        self._remedy = remedy
        self._word = word
        try:
            self._records = ArrayRecordDataSource([str(path) for path in paths])
            self._size = len(self._records)
        except READ_ERRORS as error:
            raise self.error("cannot be opened", error) from error

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example as arrays and bytes."""
        try:
            return self.features.deserialize_example_np(self._records[index])
        except READ_ERRORS as error:
            raise self.error(f"{self._word} {index} cannot be read", error) from error

    def error(self, problem: str, error: Exception) -> DataError:
        """That something about the examples cannot be read."""
        return DataError(f"{self._where}: {problem} ({first_line(error)}); {self._remedy}")


class Rows:
    """Random access to the rows of one split: what grain calls a data source.

    Args:
      folder: that `write_rows` wrote to.
      split: of the rows.
      seq_len: L; a row has L + 1 slots.

    Raises:
      DataError: the files are missing or damaged; also when a damaged row is read.
    """

    def __init__(self, folder: Path, split: str, seq_len: int):
        self._folder = folder
        self._split = split
        self._slots = seq_len + 1
        pattern = ROWS_FILE.format(split=split).removesuffix("-00000-of-00001")
        remedy = f"remove the folder {folder} and run the command again: it is prepared anew"
        paths = sorted(folder.glob(f"{pattern}-*"))  # earlier versions wrote several
        if not paths:
            raise DataError(f"{folder}: {split}: its files are missing; {remedy}")
        self._examples = Examples(
            paths, row_features(seq_len), f"{folder}: {split}", remedy, word="row"
        )

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"Rows({str(self._folder)!r}, {self._split!r})"

    def __getitem__(self, index: int) -> Row:
        """The int32 arrays [L + 1] of one row; raises `DataError` if it is damaged, `IndexError` behind the last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} must be between 0 and {len(self) - 1}")
        return self._examples[index % len(self)]


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
