"""Examples on disk: ArrayRecord files, written and read without TensorFlow.

The features of an example are known and passed in: nothing that a folder says about its own
contents is believed, because it could name Python modules to import. Loading this module loads
tensorflow-datasets; other modules import it where they need it.
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

from moejax.data.errors import DataError, first_line, prepare_again
from moejax.data.packing import FEATURES, Row

ROWS_FILE = "rows/1.0.0/rows-{split}.array_record"
SHARD_SUFFIX = "-00000-of-00001"
GROUPING = "group_size:1"  # rows are read one by one, in any order

READ_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, OSError)
"""What array_record and the example decoder raise for damaged files."""


class LocalInfo(tfds.core.DatasetInfo):
    """A dataset's description that is not looked up in the bucket of tensorflow-datasets.

    The bucket has none of our datasets.
    """

    def initialize_from_bucket(self) -> None:
        """Does nothing.

        The original also leaves an empty folder in the temporary directory at each call.
        """


def run_builder(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Prepares a builder, made with `data_dir=folder`, as ArrayRecord.

    Nothing is printed to standard output.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # tensorflow-datasets makes this folder even if there is nothing to download.
    downloads = folder / "downloads"
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record", download_dir=str(downloads))
    shutil.rmtree(downloads, ignore_errors=True)


@functools.cache
def row_features(seq_len: int) -> tfds.features.FeaturesDict:
    """Returns the features of a row of `seq_len` predictions."""
    features = {}
    for name in FEATURES:
        features[name] = tfds.features.Tensor(
            shape=(seq_len + 1,), dtype=np.int32, encoding=tfds.features.Encoding.BYTES
        )
    return tfds.features.FeaturesDict(features)


def write_rows(folder: Path, rows: Mapping[str, Iterator[Row]], seq_len: int) -> None:
    """Writes the rows, [seq_len + 1], of each split below `folder`.

    They are written as they arrive, and none is kept in memory.

    Raises:
      OSError: they cannot be written, for instance because the disk is full.
    """
    features = row_features(seq_len)
    for split, rows_of_split in rows.items():
        stem = ROWS_FILE.format(split=split)
        path = folder / f"{stem}{SHARD_SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_examples(path, rows_of_split, features)


def _write_examples(
    path: Path,
    examples: Iterator[Row],
    features: tfds.features.FeaturesDict,
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    with contextlib.ExitStack() as stack:
        writer = ArrayRecordWriter(str(path), GROUPING)
        stack.callback(writer.close)
        for example in examples:
            encoded = features.encode_example(example)
            writer.write(serializer.serialize_example(encoded))
        stack.pop_all()
    try:
        writer.close()  # the writer works in the background, and reports its errors here
    except RuntimeError as error:
        raise OSError(first_line(error)) from error


class Examples:
    """Random access to the examples of ArrayRecord files.

    Args:
      paths: of the files, in order.
      features: of an example.
      where: the folder and the split, for errors.
      remedy: for errors.
      word: what errors call an example.

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
        """Returns one example as arrays and bytes."""
        try:
            record = self._records[index]
            return self.features.deserialize_example_np(record)
        except READ_ERRORS as error:
            raise self.error(f"{self._word} {index} cannot be read", error) from error

    def error(self, problem: str, error: Exception) -> DataError:
        """Returns the error for examples that cannot be read."""
        return DataError(f"{self._where}: {problem} ({first_line(error)}); {self._remedy}")


class Rows:
    """Random access to the rows of one split: what grain calls a data source.

    Args:
      folder: where `write_rows` wrote them.
      split: of the rows.
      seq_len: L; a row has L + 1 slots.

    Raises:
      DataError: the files are missing or damaged; also when a damaged row is read.
    """

    def __init__(self, folder: Path, split: str, seq_len: int):
        self._folder = folder
        self._split = split
        self._slots = seq_len + 1
        remedy = prepare_again(folder)
        # Earlier versions wrote several files.
        shards = ROWS_FILE.format(split=split) + "-*"
        paths = sorted(folder.glob(shards))
        if not paths:
            raise DataError(f"{folder}: {split}: its files are missing; {remedy}")
        self._examples = Examples(
            paths,
            row_features(seq_len),
            f"{folder}: {split}",
            remedy,
            word="row",
        )

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        return f"Rows({str(self._folder)!r}, {self._split!r})"

    def __getitem__(self, index: int) -> Row:
        """Returns the int32 arrays [L + 1] of one row.

        Raises:
          DataError: the row is damaged.
          IndexError: there is no such row.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} must be between 0 and {len(self) - 1}")
        return self._examples[index % len(self)]
