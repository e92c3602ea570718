"""Text to token ids and back, exactly: raw bytes, or byte-pair encoding (BPE).

BPE is learnt from the training split. Both tokenizers are lossless: `decode(encode(text)) == text`
for every string, whatever its whitespace, because no text is normalised and a character outside the
vocabulary is written as its UTF-8 bytes. Ids 0, 1 and 2 are padding, begin of document and end of
document in both; `encode` never produces them.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from moejax.config import BYTE_VOCAB_SIZE, ConfigError
from moejax.data.errors import DataError
from moejax.data.storage.regular_files import read_regular
from moejax.paths import replace_file

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_PIECES = ("<pad>", "<bos>", "<eos>")

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"

SPACE_MARK = "\u2581"  # what sentencepiece, and every table here, writes for a space

UNREADABLE = b"\xff"
"""The byte of an id without a meaning, never part of valid UTF-8: it decodes to U+FFFD."""

TRAINING_BYTES = 64_000_000
"""Text that the BPE is learnt from; more would change the pieces little, and cost memory."""

MAX_LINE = 4096  # characters: sentencepiece refuses unbroken words of 65,536


@runtime_checkable
class Tokenizer(Protocol):
    """What both tokenizers offer.

    Attributes:
      kind: "bytes" or "bpe".
      vocab_size: number of ids.
      pad_id: id of padding, 0.
      bos_id: id that begins a document.
      eos_id: id that ends a document.
      fingerprint: identifies the mapping from text to ids; equal fingerprints, equal ids.
    """

    kind: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`, and never raises.

        Special ids are skipped; bytes that are no valid UTF-8 become U+FFFD.
        """

    def piece(self, id: int) -> str:
        """Returns one token in readable form, for tables.

        A space is U+2581, and a byte that is no character has the form `<0xE2>`.
        """

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer` reads into `directory`, and creates it first."""


BYTE_NAMES = {" ": SPACE_MARK, "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _byte_piece(value: int) -> str:
    """Returns a readable form of one byte."""
    character = chr(value)
    if character in BYTE_NAMES:
        return BYTE_NAMES[character]
    is_printable = 32 < value < 127
    return character if is_printable else f"<0x{value:02X}>"


def _decode(table: Sequence[bytes], ids: Iterable[int]) -> str:
    """Joins the bytes of each id and decodes them; ids outside the table are unreadable."""
    parts = [table[i] if 0 <= i < len(table) else UNREADABLE for i in ids]
    return b"".join(parts).decode("utf-8", errors="replace")


def _save(directory: str | Path, description: dict, model: bytes | None = None) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        model_path = folder / MODEL_FILE
        replace_file(model_path, model)
    # The description is written last: where it exists, everything does.
    text = json.dumps(description, indent=2)
    content = f"{text}\n".encode()
    replace_file(folder / DESCRIPTION_FILE, content)


class ByteTokenizer:
    """One id per UTF-8 byte: byte b is id b + 3. Needs no training and has no unknown text."""

    kind = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    pad_id, bos_id, eos_id = PAD_ID, BOS_ID, EOS_ID
    fingerprint = "bytes-1"

    _table = (b"", b"", b"", *(bytes([b]) for b in range(256)))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        values = np.frombuffer(text.encode("utf-8"), np.uint8)
        ids = values.astype(np.int32) + len(SPECIAL_PIECES)
        return ids.tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decode(self._table, ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if not 0 <= id < self.vocab_size:
            return f"<{id}>"
        if id < len(SPECIAL_PIECES):
            return SPECIAL_PIECES[id]
        return _byte_piece(id - len(SPECIAL_PIECES))

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        _save(directory, {"kind": self.kind, "vocab_size": self.vocab_size})


class SentencePieceTokenizer:
    """BPE with byte fallback, held as a serialized sentencepiece model.

    sentencepiece writes a space as U+2581 and so cannot tell it from a real U+2581; here that
    character is written as its three bytes, and decoding joins the bytes of each piece itself,
    which makes the round trip exact.
    """

    kind = "bpe"
    pad_id, bos_id, eos_id = PAD_ID, BOS_ID, EOS_ID

    def __init__(self, model: bytes):
        """Loads a serialized model such as `train_sentencepiece` makes.

        Raises:
          RuntimeError, ValueError: it is no such model.
        """
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        digest = hashlib.sha256(model).hexdigest()
        self._processor = processor
        self._model = model
        self.vocab_size = processor.vocab_size()
        self.fingerprint = f"bpe-{digest}"
        ids = list(range(self.vocab_size))
        self._pieces = processor.id_to_piece(ids)
        self._byte_of: dict[int, int] = {}
        for i, piece in enumerate(self._pieces):
            if processor.is_byte(i):  # the piece is written as "<0xE2>"
                self._byte_of[i] = int(piece[3:5], 16)
        special_pieces = tuple(self._pieces[: len(SPECIAL_PIECES)])
        if special_pieces != SPECIAL_PIECES or len(self._byte_of) != 256:
            raise ValueError(
                "it must have byte fallback, and ids 0, 1, 2 for padding, begin and end of document"
            )
        self._id_of_byte = {byte: i for i, byte in self._byte_of.items()}
        self._table = [self._bytes_of(i) for i in ids]

    def _bytes_of(self, id: int) -> bytes:
        """Returns the bytes of the text that an id stands for."""
        if id in self._byte_of:
            return bytes([self._byte_of[id]])
        if self._processor.is_control(id):
            return b""
        if self._processor.is_unknown(id):
            return UNREADABLE
        return self._pieces[id].replace(SPACE_MARK, " ").encode("utf-8")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        mark_bytes = SPACE_MARK.encode("utf-8")
        mark_ids = [self._id_of_byte[byte] for byte in mark_bytes]
        first, *others = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += mark_ids
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decode(self._table, ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if not 0 <= id < self.vocab_size:
            return f"<{id}>"
        if id in self._byte_of:
            return _byte_piece(self._byte_of[id])
        return self._pieces[id]

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        description = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": hashlib.sha256(self._model).hexdigest(),
        }
        _save(directory, description, self._model)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Learns BPE pieces from `texts`, as a deterministic function of the text and the size.

    Args:
      texts: documents; those after the first `TRAINING_BYTES` bytes are not read.
      vocab_size: number of ids, with the special ids and the 256 bytes among them.

    Returns:
      The tokenizer. Each line is one sentence, nothing is normalised, and digits stand alone.

    Raises:
      ConfigError: the text has too few distinct pieces or too many distinct characters for
        `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    # Collected first: an exception inside an iterator that sentencepiece reads would come out as a
    # RuntimeError.
    lines = list(_training_lines(texts))
    if not lines:
        raise ConfigError(
            "data.tokenizer=bpe cannot be learnt: the training split has no text; use "
            "data.tokenizer=bytes"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # else each space of an indentation is a token
            character_coverage=0.9995,  # rarer characters are written as bytes
            max_sentence_length=4 * MAX_LINE,  # bytes; longer lines would be skipped
            num_threads=1,
            pad_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            unk_id=len(SPECIAL_PIECES),  # must exist; byte fallback never uses it
            pad_piece=SPECIAL_PIECES[PAD_ID],
            bos_piece=SPECIAL_PIECES[BOS_ID],
            eos_piece=SPECIAL_PIECES[EOS_ID],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _size_error(str(error), vocab_size) from error
    return SentencePieceTokenizer(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines of at most `MAX_LINE` characters, and up to `TRAINING_BYTES` bytes in total."""
    remaining = TRAINING_BYTES
    for text in texts:
        for line in _short_lines(text):
            remaining -= len(line.encode("utf-8"))
            if remaining < 0:
                return
            yield line


def _short_lines(text: str) -> Iterator[str]:
    """Yields the lines of a text that are not empty, long ones in parts."""
    # sentencepiece skips lines with a null character, so these end the line.
    for line in text.replace("\0", "\n").split("\n"):
        for start in range(0, len(line), MAX_LINE):
            yield line[start : start + MAX_LINE]


def _size_error(message: str, vocab_size: int) -> ConfigError:
    """Returns sentencepiece's message about the vocabulary size as a `ConfigError`."""
    if largest := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"data.vocab_size={vocab_size} is too large for the training text; the largest value "
            f"that works is {largest[1]}, or use data.tokenizer=bytes"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"data.vocab_size={vocab_size} is too small for the characters of the training text; "
            f"use more than {smallest[1]}, or data.tokenizer=bytes"
        )
    return ConfigError(
        f"data.vocab_size={vocab_size}: sentencepiece cannot learn from the training text: "
        f"{message}"
    )


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save` wrote.

    Raises:
      DataError: a file is missing or corrupt.
    """
    path = Path(directory) / DESCRIPTION_FILE
    try:
        description = json.loads(_read(path))
        kind = description["kind"]
        vocab_size = description["vocab_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _load_error(path, "is corrupt") from error
    if kind == ByteTokenizer.kind and vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    if kind != SentencePieceTokenizer.kind:
        raise _load_error(
            path, f"has kind={kind!r} and vocab_size={vocab_size}, which do not exist"
        )
    tokenizer = _load_model(Path(directory) / MODEL_FILE, description.get("sha256"))
    if vocab_size != tokenizer.vocab_size:
        raise _load_error(path, f"has vocab_size={vocab_size} for {tokenizer.vocab_size} pieces")
    return tokenizer


def _load_model(path: Path, sha256: str | None) -> SentencePieceTokenizer:
    model = _read(path)
    if hashlib.sha256(model).hexdigest() != sha256:
        raise _load_error(path, f"is corrupt: it is not the file that {DESCRIPTION_FILE} describes")
    try:
        return SentencePieceTokenizer(model)
    except (RuntimeError, ValueError) as error:
        raise _load_error(path, f"is no model this version reads: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise _load_error(path, f"cannot be read: {error.strerror}") from error


def _load_error(path: Path, problem: str) -> DataError:
    """Returns the error for a tokenizer of a run, or of prepared data, that cannot be read."""
    folder = path.parent
    remedy = f"restore it from a copy, or remove the folder {folder} so that it is made again"
    if (folder / "config.json").exists():
        remedy = "restore it from a copy: the run's weights fit no other tokenizer"
    return DataError(f"{path} {problem}; {remedy}")
