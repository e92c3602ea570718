"""Datasets that others prepared with tensorflow-datasets: opened without importing what their files name.

`features.json` names the Python class of each feature, and tensorflow-datasets imports its module.
So that file is read here first, and only classes that tensorflow-datasets itself offers pass.
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

from moejax.config import ConfigError
from moejax.data.errors import DataError
from moejax.data.sources.document import Document
from moejax.data.storage import records
from moejax.data.storage.regular_files import read_regular
from moejax.paths import PathError, resolve_path

CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
"""Under which `features.json` names a class: protobuf reads both spellings of the first, old files have the last."""

NAME = re.compile(
    r"(?P<name>[A-Za-z_]\w*)(/(?P<config>\w[\w.+-]*))?(:(?P<version>([0-9]+|[*])([.]([0-9]+|[*])){2}))?",
    re.ASCII,
)
"""Of a dataset, in ASCII: no part of it is the folder above."""

DESCRIPTIONS = ("dataset_info.json", "features.json")


@dataclasses.dataclass(frozen=True)
class ForeignDataset:
    """A prepared dataset of texts.

    Attributes:
      builder: of tensorflow-datasets, which read its description.
      identity: a digest of its description and of the names and sizes of its files, not of
        their contents.
      remedy: for errors.
    """

    builder: Any
    identity: str
    remedy: str

    @property
    def splits(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.builder.info.splits)

    def examples(self, split: str) -> records.Examples:
        """Those of a split, of which only what documents have is read.

        Raises:
          DataError: its files are damaged.
        """
        features = self.builder.info.features
        wanted = tfds.features.FeaturesDict(
            {name: features[name] for name in Document._fields if name in features}
        )
        info = self.builder.info.splits[split]
        where = f"{self.builder.data_dir}: {split}"
        examples = records.Examples(
            [Path(name) for name in info.filepaths], wanted, where, f"{self.remedy} again"
        )
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
      DataError: its description is damaged, or names classes that tensorflow-datasets
        does not offer.
    """
    where = f"data.name={name!r} with data.source_dir={source_dir!r}"
    remedy = "prepare it there with tensorflow-datasets and file_format='array_record'"
    try:
        folder = _find_folder(name, resolve_path(source_dir, "data.source_dir"))
        if folder is None:
            raise ConfigError(
                f"{where}: no such dataset, or one with several configs, which needs data.name=NAME/CONFIG; {remedy}"
            )
        _check_features(folder / "features.json", where)
        # From its files alone: the class that made it may need TensorFlow.
        builder = tfds.builder_from_directory(folder)
    except ParseError as error:
        raise DataError(
            f"{where}: its description is damaged ({records.first_line(error)}); {remedy} again"
        ) from error
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, ConfigError | DataError | PathError):
            raise
        raise ConfigError(
            f"{where} cannot be opened ({records.first_line(error)}); {remedy}"
        ) from error
    _check_builder(builder, where, remedy)
    return ForeignDataset(builder, _identity(Path(builder.data_dir)), remedy)


def _find_folder(name: str, root: Path) -> Path | None:
    """The folder of the dataset `NAME[/CONFIG][:VERSION]`, of its newest version that fits; None if there is none.

    It is looked up here because tensorflow-datasets also follows what files name, and imports its
    own code for a name.
    """
    parts = NAME.fullmatch(name)
    if not parts:
        raise ConfigError(
            f"data.name={name!r} must be NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION"
        )
    of_dataset = root / parts["name"]
    folder = of_dataset / parts["config"] if parts["config"] else of_dataset
    versions = _versions(folder, parts["version"])
    if not parts["config"] and not versions and of_dataset.is_dir():
        configs = {
            path: _versions(path, parts["version"])
            for path in of_dataset.iterdir()
            if path.is_dir()
        }
        found = [of_config for of_config in configs.values() if of_config]
        versions = found[0] if len(found) == 1 else {}
    return versions[max(versions)] if versions else None


def _versions(folder: Path, wanted: str | None) -> dict[tuple[int, ...], Path]:
    """The versions in a folder that fit one such as `1.2.0` or `1.*.*`, by number."""
    pattern = re.escape(wanted).replace(r"\*", "[0-9]+") if wanted else "[0-9]+[.][0-9]+[.][0-9]+"
    paths = folder.iterdir() if folder.is_dir() else ()
    fitting = [
        path
        for path in paths
        if re.fullmatch(pattern, path.name) and (path / "features.json").exists()
    ]
    return {tuple(map(int, path.name.split("."))): path for path in fitting}


def _check_builder(builder: Any, where: str, remedy: str) -> None:
    features = builder.info.features
    if "text" not in features:
        raise ConfigError(
            f"{where} has no feature `text` but {', '.join(features)}; choose a dataset of texts"
        )
    if not isinstance(features["text"], tfds.features.Text):
        raise ConfigError(
            f"{where}: its feature `text` is {type(features['text']).__name__} and must be a tfds Text"
        )
    if "train" not in builder.info.splits:
        raise ConfigError(
            f"{where} has no split `train` but {', '.join(builder.info.splits)}; {remedy}"
        )
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(f"{where} is not stored as ArrayRecord; {remedy}")
    if "validation" not in builder.info.splits and builder.info.splits["train"].num_examples < 2:
        raise ConfigError(
            f"{where} has fewer than 2 documents and no split `validation`; add documents"
        )


def _check_features(path: Path, where: str) -> None:
    """Raises `DataError` unless all classes that `features.json` names are among those of tensorflow-datasets."""
    try:
        described = json.loads(read_regular(path).decode("utf-8"))
        named = set(_class_names(described))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {path} is damaged ({records.first_line(error)}); prepare the dataset again"
        ) from error
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
