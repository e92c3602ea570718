"""A sentencepiece model, `tokenizer.model`, of a released model."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from moejax.data.errors import first_line
from moejax.data.tokenizers.beside import AddedToken, Beside
from moejax.data.tokenizers.interface import readable_bytes
from moejax.data.tokenizers.released import ReleasedTokenizer, Special, find_special

NO_SPACE_BEFORE = b"\x1a\x02\x18\x00"
"""A second message `normalizer_spec` with `add_dummy_prefix` false: the last one counts."""


class PieceTokenizer(ReleasedTokenizer):
    """The pieces of a sentencepiece model, and tokens that were added beside them."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, special: Special):
        """Reads a serialized sentencepiece model.

        Raises:
          ValueError: it is none, or an id that was added is one of its own with another text.
        """
        super().__init__(content, special)
        self._pieces = _Pieces(content)
        # In a text with special tokens, only its beginning has a space before it.
        self._inner = self._pieces if special.is_legacy else _Pieces(content + NO_SPACE_BEFORE)
        self._added = {token.id: token for token in special.added}
        for token in special.added:
            if token.id < self._pieces.size and self._pieces.texts[token.id] != token.text:
                raise ValueError(f"{token.text!r} is not its token {token.id}")
        self.vocab_size = max([self._pieces.size, *(id + 1 for id in self._added)])
        self.check_ids()
        controls = [AddedToken(self._pieces.texts[i], i) for i in self._pieces.controls]
        marks = {token.id: token for token in controls} | self._added
        self._marks = _Marks(marks.values())
        self._words = _Marks(token for token in special.added if not token.is_special)
        self._skipped = {self.bos_id, self.eos_id, self.pad_id, *self._pieces.controls}
        self._skipped |= {token.id for token in special.added if token.is_special}

    @classmethod
    def from_file(cls, content: bytes, beside: Beside) -> "PieceTokenizer":
        """Returns the tokenizer of a file and the files beside it.

        Raises:
          DataError: those files do not fit.
          ValueError: the content is no sentencepiece model.
        """
        pieces = _Pieces(content)
        ids = {text: i for i, text in enumerate(pieces.texts)}
        ids |= {token.text: token.id for token in beside.added}
        special = find_special(beside, ids.get, pieces.special_ids, adds_bos=True)
        return cls(content, special)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._encode(text, self._words)

    def encode_markup(self, text: str) -> list[int]:
        """See `ReleasedTokenizer.encode_markup`."""
        return self._encode(text, self._marks)

    def _encode(self, text: str, marks: "_Marks") -> list[int]:
        ids: list[int] = []
        for part in marks.split(text):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            elif part:
                pieces = self._inner if ids else self._pieces
                ids += pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `ReleasedTokenizer.decode`."""
        text = ""
        run: list[int] = []
        pieces = self._pieces
        for i in map(int, ids):
            if 0 <= i < self._pieces.size and i not in self._skipped and i not in self._added:
                run.append(i)
                continue
            if i not in self._added:
                continue
            text += pieces.decode(run)
            run = []
            pieces = self._inner
            if i not in self._skipped:
                text += self._added[i].text
        return text + pieces.decode(run)

    def piece(self, id: int) -> str:
        """See `Tokenizer.piece`."""
        if id in self._added:
            return readable_bytes(self._added[id].text.encode())
        if not 0 <= id < self._pieces.size:
            return f"<{id}>"
        return readable_bytes(self._pieces.texts[id].encode())


class _Pieces:
    """A sentencepiece processor.

    Attributes:
      size: the number of pieces.
      texts: of the pieces.
      controls: ids that stand for no text.
      special_ids: of the model's own tokens, by `bos_token` and others.
    """

    def __init__(self, content: bytes):
        import sentencepiece

        try:
            if not content:
                raise ValueError("it is empty")
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.size: int = self._processor.vocab_size()
            self.texts: list[str] = self._processor.id_to_piece(list(range(self.size)))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"sentencepiece cannot read it: {first_line(error)}") from error
        self.controls = [i for i in range(self.size) if self._processor.is_control(i)]
        ids = {
            "bos_token": self._processor.bos_id(),
            "eos_token": self._processor.eos_id(),
            "pad_token": self._processor.pad_id(),
        }
        self.special_ids = {name: id for name, id in ids.items() if id >= 0}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""


class _Marks:
    """Texts of tokens that are found in a text before it is split into pieces."""

    def __init__(self, tokens: Iterable[AddedToken]):
        self._tokens = {token.text: token for token in tokens if token.text}
        # Of two that begin alike the longer one is found.
        texts = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def split(self, text: str) -> Iterator[str | AddedToken]:
        """Yields the tokens, and the text between them, in order."""
        start = 0
        strips = False
        for match in self._pattern.finditer(text) if self._pattern else ():
            token = self._tokens[match[0]]
            yield _between(text[start : match.start()], strips, token.strips_left)
            yield token
            start, strips = match.end(), token.strips_right
        yield _between(text[start:], strips, False)


def _between(text: str, strips_left: bool, strips_right: bool) -> str:
    """Returns the text between two tokens, without the white space that belongs to them."""
    text = text.lstrip() if strips_left else text
    return text.rstrip() if strips_right else text
