"""A `tokenizer.json` of a released model, read by the library that defines it."""

import copy
import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moejax.data.errors import first_line
from moejax.data.tokenizers.beside import Beside
from moejax.data.tokenizers.interface import readable_bytes
from moejax.data.tokenizers.released import ReleasedTokenizer, Special, find_special

if TYPE_CHECKING:
    import tokenizers


class JsonTokenizer(ReleasedTokenizer):
    """Any tokenizer that a `tokenizer.json` can describe.

    Text is never taken for special tokens, whatever it looks like, but by `encode_markup`.
    """

    kind = "tokenizers"

    def __init__(self, content: bytes, special: Special):
        """Reads the content of a `tokenizer.json`.

        Raises:
          ValueError: it is none, or has other tokens than the files beside it say.
        """
        super().__init__(content, special)
        self._library = read_library(content)
        self._library.encode_special_tokens = True  # as text
        ids = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values(), default=-1)
        self.check_ids()
        for token in special.added:
            if ids.get(token.text) != token.id:
                raise ValueError(f"{token.text!r} is not its token {token.id}")
        self._added = self._library.get_added_tokens_decoder()
        self._controls = {self.bos_id, self.eos_id, self.pad_id}
        self._is_byte_level = "ByteLevel" in _decoder_types(content)

    @classmethod
    def from_file(cls, content: bytes, beside: Beside) -> "JsonTokenizer":
        """Returns the tokenizer of a file and the files beside it.

        Raises:
          DataError: those files do not fit.
          ValueError: the content is no `tokenizer.json`.
        """
        library = read_library(content)
        added_ids = library.encode("", add_special_tokens=True).ids
        first = added_ids[0] if added_ids else None
        special = find_special(beside, library.token_to_id, {}, adds_bos=True)
        if beside.adds_bos is None and first != special.bos_id:
            special = _without_bos(special)
        return cls(content, special)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_markup(self, text: str) -> list[int]:
        """See `ReleasedTokenizer.encode_markup`."""
        return self._markup_library.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _markup_library(self) -> "tokenizers.Tokenizer":
        return read_library(self._content)

    def decode(self, ids: Iterable[int]) -> str:
        """See `ReleasedTokenizer.decode`."""
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self._controls]
        return self._library.decode(known, skip_special_tokens=True)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        token = self._library.id_to_token(id) if 0 <= id < self.vocab_size else None
        if not token:
            return f"<{id}>"
        if self._is_byte_level and id not in self._added:
            table = _bytes_of_characters()
            if set(token) <= table.keys():
                return readable_bytes(bytes(table[character] for character in token))
        return readable_bytes(token.encode("utf-8", errors="replace"))


def read_library(content: bytes) -> "tokenizers.Tokenizer":
    """Returns the library's tokenizer; texts are neither cut nor padded.

    Raises:
      ValueError: the content is no `tokenizer.json`.
    """
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # the library raises no narrower type
        raise ValueError(first_line(error)) from error
    library.no_truncation()
    library.no_padding()
    return library


def _without_bos(special: Special) -> Special:
    """Returns the same ids for a tokenizer that puts nothing before a text."""
    values = copy.copy(vars(special))
    return Special(**{**values, "adds_bos": False})


def _decoder_types(content: bytes) -> set[str]:
    """Returns the types of the steps by which ids become text."""
    decoder: Any = json.loads(content).get("decoder") or {}
    steps = [decoder, *decoder.get("decoders", [])]
    return {str(step.get("type")) for step in steps}


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    Bytes that are printable characters of Latin-1 stand for themselves, the others for the
    characters from U+0100 on. Source: Radford et al. 2019 (GPT-2), section 2.2 and its code.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
