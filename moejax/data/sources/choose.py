"""Where documents come from: one small interface for all kinds of sources.

A source is an installed corpus, a prepared dataset, the user's files, or a grammar. It yields
the documents of `train` and `validation` in a fixed order and has a digest of everything that
determines them. No document is in both splits.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.config import ConfigError, DataConfig
from moejax.data.errors import DataError, first_line, prepare_again
from moejax.data.sources.document import Document
from moejax.data.sources.synthetic import SYNTHETIC_VERSION, synthetic_documents
from moejax.data.storage.atomic import complete_folder
from moejax.data.storage.manifest import check_sizes, file_sizes, read_manifest, write_manifest
from moejax.paths import resolve_path

if TYPE_CHECKING:
    from moejax.data.storage.records import Examples

SPLITS = ("train", "validation")
DOCUMENTS_VERSION = 2  # raise it when what our own builders store of documents changes


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
    """Returns the source that `data.source` names.

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
    """Returns the folder of prepared rows, documents and tokenizers.

    Raises:
      ConfigError, PathError: it is no folder of this machine.
    """
    if "://" in data.directory:
        raise ConfigError(
            f"data.directory={data.directory!r} is an address; name a folder of a file system"
        )
    resolve_path(data.directory, "data.directory")  # only to refuse what is no path
    return Path(data.directory).expanduser()


def _speeches(data: DataConfig) -> Source:
    from moejax.data.sources import speeches

    return _built(data, speeches.Speeches, speeches.identity(), speeches.features)


def _domains(data: DataConfig) -> Source:
    from moejax.data.sources import domains

    archives = data_directory(data) / "archives"
    return _built(data, domains.Domains, domains.identity(), domains.features, archives=archives)


def _built(
    data: DataConfig,
    builder: Any,
    identity: str,
    features: Callable[[], Any],
    **arguments: Any,
) -> Source:
    """Returns the documents of one of our own builders, which is run once."""
    determines = f"{DOCUMENTS_VERSION} {identity}"
    digest = hashlib.sha256(determines.encode()).hexdigest()
    folder = data_directory(data) / "documents" / f"{builder.name}-{digest[:12]}"
    remedy = prepare_again(folder)

    def write(temporary: Path) -> None:
        from moejax.data.storage import records

        made = builder(data_dir=str(temporary), **arguments)
        records.run_builder(made, temporary)
        sizes = file_sizes(temporary)
        of_records = {name: size for name, size in sizes.items() if ".array_record-" in name}
        write_manifest(temporary, {"files": of_records})

    def documents(split: str) -> Iterator[Document]:
        from moejax.data.storage import records

        if not folder.exists():
            complete_folder(folder, write)
        try:
            manifest = read_manifest(folder)
            files = manifest["files"]
            check_sizes(folder, files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{first_line(error)}; {remedy}") from error
        prefix = f"{builder.name}-{split}."
        paths = [folder / name for name in sorted(files)]
        paths_of_split = [path for path in paths if path.name.startswith(prefix)]
        where = f"{folder}: {split}"
        examples = records.Examples(paths_of_split, features(), where, remedy)
        return _read_documents(examples)

    return Source(builder.name, identity, documents)


def _tfds(data: DataConfig) -> Source:
    from moejax.data.sources import foreign_dataset

    dataset = foreign_dataset.open_dataset(data.name, data.source_dir)

    def documents(split: str) -> Iterator[Document]:
        if "validation" in dataset.splits:
            return _read_documents(dataset.examples(split))
        is_validation = split == "validation"
        # Every twentieth document is held out, from the first, so that both splits see all of a
        # sorted dataset.
        return _read_documents(
            dataset.examples("train"), lambda index: (index % 20 == 0) == is_validation
        )

    name = data.name.replace("/", "-").replace(":", "-")
    return Source(name, dataset.identity, documents)


def _read_documents(
    examples: "Examples",
    keep: Callable[[int], bool] = lambda index: True,
) -> Iterator[Document]:
    """Yields the examples whose index is kept: `text`, and `name` and `domain` if there are any."""
    for index in filter(keep, range(len(examples))):
        example = examples[index]
        try:
            document = _to_document(example, examples.features)
        except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError is a ValueError
            raise examples.error(f"document {index} cannot be read", error) from error
        yield document


def _to_document(example: dict[str, Any], features: Any) -> Document:
    known = [name for name in Document._fields if name in features]
    texts = {name: _as_text(example[name], features[name]) for name in known}
    return Document(**texts)


def _as_text(value: Any, feature: Any) -> str:
    """Returns a feature as text: a label by its name, and a number, such as an id, in digits."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.ClassLabel):
        return feature.int2str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return str(value)


def _files(data: DataConfig) -> Source:
    from moejax.data.sources.file_source import FileDocuments

    found = FileDocuments(data)
    return Source("files", found.identity, found.documents)


def _synthetic(data: DataConfig) -> Source:
    def documents(split: str) -> Iterator[Document]:
        for index, text in enumerate(synthetic_documents(split)):
            name = f"{split} {index}"
            yield Document(text, name)

    identity = f"synthetic-{SYNTHETIC_VERSION}"
    return Source("synthetic", identity, documents)
