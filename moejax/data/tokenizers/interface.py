"""What a tokenizer is to the rest of the code, and what several of them share."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moejax.config import ConfigError
from moejax.paths import replace_file

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
"""The special ids of tokenizers that are made here; those of released models have their own."""

SPECIAL_PIECES = ("<pad>", "<bos>", "<eos>")

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"

SPACE_MARK = "\u2581"  # what sentencepiece, and every table here, writes for a space

UNREADABLE = b"\xff"
"""The byte of an id without a meaning, never part of valid UTF-8: it decodes to U+FFFD."""


@runtime_checkable
class Tokenizer(Protocol):
    """What all tokenizers offer.

    Attributes:
      kind: "bytes", "bpe", for those of released models "tokenizers" or "sentencepiece", and "ids"
        for a model that came without one.
      vocab_size: number of ids: one more than the largest.
      pad_id: id of padding.
      bos_id: id that begins a document.
      eos_id: id that ends a document.
      end_ids: ids after which nothing more is generated.
      adds_bos: whether a prompt begins with `bos_id`.
      fingerprint: identifies the mapping from text to ids; equal fingerprints, equal ids.
    """

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    adds_bos: bool
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, and never raises.

        Special ids are skipped; bytes that are no valid UTF-8 become U+FFFD. Of text that goes on
        from other ids, `TextStream` gives what these ids add.
        """

    def piece(self, id: int) -> str:
        """Returns one token in readable form, for tables.

        A space is U+2581, and a byte that is no character has the form `<0xE2>`.
        """

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer` reads into `directory`, and creates it first."""


def check_rows(tokenizer: Tokenizer, num_rows: int, shown: str) -> None:
    """Raises `ConfigError` if a tokenizer has more ids than an embedding has rows.

    Args:
      tokenizer: of any kind.
      num_rows: of the embedding, `model.vocab_size`.
      shown: what to call the tokenizer, such as `data.tokenizer=FILE`.
    """
    if tokenizer.vocab_size > num_rows:
        raise ConfigError(
            f"{shown} has {tokenizer.vocab_size} ids, and the embedding only {num_rows} rows "
            "(model.vocab_size); take the tokenizer of the same model, or more rows"
        )


BYTE_NAMES = {" ": SPACE_MARK, "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def byte_piece(value: int) -> str:
    """Returns a readable form of one byte."""
    character = chr(value)
    if character in BYTE_NAMES:
        return BYTE_NAMES[character]
    is_printable = 32 < value < 127
    return character if is_printable else f"<0x{value:02X}>"


def readable_bytes(value: bytes) -> str:
    """Returns a readable form of the bytes of a token: its text, or each byte by itself."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in value)
    return "".join(BYTE_NAMES.get(character, character) for character in text)


def decode_table(table: Sequence[bytes], ids: Iterable[int]) -> str:
    """Joins the bytes of each id and decodes them; ids outside the table are unreadable."""
    parts = [table[i] if 0 <= i < len(table) else UNREADABLE for i in ids]
    return b"".join(parts).decode("utf-8", errors="replace")


def save_files(
    directory: str | Path, description: dict[str, Any], model: bytes | None = None
) -> None:
    """Writes what `load_tokenizer` reads: a description, and the file it describes if any."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        model_path = folder / MODEL_FILE
        replace_file(model_path, model)
    # The description is written last: where it exists, everything does.
    text = json.dumps(description, indent=2)
    content = f"{text}\n".encode()
    replace_file(folder / DESCRIPTION_FILE, content)
