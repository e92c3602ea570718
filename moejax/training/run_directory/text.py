"""The text of a run: which rows it was trained on, and where they may be looked for.

A run directory may come from anyone, and the paths in its `config.json` could name any file of this
machine. So the rows are looked for where the user says now; otherwise where the run recorded them,
if the record has the signature of this user; otherwise in `data` below the current folder, where
nothing is written without the user's request. Rows under another name than the run's `corpus` are
never used.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from moejax.config import DataConfig
from moejax.data import Corpus, DataError, Tokenizer, find_rows, prepare
from moejax.training.run_directory.layout import read_config
from moejax.training.run_directory.reader import RunDirectory
from moejax.training.run_directory.text_record import is_signed, signed_text

PLACES_OF_SOURCE = {"files": "files", "tfds": "source_dir"}
"""The leaf that says where the documents of a source are; other sources need none."""

LONGEST_ROW = 1024
"""Tokens of a row on which released weights are evaluated, unless the user says otherwise."""

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class TextPlaces:
    """Where the user says that a run's text is, by the leaves of `DataConfig`.

    Attributes:
      directory: of prepared rows; they are prepared there if they are absent.
      files: the documents of `data.source=files`.
      source_dir: that of `data.source=tfds`.

    An empty value is not given.
    """

    directory: str = ""
    files: str = ""
    source_dir: str = ""

    @classmethod
    def from_config(cls, data: DataConfig) -> "TextPlaces":
        """Returns the places of a configuration that the user gives now."""
        return cls(data.directory, data.files, data.source_dir)

    def said(self) -> dict[str, str]:
        """Returns the places that are given, by leaf."""
        return {leaf: place for leaf, place in dataclasses.asdict(self).items() if place}


def open_run_corpus(
    workdir: str | Path, tokenizer: Tokenizer, places: TextPlaces | None = None
) -> Corpus:
    """Opens the rows that a run was trained on; they are prepared again if they are gone.

    Args:
      workdir: the run directory.
      tokenizer: of the run.
      places: where the user says that its text is.

    Raises:
      ConfigError: no readable `config.json`, or its text is not found.
      DataError: the rows are damaged, or cannot be found unless the user says where they are, or
        the text has changed.
    """
    workdir = Path(workdir)
    given = (places or TextPlaces()).said()
    config_data = read_config(workdir).data
    record = RunDirectory(workdir).read_facts()
    if record.get("corpus", "") is None:
        # Converted weights, which saw no rows: any text may be evaluated.
        data = said_text(_with_places(config_data, {}), places)
        seq_len = min(data.seq_len, LONGEST_ROW)
        return prepare(dataclasses.replace(data, seq_len=seq_len), tokenizer)
    corpus = record.get("corpus")
    if not isinstance(corpus, str):
        raise DataError(
            f"{workdir}/config.json does not say on which rows the run was trained; restore it "
            "from a copy"
        )
    recorded = _trusted_places(config_data, record.get("text"), corpus)
    known = (recorded or {}) | given
    data = _with_places(config_data, known)
    rows = find_rows(data, corpus, tokenizer)
    if rows is not None:
        log.info("rows: %s", rows.directory)
        return rows
    _check_known(workdir, data, corpus, known)
    log.info("the run's rows %s are not in %s and are prepared there", corpus, data.directory)
    return prepare(data, tokenizer, only=corpus)


def said_text(data: DataConfig, places: TextPlaces | None) -> DataConfig:
    """Returns the text for weights that saw no rows: any files that the user names, or `data`.

    Args:
      data: what is read where the user says nothing.
      places: where the user says that text is.

    Raises:
      DataError: a place that the text does not have.
    """
    given = (places or TextPlaces()).said()
    if "source_dir" in given and data.source != "tfds":
        raise DataError(
            f"--data.source_dir={given['source_dir']} goes with data.source=tfds, not "
            f"{data.source}; name files by --data.files="
        )
    source = "files" if "files" in given else data.source
    known: dict[str, Any] = {"source": source, **given}
    return dataclasses.replace(data, **known)


def _with_places(data: DataConfig, known: dict[str, str]) -> DataConfig:
    """Returns where the text is, as far as that is known; otherwise the default folder of rows."""
    places = dataclasses.asdict(TextPlaces(directory=DataConfig().directory)) | known
    return dataclasses.replace(data, **places)


def _trusted_places(data: DataConfig, record: Any, corpus: str) -> dict[str, str] | None:
    """Returns the places that the run recorded; None unless this user's moejax did it."""
    if not isinstance(record, dict):
        return None
    leaves = [field.name for field in dataclasses.fields(TextPlaces)]
    if not all(isinstance(record.get(leaf), str) for leaf in leaves):
        return None
    if not is_signed(signed_text(data, record, corpus), record.get("signature")):
        return None
    return {leaf: record[leaf] for leaf in leaves}


def _check_known(workdir: Path, data: DataConfig, corpus: str, known: dict[str, str]) -> None:
    """Raises `DataError` if it is not known where to prepare rows again, and from what."""
    leaves = ["directory"]
    if data.source in PLACES_OF_SOURCE:
        leaves.append(PLACES_OF_SOURCE[data.source])
    unknown = [leaf for leaf in leaves if not known.get(leaf)]
    if not unknown:
        return
    flags = " and ".join(f"--data.{leaf}=" for leaf in unknown)
    raise DataError(
        f"{workdir}: its rows {corpus} are not in {os.path.abspath(data.directory)}, and places "
        "that config.json names are not trusted, since it was not written by this user here; say "
        f"where the text is, by {flags}, or where the rows are, by --data.directory="
    )
