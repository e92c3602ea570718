"""Words and sentences in a stream of tokens, from the pieces of the tokenizer alone.

Everything is decided by a table of the distinct pieces and then by arrays, so half a million tokens
take a fraction of a second. The rules are plain ones, for statistics over many tokens:

- A *word* is a run of tokens that begin with a letter, a mark, a numeral or a raw byte. A token
  continues the word of the token before it if it does not begin with a space and that one
  ends in a letter, mark, numeral or byte; or if an apostrophe alone stands between them ("don",
  "'", "t" is one word). Each Chinese or Japanese token is a word of its own, for those scripts
  write no spaces.
- A *sentence* ends after . ! ? … and any closing quotes and brackets, if then a space, a line
  break, a special token or the end of the context follows; after 。！？ and closing quotes and
  brackets, whatever follows; and after a blank line.

Limits: "Mr. Smith" ends a sentence, and one without a full stop before a single line break does
not. Characters that the tokenizer writes as several bytes are seen as parts of words, whatever they
are: with a tokenizer of bytes a dash or a Chinese sentence is a word, and 。 ends nothing. A learnt
piece of a backslash and an n is taken for a line break, which `Tokenizer.piece` writes so. Special
tokens of a released model that look like other text are taken for that.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int, Int64

from moejax.data.tokenizers import SPACE_MARK, SPECIAL_PIECES

KINDS = (
    "special",
    "newline",
    "space",
    "punctuation",
    "symbol",
    "numeral",
    "CJK",
    "byte",
    "capitalised",
    "lower-case",
)
"""What a piece is by itself; see `kind_of_piece`."""

IN_WORD = ("numeral", "CJK", "byte", "capitalised", "lower-case")
CJK_NAMES = ("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "IDEOGRAPHIC")
ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t"}
_WHITE = re.compile(rf"(?:\\[nrt]|{SPACE_MARK})+")
APOSTROPHES = ("'", "\u2019")
CLOSERS = "\"'\u201d\u2019\u00bb\u203a)]}\u300d\u300f\uff09\u3011"
STOPS, WIDE_STOPS = (".", "!", "?", "\u2026"), ("\u3002", "\uff01", "\uff1f")

_SPECIAL_PATTERNS = [re.escape(piece) for piece in SPECIAL_PIECES]
_NO_ID = r"<-?\d+>"  # what is written for a number that is no id of the tokenizer
_OF_RELEASED = "</?s>|<[|\uff5c][^|\uff5c]+[|\uff5c]>"  # as most released models write them
_SPECIAL = re.compile("|".join([*_SPECIAL_PATTERNS, "<unk>", _NO_ID, _OF_RELEASED]))
_BYTE = re.compile("(?:<0x[0-9A-F]{2}>)+")


def kind_of_piece(piece: str) -> str:
    """Returns what a piece is, out of context: one of `KINDS`.

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
    """Returns the kind of a character that is not a space."""
    category = unicodedata.category(character)
    if category[0] in "LM":
        if unicodedata.name(character, "").startswith(CJK_NAMES):
            return "CJK"
        return "capitalised" if category in ("Lu", "Lt") else "lower-case"
    return {"P": "punctuation", "N": "numeral"}.get(category[0], "symbol")


def _text(piece: str) -> str:
    """Returns the piece's own characters."""
    if _WHITE.fullmatch(piece):
        for escape, character in ESCAPES.items():
            piece = piece.replace(escape, character)
    return piece.replace(SPACE_MARK, " ")


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
        """Returns 1 for the first token of a word, and so on; 0 for tokens of no word."""
        seen_T = np.cumsum(self.is_word_T)
        start_T = _last(self.starts_word_T)
        seen_since_start_T = seen_T - seen_T[start_T]
        return np.where(self.is_word_T, seen_since_start_T + 1, 0)

    def word_in_sentence(self) -> Int64[np.ndarray, "T"]:
        """Returns 1 for tokens of a sentence's first word, and so on; 0 for tokens of no word."""
        words_T = np.cumsum(self.starts_word_T)
        words_before_T = words_T - self.starts_word_T
        start_T = _last(self.starts_sentence_T)
        words_of_sentence_T = words_T - words_before_T[start_T]
        return np.where(self.is_word_T, words_of_sentence_T, 0)


