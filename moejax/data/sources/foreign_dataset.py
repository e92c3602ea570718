"""Datasets that others prepared with tensorflow-datasets, opened without running their code.

`features.json` names the Python class of each feature, and tensorflow-datasets imports its module.
So that file is read here first, and only classes of tensorflow-datasets itself are allowed.
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
from moejax.data.errors import DataError, first_line
from moejax.data.sources.document import Document
from moejax.data.storage import records
from moejax.data.storage.regular_files import read_regular
from moejax.paths import PathError, resolve_path

CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
"""Keys under which `features.json` names a class.

Protobuf reads both spellings of the first, and old files have the last.
"""

NAME = re.compile(
    r"(?P<name>[A-Za-z_]\w*)"
    r"(/(?P<config>\w[\w.+-]*))?"
    r"(:(?P<version>([0-9]+|[*])([.]([0-9]+|[*])){2}))?",
    re.ASCII,
)
"""The name of a dataset, in ASCII: no part of it is the parent folder."""

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
        """Names of the splits."""
        return tuple(self.builder.info.splits)

    def examples(self, split: str) -> records.Examples:
        """Returns the examples of a split, with the features that documents have.

        Raises:
          DataError: its files are damaged.
        """
        builder = self.builder
        features = builder.info.features
        known = {name: features[name] for name in Document._fields if name in features}
        info = builder.info.splits[split]
        where = f"{builder.data_dir}: {split}"
        remedy = f"{self.remedy} again"
        examples = records.Examples(
            [Path(name) for name in info.filepaths],
            tfds.features.FeaturesDict(known),
            where,
            remedy,
        )
        num_examples = len(examples)
        if num_examples != info.num_examples:
            raise DataError(
                f"{where} has {num_examples} documents instead of the {info.num_examples} of "
                f"dataset_info.json; {remedy}"
            )
        return examples


def open_dataset(name: str, source_dir: str) -> ForeignDataset:
    """Returns the dataset that `data.name` and `data.source_dir` name.

    Raises:
      ConfigError: there is none, or none of texts.
      PathError: no folder of this machine can have that path.
      DataError: its description is damaged, or names classes that tensorflow-datasets does not
        have.
    """
    where = f"data.name={name!r} with data.source_dir={source_dir!r}"
    remedy = "prepare it there with tensorflow-datasets and file_format='array_record'"
    try:
        folder = _find_folder(name, resolve_path(source_dir, "data.source_dir"))
        if folder is None:
            raise ConfigError(
                f"{where}: no such dataset, or one with several configs, which needs "
                f"data.name=NAME/CONFIG; {remedy}"
            )
        _check_features(folder / "features.json", where)
        # From its files alone: the class that made it may need TensorFlow.
        builder = tfds.builder_from_directory(folder)
    except ParseError as error:
        raise DataError(
            f"{where}: its description is damaged ({first_line(error)}); {remedy} again"
        ) from error
    except (ValueError, KeyError, OSError) as error:
        if isinstance(error, ConfigError | DataError | PathError):
            raise
        raise ConfigError(f"{where} cannot be opened ({first_line(error)}); {remedy}") from error
    _check_builder(builder, where, remedy)
    return ForeignDataset(builder, _identity(Path(builder.data_dir)), remedy)


def _find_folder(name: str, root: Path) -> Path | None:
    """Returns the folder of the dataset `NAME[/CONFIG][:VERSION]`, or None if there is none.

    Of the versions that fit, it is the newest. It is looked up here because tensorflow-datasets
    also follows what files name, and imports its own code for a name.
    """
    parts = NAME.fullmatch(name)
    if not parts:
        raise ConfigError(
            f"data.name={name!r} must be NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION"
        )
    of_dataset = root / parts["name"]
    if parts["config"]:
        versions = _versions(of_dataset / parts["config"], parts["version"])
    else:
        versions = _versions(of_dataset, parts["version"])
        versions = versions or _versions_of_only_config(of_dataset, parts["version"])
    return versions[max(versions)] if versions else None


def _versions_of_only_config(folder: Path, wanted: str | None) -> dict[tuple[int, ...], Path]:
    """Returns the fitting versions of a dataset's config; none if several configs have some."""
    found = [_versions(config, wanted) for config in _folders(folder)]
    fitting = [versions for versions in found if versions]
    return fitting[0] if len(fitting) == 1 else {}


def _versions(folder: Path, wanted: str | None) -> dict[tuple[int, ...], Path]:
    """Returns the versions in a folder that fit one such as `1.2.0` or `1.*.*`, by number."""
    escaped = re.escape(wanted or "*.*.*")
    pattern = escaped.replace(r"\*", "[0-9]+")
    fitting = {}
    for path in _folders(folder):
        description = path / "features.json"
        if description.exists() and re.fullmatch(pattern, path.name):
            parts = path.name.split(".")
            number = tuple(map(int, parts))
            fitting[number] = path
    return fitting


def _folders(folder: Path) -> list[Path]:
    """Returns the folders in a folder; none if it does not exist."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir()]


def _check_builder(builder: Any, where: str, remedy: str) -> None:
    """Raises `ConfigError` unless the dataset has texts and splits that can be read."""
    features = builder.info.features
    if "text" not in features:
        raise ConfigError(
            f"{where} has no feature `text` but {', '.join(features)}; choose a dataset of texts"
        )
    if not isinstance(features["text"], tfds.features.Text):
        kind = type(features["text"]).__name__
        raise ConfigError(f"{where}: its feature `text` is {kind} and must be a tfds Text")
    splits = builder.info.splits
    if "train" not in splits:
        raise ConfigError(f"{where} has no split `train` but {', '.join(splits)}; {remedy}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(f"{where} is not stored as ArrayRecord; {remedy}")
    if "validation" not in splits and splits["train"].num_examples < 2:
        raise ConfigError(
            f"{where} has fewer than 2 documents and no split `validation`; add documents"
        )


def _check_features(path: Path, where: str) -> None:
    """Raises `DataError` unless `features.json` names classes of tensorflow-datasets only."""
    try:
        described = json.loads(read_regular(path).decode("utf-8"))
        named = set(_class_names(described))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {path} is damaged ({first_line(error)}); prepare the dataset again"
        ) from error
    classes = [value for value in vars(tfds.features).values() if isinstance(value, type)]
    allowed = {f"{feature.__module__}.{feature.__name__}" for feature in classes}
    for name in sorted(named - allowed):
        raise DataError(
            f"{where}: {path} names the class {name!r}, which tensorflow-datasets does not have: "
            "its module would be imported; prepare the dataset with features of "
            "tensorflow-datasets alone"
        )


def _class_names(described: Any) -> Iterator[str]:
    """Yields every text that is where a class can be named, at any depth."""
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
    """Returns a digest of the files' names and sizes, and of the descriptions."""
    digest = hashlib.sha256()
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in sorted(files):
        size = path.stat().st_size
        line = f"{path.name} {size}\n"
        digest.update(line.encode())
        if path.name in DESCRIPTIONS:  # they hold the version and the checksums
            digest.update(path.read_bytes())
    return digest.hexdigest()
