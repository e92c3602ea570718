"""The leaves of the text, its tokenizer and its rows."""

import dataclasses
from typing import Literal

from moejax.config.errors import require
from moejax.config.schema.leaf import leaf, names_file
from moejax.config.schema.needs import value

BYTE_VOCAB_SIZE = 259
"""The 256 byte values and the ids of padding, begin of document and end of document."""

FILE_SOURCE_NAMES = (
    "text",
    "txt",
    "local",
    "file",
    "folder",
    "json",
    "jsonl",
    "parquet",
    "own",
)
"""What people write as the source of their own text."""

SOURCE_ALIASES = dict.fromkeys(FILE_SOURCE_NAMES, "files")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and rows."""

    source: Literal["speeches", "domains", "tfds", "files", "synthetic"] = leaf(
        "speeches", "where the text comes from", aliases=SOURCE_ALIASES
    )
    name: str = leaf(
        "",
        "name (or name/config) of a dataset prepared as ArrayRecord with a `text` feature",
        needs=value("data.source", "tfds"),
    )
    source_dir: str = leaf("", "the data_dir of that dataset", needs=value("data.source", "tfds"))
    files: str = leaf(
        "",
        "a file, a folder, a glob, or several separated by commas: docs/your_data.md",
        needs=value("data.source", "files"),
    )
    text_field: str = leaf(
        "text",
        "the field of JSON lines and Parquet that holds a document's text",
        needs=value("data.source", "files"),
    )
    directory: str = leaf("data", "where prepared rows are cached")
    tokenizer: str = leaf(
        "bpe",
        "tokens are bytes, pieces that are learned from the text, or those of a released model's "
        "tokenizer.json or tokenizer.model",
        choices=("bytes", "bpe"),
        or_file=True,
    )
    vocab_size: int = leaf(
        4096,
        "pieces of the tokenizer",
        at_least=512,
        at_most=65_536,
        needs=value("data.tokenizer", "bpe"),
    )
    seq_len: int = leaf(256, "tokens of a row", at_least=1)

    @property
    def has_tokenizer_file(self) -> bool:
        """Whether the tokenizer is a file."""
        return names_file(self.tokenizer)


def validate_data(data: DataConfig) -> None:
    """Raises `ConfigError` where the chosen source lacks what it needs."""
    if data.source == "tfds":
        require(
            bool(data.name and data.source_dir),
            "data.source=tfds needs data.name and data.source_dir",
        )
    if data.source == "files":
        require(
            bool(data.files),
            "data.source=files needs data.files, such as a folder or a glob 'texts/*.txt'",
        )
        require(
            bool(data.text_field),
            "data.text_field='' must name the field of records that holds their text",
        )
