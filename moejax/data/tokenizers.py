"""Text to token ids and back, exactly: raw bytes, or byte-pair encoding (BPE) learnt from the training split.

Both tokenizers are lossless: `decode(encode(text)) == text` for every string, whatever its
whitespace, because no text is normalised and a character outside the vocabulary is written as its
UTF-8 bytes. Ids 0, 1 and 2 are padding, begin of document and end of document in both; `encode`
never produces them.
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

SPACE_MARK = "\u2581"  # what sentencepiece, and every table here, writes for a space
UNREADABLE = b"\xff"  # never part of valid UTF-8: an id without a meaning decodes to the replacement character

TRAINING_BYTES = (
    64_000_000  # text that the BPE is learnt from; more changes the pieces little and costs memory
)
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
        """The ids of `text`, without special ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Special ids are skipped; what is no valid UTF-8 becomes U+FFFD. Never raises."""

    def piece(self, id: int) -> str:
        """One token in readable form, for tables: a space as U+2581, a byte that is no character as `<0xE2>`."""

    def save(self, directory: str | Path) -> None:
        """Writes the files that `load_tokenizer` reads into `directory`, which is created if absent."""


def _byte_piece(value: int) -> str:
    """A readable form of one byte."""
    names = {ord(" "): SPACE_MARK, ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
    return names.get(value) or (chr(value) if 32 < value < 127 else f"<0x{value:02X}>")


def _decode(table: Sequence[bytes], ids: Iterable[int]) -> str:
    """Joins the bytes of each id and decodes them; ids outside the table are unreadable."""
    parts = (table[i] if 0 <= i < len(table) else UNREADABLE for i in ids)
    return b"".join(parts).decode("utf-8", errors="replace")


def _save(directory: str | Path, description: dict, model: bytes | None = None) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if model is not None:
        replace_file(folder / "tokenizer.model", model)
    replace_file(
        folder / "tokenizer.json", (json.dumps(description, indent=2) + "\n").encode()
    )  # last: it is looked for


class ByteTokenizer:
    """One id per UTF-8 byte: byte b is id b + 3. Needs no training and has no unknown text."""

    kind = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    pad_id, bos_id, eos_id = PAD_ID, BOS_ID, EOS_ID
    fingerprint = "bytes-1"

    _table = (b"", b"", b"", *(bytes([b]) for b in range(256)))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return (
            np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(SPECIAL_PIECES)
        ).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decode(self._table, ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if not 0 <= id < self.vocab_size:
            return f"<{id}>"
        return (
            SPECIAL_PIECES[id]
            if id < len(SPECIAL_PIECES)
            else _byte_piece(id - len(SPECIAL_PIECES))
        )

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
        """Loads a serialized model such as `train_sentencepiece` makes; `RuntimeError` or `ValueError` for others."""
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model = model
        self.vocab_size = self._processor.vocab_size()
        self.fingerprint = f"bpe-{hashlib.sha256(model).hexdigest()}"
        ids = list(range(self.vocab_size))
        self._pieces = self._processor.id_to_piece(ids)
        self._byte_of = {
            i: int(self._pieces[i][3:5], 16) for i in ids if self._processor.is_byte(i)
        }
        if (
            tuple(self._pieces[: len(SPECIAL_PIECES)]) != SPECIAL_PIECES
            or len(self._byte_of) != 256
        ):
            raise ValueError(
                "it must have byte fallback, and ids 0, 1, 2 for padding, begin and end of document"
            )
        self._id_of_byte = {byte: i for i, byte in self._byte_of.items()}
        self._table = [self._bytes_of(i) for i in ids]

    def _bytes_of(self, id: int) -> bytes:
        if id in self._byte_of:
            return bytes([self._byte_of[id]])
        if self._processor.is_control(id):
            return b""
        if self._processor.is_unknown(id):
            return UNREADABLE
        return self._pieces[id].replace(SPACE_MARK, " ").encode("utf-8")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        first, *rest = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in rest:
            ids += [self._id_of_byte[b] for b in SPACE_MARK.encode("utf-8")]
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return _decode(self._table, ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if not 0 <= id < self.vocab_size:
            return f"<{id}>"
        return _byte_piece(self._byte_of[id]) if id in self._byte_of else self._pieces[id]

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        _save(
            directory,
            {
                "kind": self.kind,
                "vocab_size": self.vocab_size,
                "sha256": hashlib.sha256(self._model).hexdigest(),
            },
            self._model,
        )


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """Learns BPE pieces from `texts`: a deterministic function of the text and the size.

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
            "data.tokenizer=bpe cannot be learnt: the training split has no text; use data.tokenizer=bytes"
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
    """Lines that are not empty, at most `MAX_LINE` characters each, up to `TRAINING_BYTES` bytes."""
    remaining = TRAINING_BYTES
    for text in texts:
        for line in text.replace("\0", "\n").split(
            "\n"
        ):  # sentencepiece skips lines with a null character
            for start in range(0, len(line), MAX_LINE):
                part = line[start : start + MAX_LINE]
                remaining -= len(part.encode("utf-8"))
                if remaining < 0:
                    return
                yield part


def _size_error(message: str, vocab_size: int) -> ConfigError:
    """What sentencepiece says about the vocabulary size, as a `ConfigError`."""
    if largest := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"data.vocab_size={vocab_size} is too large for the training text; the largest value that works is "
            f"{largest[1]}, or use data.tokenizer=bytes"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"data.vocab_size={vocab_size} is too small for the characters of the training text; use more than "
            f"{smallest[1]}, or data.tokenizer=bytes"
        )
    return ConfigError(
        f"data.vocab_size={vocab_size}: sentencepiece cannot learn from the training text: {message}"
    )


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote.

    Raises:
      DataError: a file is missing or corrupt.
    """
    folder = Path(directory)
    try:
        description = json.loads(_read(folder / "tokenizer.json"))
        kind, vocab_size = description["kind"], description["vocab_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _load_error(folder / "tokenizer.json", "is corrupt") from error
    if kind == ByteTokenizer.kind and vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    if kind != SentencePieceTokenizer.kind:
        raise _load_error(
            folder / "tokenizer.json",
            f"has kind={kind!r} and vocab_size={vocab_size}, which do not exist",
        )
    model = _read(folder / "tokenizer.model")
    if hashlib.sha256(model).hexdigest() != description.get("sha256"):
        raise _load_error(
            folder / "tokenizer.model",
            "is corrupt: it is not the file that tokenizer.json describes",
        )
    try:
        tokenizer = SentencePieceTokenizer(model)
    except (RuntimeError, ValueError) as error:
        raise _load_error(
            folder / "tokenizer.model", f"is no model this version reads: {error}"
        ) from error
    if vocab_size != tokenizer.vocab_size:
        raise _load_error(
            folder / "tokenizer.json",
            f"has vocab_size={vocab_size} for {tokenizer.vocab_size} pieces",
        )
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise _load_error(path, f"cannot be read: {error.strerror}") from error


def _load_error(path: Path, problem: str) -> DataError:
    if (path.parent / "config.json").exists():
        return DataError(
            f"{path} {problem}; restore it from a copy: the run's weights fit no other tokenizer"
        )
    return DataError(
        f"{path} {problem}; restore it from a copy, or remove the folder {path.parent} so that it is made anew"
    )
