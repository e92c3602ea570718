"""Where documents come from: one small interface over an installed corpus, a prepared dataset, files, or a grammar.

A source yields the documents of `train` and `validation` in a fixed order and knows a digest of
everything that determines them. No document is in both splits.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.config import ConfigError, DataConfig
from moejax.data.errors import DataError
from moejax.data.sources.document import Document
from moejax.data.sources.synthetic import SYNTHETIC_VERSION, synthetic_documents
from moejax.data.storage.atomic import complete_folder
from moejax.data.storage.manifest import check_sizes, file_sizes, read_manifest, write_manifest
from moejax.paths import resolve_path

if TYPE_CHECKING:
    from moejax.data.storage.records import Examples

SPLITS = ("train", "validation")
DOCUMENTS_VERSION = 2  # raise it when what is stored of the documents of our own builders changes


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
    openers = {
        "speeches": _speeches,
        "domains": _domains,
        "tfds": _tfds,
        "files": _files,
        "synthetic": _synthetic,
    }
    return openers[data.source](data)


def data_directory(data: DataConfig) -> Path:
    """The folder of prepared rows, documents and tokenizers.

    Raises:
      ConfigError, PathError: it is no folder of this machine.
    """
    if "://" in data.directory:
        raise ConfigError(
            f"data.directory={data.directory!r} is an address; name a folder of a file system"
        )
    resolve_path(
        data.directory, "data.directory"
    )  # refuses what is no path, such as the home of nobody
    return Path(data.directory).expanduser()


def _speeches(data: DataConfig) -> Source:
    from moejax.data.sources import speeches

    return _built(data, speeches.Speeches, speeches.identity(), speeches.features)


def _domains(data: DataConfig) -> Source:
    from moejax.data.sources import domains

    archives = data_directory(data) / "archives"
    return _built(data, domains.Domains, domains.identity(), domains.features, archives=archives)


def _built(
    data: DataConfig, builder: Any, identity: str, features: Callable[[], Any], **arguments: Any
) -> Source:
    """The documents of one of our own builders, which is run once."""
    key = hashlib.sha256(f"{DOCUMENTS_VERSION} {identity}".encode()).hexdigest()[:12]
    folder = data_directory(data) / "documents" / f"{builder.name}-{key}"
    remedy = f"remove the folder {folder} and run the command again: it is prepared anew"

    def write(temporary: Path) -> None:
        from moejax.data.storage import records

        records.run_builder(builder(data_dir=str(temporary), **arguments), temporary)
        files = {
            name: size for name, size in file_sizes(temporary).items() if ".array_record-" in name
        }
        write_manifest(temporary, {"files": files})

    def documents(split: str) -> Iterator[Document]:
        from moejax.data.storage import records

        if not folder.exists():
            complete_folder(folder, write)
        try:
            files = read_manifest(folder)["files"]
            check_sizes(folder, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{records.first_line(error)}; {remedy}") from error
        paths = [
            folder / name
            for name in sorted(files)
            if Path(name).name.startswith(f"{builder.name}-{split}.")
        ]
        return _read_documents(records.Examples(paths, features(), f"{folder}: {split}", remedy))

    return Source(builder.name, identity, documents)


def _tfds(data: DataConfig) -> Source:
    from moejax.data.sources import foreign_dataset

    dataset = foreign_dataset.open_dataset(data.name, data.source_dir)

    def documents(split: str) -> Iterator[Document]:
        if "validation" in dataset.splits:
            return _read_documents(dataset.examples(split))
        # Every twentieth document, from the first: wherever the dataset is sorted, both splits see
        # all of it.
        return _read_documents(
            dataset.examples("train"), lambda i: (i % 20 == 0) == (split == "validation")
        )

    return Source(data.name.replace("/", "-").replace(":", "-"), dataset.identity, documents)


def _read_documents(
    examples: "Examples", keep: Callable[[int], bool] = lambda index: True
) -> Iterator[Document]:
    """The examples whose index is kept: `text`, and `name` and `domain` if they have them."""
    known = [name for name in Document._fields if name in examples.features]
    for index in filter(keep, range(len(examples))):
        example = examples[index]
        try:
            document = Document(
                **{name: _as_text(example[name], examples.features[name]) for name in known}
            )
        except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError among them
            raise examples.error(f"document {index} cannot be read", error) from error
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
    from moejax.data.sources.file_source import FileDocuments

    found = FileDocuments(data)
    return Source("files", found.identity, found.documents)


def _synthetic(data: DataConfig) -> Source:
    def documents(split: str) -> Iterator[Document]:
        texts = enumerate(synthetic_documents(split))
        return (Document(text, f"{split} {index}") for index, text in texts)

    return Source("synthetic", f"synthetic-{SYNTHETIC_VERSION}", documents)
