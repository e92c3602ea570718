"""Where documents come from: one small interface over an installed corpus, a prepared dataset, files, or a grammar.

A source yields the documents of `train` and `validation` in a fixed order and knows a digest of everything that
determines them. No document is in both splits.
"""

import dataclasses
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.config import ConfigError, DataConfig
from moejax.data.atomic import atomic_folder
from moejax.data.errors import DataError
from moejax.data.splits import held_out
from moejax.data.synthetic import SYNTHETIC_VERSION, synthetic_documents

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents by split.

    Attributes:
      name: readable and usable in the name of a folder.
      identity: changes whenever a document, its split or its order does.
      documents: from "train" or "validation" to an iterator over texts.
    """

    name: str
    identity: str
    documents: Callable[[str], Iterator[str]]


def open_source(data: DataConfig) -> Source:
    """The source that `data.source` names.

    Raises:
      ConfigError: `data` names no usable documents.
      DataError: documents are missing or damaged; also raised while documents are read.
    """
    openers = {"speeches": _speeches, "tfds": _tfds, "files": _files, "synthetic": _synthetic}
    return openers[data.source](data)


def _speeches(data: DataConfig) -> Source:
    from moejax.data import speeches

    identity = speeches.identity()
    folder = Path(data.directory).expanduser() / "documents" / f"speeches-{identity[:12]}"
    remedy = f"remove the folder {folder} and run the command again: it is prepared anew"

    def documents(split: str) -> Iterator[str]:
        from moejax.data import store

        if not folder.exists():
            with atomic_folder(folder) as temporary:
                store.run_builder(speeches.Speeches(data_dir=str(temporary)), temporary)
        dataset = folder / speeches.Speeches.name / str(speeches.Speeches.VERSION)
        return _texts(_builder_from_directory(dataset, remedy), split, remedy)

    return Source("speeches", identity, documents)


def _tfds(data: DataConfig) -> Source:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    where = f"data.name={data.name!r} with data.source_dir={data.source_dir!r}"
    remedy = "prepare it there with tensorflow-datasets and file_format='array_record'"
    try:
        # From its files alone: the class that made it may need TensorFlow.
        builder = builder_from_files(data.name, data_dir=os.path.expanduser(data.source_dir))
    except (tfds.core.registered.DatasetNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            f"{where}: no such dataset, or one with several configs, which needs data.name=NAME/CONFIG; {remedy}"
        ) from error
    features = builder.info.features
    if "text" not in features:
        raise ConfigError(f"{where} has no feature `text` but {', '.join(features)}; choose a dataset of texts")
    if "train" not in builder.info.splits:
        raise ConfigError(f"{where} has no split `train` but {', '.join(builder.info.splits)}; {remedy}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(f"{where} is not stored as ArrayRecord; {remedy}")
    if "validation" not in builder.info.splits and builder.info.splits["train"].num_examples < 2:
        raise ConfigError(f"{where} has fewer than 2 documents and no split `validation`; add documents")

    def documents(split: str) -> Iterator[str]:
        if "validation" in builder.info.splits:
            return _texts(builder, split, f"{remedy} again")
        # Every twentieth document, from the first: wherever the dataset is sorted, both splits see all of it.
        return _texts(builder, "train", f"{remedy} again", keep=lambda i: (i % 20 == 0) == (split == "validation"))

    return Source(data.name.replace("/", "-").replace(":", "-"), _dataset_identity(Path(builder.data_dir)), documents)


def _dataset_identity(folder: Path) -> str:
    """A digest of a prepared dataset's description and of the names and sizes of its files, not of their contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        if path.name in ("dataset_info.json", "features.json"):  # they hold the version and the checksums
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _builder_from_directory(folder: Path, remedy: str) -> Any:
    import tensorflow_datasets as tfds

    from moejax.data import store

    try:
        return tfds.builder_from_directory(str(folder))
    except store.READ_ERRORS as error:
        raise DataError(f"{folder} cannot be opened ({store.first_line(error)}); {remedy}") from error


def _texts(builder: Any, split: str, remedy: str, keep: Callable[[int], bool] = lambda index: True) -> Iterator[str]:
    """The `text` feature of the documents of a prepared dataset whose index is kept."""
    from moejax.data import store

    try:
        examples = builder.as_data_source(split=split)
        size = len(examples)
    except (*store.READ_ERRORS, NotImplementedError) as error:
        raise DataError(
            f"{builder.data_dir}: {split} cannot be opened ({store.first_line(error)}); {remedy}"
        ) from error
    for index in filter(keep, range(size)):
        try:
            text = examples[index]["text"]
            text = text if isinstance(text, str) else bytes(text).decode("utf-8")
        except store.READ_ERRORS as error:  # UnicodeDecodeError among them
            reason = store.first_line(error)
            raise DataError(
                f"{builder.data_dir}: document {index} of {split} cannot be read ({reason}); {remedy}"
            ) from error
        yield text


def _files(data: DataConfig) -> Source:
    found = sorted(
        Path(name) for name in glob.glob(os.path.expanduser(data.files), recursive=True) if os.path.isfile(name)
    )
    if not found:
        raise ConfigError(f"data.files={data.files!r} matches no file; give a glob such as 'texts/**/*.txt'")
    # A file's digest decides its place and its split: moving or renaming files changes nothing, and equal files fall
    # into the same split.
    digests = {path: hashlib.sha256(_read_bytes(path)).hexdigest() for path in found}
    paths = sorted(found, key=lambda path: (digests[path], path))
    identity = hashlib.sha256("\n".join(digests[path] for path in paths).encode()).hexdigest()
    sizes: Counter[str] = Counter()
    for path in paths:
        sizes[digests[path]] += path.stat().st_size
    if len(sizes) == 1:
        return Source("files", identity, lambda split: iter([_part_of_text(paths[0], split)]))
    validation = held_out(sizes)

    def documents(split: str) -> Iterator[str]:
        return (_read_text(path) for path in paths if (digests[path] in validation) == (split == "validation"))

    return Source("files", identity, documents)


def _part_of_text(path: Path, split: str) -> str:
    """The last twentieth of a text for validation, the rest for training."""
    text = _read_text(path)
    if len(text) < 2:
        raise ConfigError(f"{path}, the only text that data.files matches, is too short to hold out a part; add text")
    cut = len(text) - max(1, len(text) // 20)
    return text[cut:] if split == "validation" else text[:cut]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); leave it out of data.files or repair it") from error


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or leave it out of data.files"
        ) from error


def _synthetic(data: DataConfig) -> Source:
    return Source("synthetic", f"synthetic-{SYNTHETIC_VERSION}", synthetic_documents)
