"""Rows on disk: an ArrayRecord dataset written and read by tensorflow-datasets, without TensorFlow.

Loading this module loads tensorflow-datasets; the others import it where they need it.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moejax.data.errors import DataError
from moejax.data.packing import FEATURES, Row

VERSION = "1.0.0"
# What array_record and the example decoder raise for damaged files.
READ_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, OSError)

with tfds.core.registered.skip_registration():  # it takes arguments, so `tfds.builder("rows")` could not make one

    class RowsBuilder(tfds.core.GeneratorBasedBuilder):
        """Writes an iterator of rows per split, in order."""

        VERSION = tfds.core.Version(VERSION)
        name = "rows"

        def __init__(self, rows: Mapping[str, Iterator[Row]], seq_len: int, **kwargs: Any):
            self._rows = rows
            self._seq_len = seq_len
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            raw = tfds.features.Encoding.BYTES
            features = {
                name: tfds.features.Tensor(shape=(self._seq_len + 1,), dtype=np.int32, encoding=raw)
                for name in FEATURES
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
            return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

        def _generate_examples(self, rows: Iterator[Row]) -> Iterator[tuple[int, Row]]:
            yield from enumerate(rows)


def run_builder(builder: tfds.core.DatasetBuilder, folder: Path) -> None:
    """Prepares a builder, made with `data_dir=folder`, as ArrayRecord; prints nothing to standard output."""
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    downloads = folder / "downloads"  # tensorflow-datasets makes it even when there is nothing to download
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(file_format="array_record", download_dir=str(downloads))
    shutil.rmtree(downloads, ignore_errors=True)


def write_rows(folder: Path, rows: Mapping[str, Iterator[Row]], seq_len: int) -> None:
    """Writes the rows, [seq_len + 1], of each split below `folder`."""
    run_builder(RowsBuilder(rows, seq_len, data_dir=str(folder)), folder)


class Rows:
    """Random access to the rows of one split: what grain calls a data source."""

    def __init__(self, folder: Path, split: str):
        """Opens `split` of what `write_rows` wrote to `folder`; raises `DataError` if that is damaged."""
        self._folder = folder
        self._split = split
        try:
            self._source = tfds.builder_from_directory(str(folder / "rows" / VERSION)).as_data_source(split=split)
        except READ_ERRORS as error:
            raise self._error("cannot be opened", error) from error

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Rows({str(self._folder)!r}, {self._split!r})"

    def __getitem__(self, index: int) -> Row:
        """The int32 arrays [L + 1] of one row; raises `DataError` if it is damaged, `IndexError` behind the last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} must be between 0 and {len(self) - 1}")
        try:
            return self._source[index]
        except READ_ERRORS as error:
            raise self._error(f"row {index} cannot be read", error) from error

    def _error(self, problem: str, error: Exception) -> DataError:
        return DataError(
            f"{self._folder}: {self._split}: {problem} ({first_line(error)}); remove the folder {self._folder} and run "
            "the command again: it is prepared anew"
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
