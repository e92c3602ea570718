"""Datasets that others prepared with tensorflow-datasets: opened without importing what their files name.

`features.json` names the Python class of each feature, and tensorflow-datasets imports its module. So that file is read
here first, and only classes that tensorflow-datasets itself offers pass.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core.read_only_builder import builder_from_files

from moejax.config import ConfigError
from moejax.data import store
from moejax.data.document import Document
from moejax.data.errors import DataError
from moejax.data.regular_files import read_regular
from moejax.paths import resolve_path

CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
"""Under which `features.json` names a class: protobuf reads both spellings of the first, old files have the last."""

DESCRIPTIONS = ("dataset_info.json", "features.json")


@dataclasses.dataclass(frozen=True)
class ForeignDataset:
    """A prepared dataset of texts.

    Attributes:
      builder: of tensorflow-datasets, which read its description.
      identity: a digest of its description and of the names and sizes of its files, not of their contents.
      remedy: for errors.
    """

    builder: Any
    identity: str
    remedy: str

    @property
    def splits(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.builder.info.splits)

    def examples(self, split: str) -> store.Examples:
        """Those of a split, of which only what documents have is read.

        Raises:
          DataError: its files are damaged.
        """
        features = self.builder.info.features
        wanted = tfds.features.FeaturesDict({name: features[name] for name in Document._fields if name in features})
        info = self.builder.info.splits[split]
        where = f"{self.builder.data_dir}: {split}"
        examples = store.Examples([Path(name) for name in info.filepaths], wanted, where, f"{self.remedy} again")
        if len(examples) != info.num_examples:
            raise DataError(
                f"{where} has {len(examples)} documents instead of the {info.num_examples} of dataset_info.json; "
                f"{self.remedy} again"
            )
        return examples


def open_dataset(name: str, source_dir: str) -> ForeignDataset:
    """Opens the dataset that `data.name` and `data.source_dir` name.

    Raises:
      ConfigError: there is none, or none of texts.
      PathError: no folder of this machine can have that path.
      DataError: its description is damaged, or names classes that tensorflow-datasets does not offer.
    """
    where = f"data.name={name!r} with data.source_dir={source_dir!r}"
    remedy = "prepare it there with tensorflow-datasets and file_format='array_record'"
    root = resolve_path(source_dir, "data.source_dir")
    folder = root / re.split("[/:]", name)[0]
    for path in folder.rglob("features.json"):
        _check_features(path, where)
    try:
        # From its files alone: the class that made it may need TensorFlow.
        builder = builder_from_files(name, data_dir=str(root))
    except ParseError as error:
        raise DataError(f"{where}: its description is damaged ({store.first_line(error)}); {remedy} again") from error
    except (tfds.core.registered.DatasetNotFoundError, ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"{where}: no such dataset, or one with several configs, which needs data.name=NAME/CONFIG; {remedy}"
        ) from error
    _check_builder(builder, where, remedy)
    return ForeignDataset(builder, _identity(Path(builder.data_dir)), remedy)


def _check_builder(builder: Any, where: str, remedy: str) -> None:
    features = builder.info.features
    if "text" not in features:
        raise ConfigError(f"{where} has no feature `text` but {', '.join(features)}; choose a dataset of texts")
    if not isinstance(features["text"], tfds.features.Text):
        raise ConfigError(f"{where}: its feature `text` is {type(features['text']).__name__} and must be a tfds Text")
    if "train" not in builder.info.splits:
        raise ConfigError(f"{where} has no split `train` but {', '.join(builder.info.splits)}; {remedy}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(f"{where} is not stored as ArrayRecord; {remedy}")
    if "validation" not in builder.info.splits and builder.info.splits["train"].num_examples < 2:
        raise ConfigError(f"{where} has fewer than 2 documents and no split `validation`; add documents")


def _check_features(path: Path, where: str) -> None:
    """Raises `DataError` unless all classes that `features.json` names are among those of tensorflow-datasets."""
    try:
        described = json.loads(read_regular(path).decode("utf-8"))
        named = set(_class_names(described))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: {path} is damaged ({store.first_line(error)}); prepare the dataset again") from error
    offered = [value for value in vars(tfds.features).values() if isinstance(value, type)]
    allowed = {f"{feature.__module__}.{feature.__name__}" for feature in offered}
    for name in sorted(named - allowed):
        raise DataError(
            f"{where}: {path} names the class {name!r}, which tensorflow-datasets does not offer: its module would be "
            "imported; prepare the dataset with features of tensorflow-datasets alone"
        )


def _class_names(described: Any) -> Iterator[str]:
    """All that stands where a class can be named, at any depth."""
    if isinstance(described, list):
        for part in described:
            yield from _class_names(part)
    if not isinstance(described, dict):
        return
    for key, value in described.items():
        if key in CLASS_KEYS and isinstance(value, str):
            yield value
        else:
            yield from _class_names(value)


def _identity(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.name in DESCRIPTIONS:  # they hold the version and the checksums
            digest.update(path.read_bytes())
    return digest.hexdigest()
