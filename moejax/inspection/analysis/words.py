"""Words and sentences in a stream of tokens, from the pieces of the tokenizer alone.

Everything is decided by a table of the distinct pieces and then by arrays, so half a million tokens
take a fraction of a second. The rules are plain ones, for statistics over many tokens:

- A *word* is a run of tokens that begin with a letter, a mark, a numeral or a raw byte. A token
  goes on with the word of the token before it if it does not begin with a space and that one
  ends in a letter, mark, numeral or byte; or if an apostrophe alone stands between them ("don",
  "'", "t" is one word). Each Chinese or Japanese token is a word of its own, for those scripts
  write no spaces.
- A *sentence* ends after . ! ? … and any closing quotes and brackets, if then a space, a line
  break, a special token or the end of the context follows; after 。！？ and closing quotes and
  brackets, whatever follows; and after a blank line.

Limits: "Mr. Smith" ends a sentence, and one without a full stop before a single line break does
not. Characters that the tokenizer writes as several bytes are seen as parts of words, whatever they
are: with a tokenizer of bytes a dash or a Chinese sentence is a word, and 。 ends nothing. A learnt
piece of a backslash and an n is taken for a line break, which `Tokenizer.piece` writes so.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int, Int64

from moejax.data.tokenizers import SPACE_MARK, SPECIAL_PIECES

KINDS = (
    "special", "newline", "space", "punctuation", "symbol", "numeral", "CJK", "byte", "capitalised", "lower-case",
)  # fmt: skip
"""What a piece is by itself; see `kind_of_piece`."""

IN_WORD = ("numeral", "CJK", "byte", "capitalised", "lower-case")
CJK_NAMES = ("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC")
ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t"}
APOSTROPHES = ("'", "\u2019")
CLOSERS = "\"'\u201d\u2019\u00bb\u203a)]}\u300d\u300f\uff09\u3011"
STOPS, WIDE_STOPS = (".", "!", "?", "\u2026"), ("\u3002", "\uff01", "\uff1f")

_SPECIAL = re.compile(
    "|".join([*map(re.escape, SPECIAL_PIECES), "<unk>", r"<-?\d+>"])
)  # <12>: no id of the tokenizer
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def kind_of_piece(piece: str) -> str:
    """What a piece is, out of context: one of `KINDS`.

    "special" and "byte" by how `Tokenizer.piece` writes them; "newline" if it is only white space
    with a line feed, and "space" if it is other white space. Else by the Unicode category of its
    first character that is no white space: P punctuation, N numeral, L or M a letter, which is
    "CJK" if it is an ideograph or kana, "capitalised" if it is upper or title case, and
    "lower-case" if it is not, so also in scripts without case; all others are a "symbol".
    """
    if _SPECIAL.fullmatch(piece):
        return "special"
    if _BYTE.fullmatch(piece):
        return "byte"
    text = _text(piece)
    if not text.strip():
        return "newline" if "\n" in text else "space"
    return _kind_of_character(text.strip()[0])


def _kind_of_character(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LM":
        if unicodedata.name(character, "").startswith(CJK_NAMES):
            return "CJK"
        return "capitalised" if category in ("Lu", "Lt") else "lower-case"
    return {"P": "punctuation", "N": "numeral"}.get(category[0], "symbol")


def _text(piece: str) -> str:
    """The piece's own characters."""
    return ESCAPES.get(piece, piece).replace(SPACE_MARK, " ")


@dataclasses.dataclass(frozen=True)
class Words:
    """Where words and sentences begin.

    Attributes:
      kind_T: index into `KINDS`.
      is_word_T: the token is of a word.
      starts_word_T: it is a word's first.
      starts_sentence_T: it is a sentence's first.
    """

    kind_T: Int64[np.ndarray, "T"]
    is_word_T: Bool[np.ndarray, "T"]
    starts_word_T: Bool[np.ndarray, "T"]
    starts_sentence_T: Bool[np.ndarray, "T"]

    def position_in_word(self) -> Int64[np.ndarray, "T"]:
        """1 for the first token of a word, and so on; 0 for tokens of no word."""
        seen_T = np.cumsum(self.is_word_T)
        return np.where(self.is_word_T, seen_T - seen_T[_last(self.starts_word_T)] + 1, 0)

    def word_in_sentence(self) -> Int64[np.ndarray, "T"]:
        """1 for tokens of the first word of a sentence, and so on; 0 for tokens of no word."""
        words_T = np.cumsum(self.starts_word_T)
        before_T = (words_T - self.starts_word_T)[_last(self.starts_sentence_T)]
        return np.where(self.is_word_T, words_T - before_T, 0)


