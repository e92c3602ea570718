"""Byte-pair encoding (BPE) that is learnt from the training split."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from moejax.config import ConfigError
from moejax.data.tokenizers.interface import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPACE_MARK,
    SPECIAL_PIECES,
    UNREADABLE,
    byte_piece,
    decode_table,
    save_files,
)

TRAINING_BYTES = 64_000_000
"""Text that the BPE is learnt from; more would change the pieces little, and cost memory."""

MAX_LINE = 4096  # characters: sentencepiece refuses unbroken words of 65,536


class SentencePieceTokenizer:
    """BPE with byte fallback, held as a serialized sentencepiece model.

    sentencepiece writes a space as U+2581 and so cannot tell it from a real U+2581; here that
    character is written as its three bytes, and decoding joins the bytes of each piece itself,
    which makes the round trip exact.
    """

    kind = "bpe"
    pad_id, bos_id, eos_id = PAD_ID, BOS_ID, EOS_ID
    end_ids: tuple[int, ...] = (EOS_ID,)
    adds_bos = True

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
        return decode_table(self._table, ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if not 0 <= id < self.vocab_size:
            return f"<{id}>"
        if id in self._byte_of:
            return byte_piece(self._byte_of[id])
        return self._pieces[id]

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        description = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "sha256": hashlib.sha256(self._model).hexdigest(),
        }
        save_files(directory, description, self._model)


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