def find_words(
    tokens_T: Int[np.ndarray, "T"],
    starts_T: Bool[np.ndarray, "T"],
    piece: Callable[[int], str],
) -> Words:
    """Finds words and sentences by the rules at the top of this module.

    Args:
      tokens_T: token ids in reading order.
      starts_T: True where a new context begins: no word or sentence reaches over it.
      piece: from an id to its piece, `Tokenizer.piece`.
    """
    table = _PieceTable.from_tokens(tokens_T, piece)
    is_first_T = np.arange(tokens_T.size) == 0
    starts_T = starts_T | is_first_T
    ends_sentence_T = _ends_sentence(table, starts_T)
    return Words(
        kind_T=table.kind,
        is_word_T=table.is_word,
        starts_word_T=table.is_word & ~_continues(table, starts_T),
        starts_sentence_T=starts_T | _before(ends_sentence_T),
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
        """Looks at each distinct piece once, and copies its facts to all tokens that have it."""
        ids, index_T = np.unique(tokens_T, return_inverse=True)
        facts = [_Facts.from_piece(piece(int(id))) for id in ids]
        columns = {}
        for field in dataclasses.fields(cls):
            name = field.name
            dtype = np.int64 if name in ("kind", "num_newlines") else bool
            values = [getattr(fact, name) for fact in facts]
            of_ids = np.array(values, dtype)
            columns[name] = of_ids[index_T]
        return cls(**columns)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """One row of `_PieceTable`."""

    kind: int
    is_word: bool = False
    is_alone: bool = False
    begins_with_space: bool = False
    ends_in_word: bool = False
    is_apostrophe: bool = False
    is_closer: bool = False
    is_stop: bool = False
    is_wide_stop: bool = False
    num_newlines: int = 0

    @classmethod
    def from_piece(cls, piece: str) -> "_Facts":
        kind = kind_of_piece(piece)
        index = KINDS.index(kind)
        if kind == "byte":
            return cls(index, is_word=True, ends_in_word=True)
        if kind == "special":
            return cls(index, begins_with_space=True)  # nothing continues over it
        text = _text(piece)
        body = text.strip()
        inner = body.rstrip(CLOSERS)
        is_word = kind in IN_WORD
        last_kind = _kind_of_character(text[-1])
        begins_with_space = text[0].isspace()
        return cls(
            kind=index,
            is_word=is_word,
            is_alone=kind == "CJK",
            begins_with_space=begins_with_space,
            ends_in_word=is_word and last_kind in IN_WORD and last_kind != "CJK",
            is_apostrophe=text in APOSTROPHES,
            is_closer=bool(body) and not inner and not begins_with_space,
            is_stop=inner.endswith((*STOPS, *WIDE_STOPS)),
            is_wide_stop=inner.endswith(WIDE_STOPS),
            num_newlines=0 if body else text.count("\n"),
        )


def _continues(table: _PieceTable, starts_T: np.ndarray) -> np.ndarray:
    """Whether a token continues a word, given that it is part of one."""
    follows_T = _before(table.ends_in_word) & ~starts_T
    apostrophe_follows_T = table.is_apostrophe & follows_T
    joined_T = _before(apostrophe_follows_T) & ~starts_T
    stands_alone_T = table.begins_with_space | table.is_alone
    return (follows_T | joined_T) & ~stands_alone_T


def _ends_sentence(table: _PieceTable, starts_T: np.ndarray) -> np.ndarray:
    """Whether a sentence ends with a token, so that the next one starts another."""
    context_T = np.cumsum(starts_T)
    closed_T = _last(~table.is_closer)  # the token after which closing quotes and brackets stand
    is_same_T = context_T[closed_T] == context_T
    next_starts_T = _after(starts_T)
    next_has_space_T = _after(table.begins_with_space)
    next_is_apart_T = next_has_space_T | next_starts_T
    next_belongs_T = _after(table.is_closer | table.is_stop)
    closes_stop_T = table.is_stop[closed_T] & is_same_T
    closes_wide_T = table.is_wide_stop[closed_T] & is_same_T
    after_stop_T = closes_stop_T & next_is_apart_T
    after_wide_T = closes_wide_T & ~next_belongs_T
    blank_line_T = _ends_blank_line(table, starts_T)
    return after_stop_T | after_wide_T | blank_line_T


def _ends_blank_line(table: _PieceTable, starts_T: np.ndarray) -> np.ndarray:
    """Whether a token holds a line break, and the text before it ends in another one.

    Only spaces may stand between them.
    """
    is_newline_T = table.num_newlines > 0
    is_space_T = table.kind == KINDS.index("space")
    is_text_T = ~is_space_T | starts_T
    last_text_T = _last(is_text_T)
    previous_T = np.append(0, last_text_T[:-1])
    has_two_T = table.num_newlines > 1
    follows_newline_T = is_newline_T[previous_T] & ~starts_T
    return has_two_T | (is_newline_T & follows_newline_T)


def _last(is_T: np.ndarray) -> np.ndarray:
    """Returns the index of the last True at or before each place; 0 where there is none."""
    place_T = np.arange(is_T.size)
    marked_T = np.where(is_T, place_T, 0)
    return np.maximum.accumulate(marked_T)


def _before(is_T: np.ndarray) -> np.ndarray:
    """Returns the value one place earlier; False before the first."""
    return np.append(False, is_T)[:-1]


def _after(is_T: np.ndarray) -> np.ndarray:
    """Returns the value one place later; False after the last."""
    return np.append(is_T[1:], False)