def find_words(
    tokens_T: Int[np.ndarray, "T"], starts_T: Bool[np.ndarray, "T"], piece: Callable[[int], str]
) -> Words:
    """Finds words and sentences by the rules at the top of this module.

    Args:
      tokens_T: token ids in reading order.
      starts_T: True where a new context begins: no word or sentence reaches over it.
      piece: from an id to its piece, `Tokenizer.piece`.
    """
    table = _PieceTable.from_tokens(tokens_T, piece)
    starts_T = starts_T | (np.arange(tokens_T.size) == 0)
    starts_word_T = table.is_word & ~_continues(table, starts_T)
    return Words(
        table.kind,
        table.is_word,
        starts_word_T,
        starts_T | _before(_ends_sentence(table, starts_T)),
    )


@dataclasses.dataclass(frozen=True)
class _PieceTable:
    """Facts about each token's piece, `[T]` each."""

    kind: np.ndarray
    is_word: np.ndarray
    is_alone: np.ndarray  # each token of these is a word
    begins_with_space: np.ndarray
    ends_in_word: np.ndarray
    is_apostrophe: np.ndarray
    is_closer: np.ndarray
    is_stop: np.ndarray
    is_wide_stop: np.ndarray
    num_newlines: np.ndarray

    @classmethod
    def from_tokens(cls, tokens_T: np.ndarray, piece: Callable[[int], str]) -> "_PieceTable":
        ids, index_T = np.unique(tokens_T, return_inverse=True)
        facts = np.array([_facts(piece(int(id))) for id in ids], np.int64)
        names = [field.name for field in dataclasses.fields(cls)]
        columns = dict(zip(names, facts.reshape(-1, len(names))[index_T].T, strict=True))
        counts = {name: columns.pop(name) for name in ("kind", "num_newlines")}
        return cls(**counts, **{name: column > 0 for name, column in columns.items()})


def _facts(piece: str) -> tuple[int, ...]:
    """One row of `_PieceTable`."""
    kind, text = kind_of_piece(piece), _text(piece)
    if kind in ("special", "byte"):
        is_byte = kind == "byte"
        return (
            KINDS.index(kind),
            is_byte,
            False,
            not is_byte,
            is_byte,
            False,
            False,
            False,
            False,
            0,
        )
    body = text.strip()
    last = _kind_of_character(text[-1])
    inner = body.rstrip(CLOSERS)
    return (
        KINDS.index(kind),
        kind in IN_WORD,
        kind == "CJK",
        text[0].isspace(),
        kind in IN_WORD and last in IN_WORD and last != "CJK",
        text in APOSTROPHES,
        bool(body) and not inner and not text[0].isspace(),
        inner.endswith((*STOPS, *WIDE_STOPS)),
        inner.endswith(WIDE_STOPS),
        text.count("\n") if not body else 0,
    )


def _continues(table: _PieceTable, starts_T: np.ndarray) -> np.ndarray:
    """Whether a token goes on with a word, given that it is of one."""
    follows_T = _before(table.ends_in_word) & ~starts_T
    joined_T = _before(table.is_apostrophe & follows_T) & ~starts_T
    return (follows_T | joined_T) & ~table.begins_with_space & ~table.is_alone


def _ends_sentence(table: _PieceTable, starts_T: np.ndarray) -> np.ndarray:
    """Whether a sentence ends with a token, so that the next one starts another."""
    context_T = np.cumsum(starts_T)
    closed_T = _last(~table.is_closer)  # the token that closing quotes and brackets stand behind
    is_same_T = context_T[closed_T] == context_T
    next_starts_T, next_spaces_T, next_goes_on_T = (
        np.append(a_T[1:], False)
        for a_T in (starts_T, table.begins_with_space, table.is_closer | table.is_stop)
    )
    after_stop_T = table.is_stop[closed_T] & is_same_T & (next_spaces_T | next_starts_T)
    after_wide_T = table.is_wide_stop[closed_T] & is_same_T & ~next_goes_on_T
    return after_stop_T | after_wide_T | _ends_blank_line(table, starts_T)


def _ends_blank_line(table: _PieceTable, starts_T: np.ndarray) -> np.ndarray:
    """Whether a token holds a line break, and another stands before it with nothing but spaces between."""
    is_newline_T = table.num_newlines > 0
    is_text_T = (table.kind != KINDS.index("space")) | starts_T
    previous_T = np.append(0, _last(is_text_T)[:-1])
    return (table.num_newlines > 1) | (is_newline_T & is_newline_T[previous_T] & ~starts_T)


def _last(is_T: np.ndarray) -> np.ndarray:
    """Index of the last True at or before each place; 0 where there is none."""
    return np.maximum.accumulate(np.where(is_T, np.arange(is_T.size), 0))


def _before(is_T: np.ndarray) -> np.ndarray:
    """The value one place earlier; False before the first."""
    return np.append(False, is_T)[:-1]
