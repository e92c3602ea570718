"""Where documents come from: one small interface over an installed corpus, a prepared dataset, files, or a grammar.

A source yields the documents of `train` and `validation` in a fixed order and knows a digest of everything that
determines them. No document is in both splits.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.config import ConfigError, DataConfig
from moejax.data.atomic import atomic_folder
from moejax.data.document import Document
from moejax.data.errors import DataError
from moejax.data.synthetic import SYNTHETIC_VERSION, synthetic_documents

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents by split.

    Attributes:
      name: readable and usable in the name of a folder.
      identity: changes whenever a document, its split or its order does.
      documents: from "train" or "validation" to an iterator over documents.
    """

    name: str
    identity: str
    documents: Callable[[str], Iterator[Document]]


def open_source(data: DataConfig) -> Source:
    """The source that `data.source` names.

    Raises:
      ConfigError: `data` names no usable documents.
      DataError: documents are missing or damaged; also raised while documents are read.
    """
    openers = {"speeches": _speeches, "domains": _domains, "tfds": _tfds, "files": _files, "synthetic": _synthetic}
    return openers[data.source](data)


def _speeches(data: DataConfig) -> Source:
    from moejax.data import speeches

    return _built(data, speeches.Speeches, speeches.identity())


def _domains(data: DataConfig) -> Source:
    from moejax.data import domains

    archives = Path(data.directory).expanduser() / "archives"
    return _built(data, domains.Domains, domains.identity(), archives=archives)


def _built(data: DataConfig, builder: Any, identity: str, **arguments: Any) -> Source:
    """The documents of one of our own builders, which is run once."""
    folder = Path(data.directory).expanduser() / "documents" / f"{builder.name}-{identity[:12]}"
    remedy = f"remove the folder {folder} and run the command again: it is prepared anew"

    def documents(split: str) -> Iterator[Document]:
        from moejax.data import store

        if not folder.exists():
            with atomic_folder(folder) as temporary:
                store.run_builder(builder(data_dir=str(temporary), **arguments), temporary)
        dataset = folder / builder.name / str(builder.VERSION)
        return _read_documents(_builder_from_directory(dataset, remedy), split, remedy)

    return Source(builder.name, identity, documents)


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
    if not isinstance(features["text"], tfds.features.Text):
        raise ConfigError(f"{where}: its feature `text` is {type(features['text']).__name__} and must be a tfds Text")
    if "train" not in builder.info.splits:
        raise ConfigError(f"{where} has no split `train` but {', '.join(builder.info.splits)}; {remedy}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise ConfigError(f"{where} is not stored as ArrayRecord; {remedy}")
    if "validation" not in builder.info.splits and builder.info.splits["train"].num_examples < 2:
        raise ConfigError(f"{where} has fewer than 2 documents and no split `validation`; add documents")

    def documents(split: str) -> Iterator[Document]:
        if "validation" in builder.info.splits:
            return _read_documents(builder, split, f"{remedy} again")
        # Every twentieth document, from the first: wherever the dataset is sorted, both splits see all of it.
        return _read_documents(
            builder, "train", f"{remedy} again", keep=lambda i: (i % 20 == 0) == (split == "validation")
        )

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


def _read_documents(
    builder: Any, split: str, remedy: str, keep: Callable[[int], bool] = lambda index: True
) -> Iterator[Document]:
    """The examples of a prepared dataset whose index is kept: `text`, and `name` and `domain` if it has them."""
    from moejax.data import store

    try:
        examples = builder.as_data_source(split=split)
        size = len(examples)
    except (*store.READ_ERRORS, NotImplementedError) as error:
        raise DataError(
            f"{builder.data_dir}: {split} cannot be opened ({store.first_line(error)}); {remedy}"
        ) from error
    features = builder.info.features
    known = [name for name in Document._fields if name in features]
    for index in filter(keep, range(size)):
        try:
            example = examples[index]
            document = Document(**{name: _as_text(example[name], features[name]) for name in known})
        except store.READ_ERRORS as error:  # UnicodeDecodeError among them
            reason = store.first_line(error)
            raise DataError(
                f"{builder.data_dir}: document {index} of {split} cannot be read ({reason}); {remedy}"
            ) from error
        yield document


def _as_text(value: Any, feature: Any) -> str:
    """Text of a feature; labels by their names, numbers, such as ids, in digits."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(value)
    if isinstance(value, str):
        return value
    return bytes(value).decode("utf-8") if isinstance(value, bytes) else str(value)


def _files(data: DataConfig) -> Source:
    from moejax.data.file_source import FileDocuments

    found = FileDocuments(data)
    return Source("files", found.identity, found.documents)


def _synthetic(data: DataConfig) -> Source:
    def documents(split: str) -> Iterator[Document]:
        texts = enumerate(synthetic_documents(split))
        return (Document(text, f"{split} {index}") for index, text in texts)

    return Source("synthetic", f"synthetic-{SYNTHETIC_VERSION}", documents)
