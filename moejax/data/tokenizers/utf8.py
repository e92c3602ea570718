"""The tokenizer of raw bytes."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moejax.config import BYTE_VOCAB_SIZE
from moejax.data.tokenizers.interface import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL_PIECES,
    byte_piece,
    decode_table,
    save_files,
)


class ByteTokenizer:
    """One id per UTF-8 byte: byte b is id b + 3. Needs no training and has no unknown text."""

    kind = "bytes"
    vocab_size = BYTE_VOCAB_SIZE
    pad_id, bos_id, eos_id = PAD_ID, BOS_ID, EOS_ID
    end_ids: tuple[int, ...] = (EOS_ID,)
    adds_bos = True
    fingerprint = "bytes-1"

    _table = (b"", b"", b"", *(bytes([b]) for b in range(256)))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        values = np.frombuffer(text.encode("utf-8"), np.uint8)
        ids = values.astype(np.int32) + len(SPECIAL_PIECES)
        return ids.tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return decode_table(self._table, ids)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if not 0 <= id < self.vocab_size:
            return f"<{id}>"
        if id < len(SPECIAL_PIECES):
            return SPECIAL_PIECES[id]
        return byte_piece(id - len(SPECIAL_PIECES))

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer.save`."""
        save_files(directory, {"kind": self.kind, "vocab_size": self.vocab_size})
