"""Attributes of tokens that experts may specialise in: identity, neighbours, form and place.

An attribute has one value for each of T tokens in reading order. `analysis/information.py` measures
how much each tells about the experts.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from moejax.inspection.analysis.words import KINDS, Words, find_words

NO_TOKEN = -1
"""The previous token of a context's first token, and the next one of its last."""

CHARACTER_CLASSES = (
    "special",
    "newline",
    "space",
    "punctuation",
    "symbol",
    "numeral",
    "CJK",
    "byte",
    "capitalised word",
    "lower-case word",
    "word continuation",
)
WORD_PIECES = ("no word", "1", "2", "3", "4+")
WORD_PLACES = ("no word", "1", "2", "3", "4-7", "8-15", "16+")


class AttributeRangeError(ValueError):
    """An attribute has values without a label."""


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One property of each token.

    Attributes:
      name: for tables and figures.
      values_T: any integers; equal value, equal property.
      labels: the name of each value 0, 1, ...; None where values are token ids, or `NO_TOKEN`.
    """

    name: str
    values_T: Int[np.ndarray, "T"]
    labels: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.labels is None or not self.values_T.size:
            return
        num_labels = len(self.labels)
        low, high = int(self.values_T.min()), int(self.values_T.max())
        if low < 0 or high >= num_labels:
            raise AttributeRangeError(
                f"attribute {self.name!r} has values from {low} to {high} and {num_labels} labels; "
                f"values must be in [0, {num_labels}): "
                "leave tokens without a value out, or give them a label"
            )

    def at(self, tokens: Int[np.ndarray, "t"]) -> "Attribute":
        """Returns the attribute of some of the tokens."""
        return dataclasses.replace(self, values_T=self.values_T[tokens])


def attributes_of(
    tokens_T: Int[np.ndarray, "T"],
    rows_T: Int[np.ndarray, "T"],
    positions_T: Int[np.ndarray, "T"],
    piece: Callable[[int], str],
) -> list[Attribute]:
    """Returns all attributes of this module, from a token's identity to its place.

    Args:
      tokens_T: token ids in reading order, without padding.
      rows_T: the row of each; equal for neighbours in one row.
      positions_T: position in its context, the piece of a document within one row; 0 begins one.
      piece: from an id to its piece, `Tokenizer.piece`.
    """
    starts_T = positions_T == 0
    return [
        Attribute("token", tokens_T),
        previous_token(tokens_T, starts_T),
        next_token(tokens_T, starts_T),
        *form_attributes(tokens_T, starts_T, piece),
        position_in_context(positions_T),
        position_in_row(rows_T),
    ]


def previous_token(tokens_T: Int[np.ndarray, "T"], starts_T: Bool[np.ndarray, "T"]) -> Attribute:
    """Returns the token before each, `NO_TOKEN` for the first of a context."""
    previous_T = np.append(NO_TOKEN, tokens_T)[:-1]
    return Attribute("previous token", np.where(starts_T, NO_TOKEN, previous_T))


def next_token(tokens_T: Int[np.ndarray, "T"], starts_T: Bool[np.ndarray, "T"]) -> Attribute:
    """Returns the token after each, which the model is to predict there.

    `NO_TOKEN` for the last one known of a context.
    """
    next_T = np.append(tokens_T, NO_TOKEN)[1:]
    is_last_T = np.append(starts_T, True)[1:]
    return Attribute("next token", np.where(is_last_T, NO_TOKEN, next_T))


def form_attributes(
    tokens_T: Int[np.ndarray, "T"],
    starts_T: Bool[np.ndarray, "T"],
    piece: Callable[[int], str],
) -> list[Attribute]:
    """Returns the class of pieces, their place in the word and the word's place in its sentence.

    The rules, and their limits, are those of `analysis/words.py`. The character class is
    `kind_of_piece`, but a letter is a "word continuation" where it does not begin a word.

    Args:
      tokens_T: token ids in reading order.
      starts_T: True where a context begins.
      piece: from an id to its piece, `Tokenizer.piece`.
    """
    words = find_words(tokens_T, starts_T, piece)
    piece_T = np.minimum(words.position_in_word(), len(WORD_PIECES) - 1)
    return [
        Attribute("character class", _character_class(words), CHARACTER_CLASSES),
        Attribute("position in word", piece_T, WORD_PIECES),
        Attribute("word in sentence", _word_place(words), WORD_PLACES),
    ]


def _character_class(words: Words) -> np.ndarray:
    """Returns indices into `CHARACTER_CLASSES`."""
    is_letter_T = words.kind_T >= KINDS.index("capitalised")
    continues_T = is_letter_T & ~words.starts_word_T
    continuation = CHARACTER_CLASSES.index("word continuation")
    return np.where(continues_T, continuation, words.kind_T)


def _word_place(words: Words) -> np.ndarray:
    """Returns the indices into `WORD_PLACES`: 0 to 3 exactly, then buckets by powers of two."""
    number_T = words.word_in_sentence()
    wide_bucket_T = 1 + _power_of_two(number_T)
    bucket_T = np.where(number_T < 4, number_T, wide_bucket_T)
    last_bucket = len(WORD_PLACES) - 1
    return np.minimum(bucket_T, last_bucket)


def position_in_context(positions_T: Int[np.ndarray, "T"]) -> Attribute:
    """Returns the position in the context, in buckets 0, 1, 2-3, 4-7, ....

    It bounds how much the token can attend to.
    """
    return _buckets("position in context", positions_T)


def position_in_row(rows_T: Int[np.ndarray, "T"]) -> Attribute:
    """Returns the position in the row, in buckets 0, 1, 2-3, 4-7, ....

    A control: the model does not see it.

    Args:
      rows_T: the row of each token; padding is left out and comes last in a row.
    """
    num_tokens = rows_T.size
    index_T = np.arange(num_tokens)
    is_new_row = rows_T[1:] != rows_T[:-1]
    starts_T = np.append(True, is_new_row)[:num_tokens]
    start_T = np.where(starts_T, index_T, 0)
    start_of_row_T = np.maximum.accumulate(start_T)
    return _buckets("position in row", index_T - start_of_row_T)


def _buckets(name: str, positions_T: np.ndarray) -> Attribute:
    buckets_T = _power_of_two(positions_T)
    labels = ["0", "1"]
    for exponent in range(1, buckets_T.max(initial=1)):
        first = 2**exponent
        labels.append(f"{first}-{2 * first - 1}")
    return Attribute(name, buckets_T, tuple(labels))


def _power_of_two(positions_T: np.ndarray) -> np.ndarray:
    """Returns 0 for 0, 1 for 1, 2 for 2-3, 3 for 4-7, and so on."""
    _, exponent_T = np.frexp(positions_T.astype(np.float64))
    return exponent_T.astype(np.int64)
