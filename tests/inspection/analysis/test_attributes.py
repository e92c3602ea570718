"""Attributes of tokens: classes of pieces, words and sentences, on texts with known answers."""

import numpy as np
import pytest

from moejax.data.sources.synthetic import synthetic_documents
from moejax.data.tokenizers import ByteTokenizer, train_sentencepiece
from moejax.inspection.analysis.attributes import (
    Attribute,
    AttributeRangeError,
    attributes_of,
    form_attributes,
    next_token,
    position_in_row,
    previous_token,
)
from moejax.inspection.analysis.words import KINDS, find_words, kind_of_piece


def forms(pieces, starts=()):
    """Labels of the three attributes of form for pieces in a row.

    A context begins with the first piece, and with each of `starts`.
    """
    found = form_attributes(*tokens_of(pieces, starts))
    return [[attribute.labels[value] for value in attribute.values_T] for attribute in found]


def tokens_of(pieces, starts):
    """Token ids, where contexts start, and the piece of each id."""
    ids = sorted(set(pieces))
    tokens_T = np.array([ids.index(piece) for piece in pieces])
    starts_T = np.isin(np.arange(len(pieces)), [0, *starts])
    return tokens_T, starts_T, ids.__getitem__


def sentences(pieces, starts=()):
    """Numbers of the sentences of pieces in a row."""
    words = find_words(*tokens_of(pieces, starts))
    return np.cumsum(words.starts_sentence_T).tolist()


@pytest.mark.parametrize(
    ("kind", "pieces"),
    {
        "special": [
            *["<pad>", "<bos>", "<eos>", "<unk>", "<600>", "<-1>"],
            *["</s>", "<|im_end|>", "<\uff5cend▁of\uff5c>"],
        ],
        "newline": ["\\n", "\n", "\n\n", " \n", "\\n\\n", "▁\\n▁"],
        "space": ["▁", "▁▁", "\\t", "\\r", "\t", "\u3000", "\u00a0"],
        "punctuation": [".", "▁(", "...", "-", "。", "「", "»", "_", ".com"],
        "symbol": ["+", "▁$", "^", "🙂", "~", "\u200d"],
        "numeral": ["1", "▁1990", "½", "Ⅳ", "٣"],
        "CJK": ["日本", "々", "カ", "ひ", "ｶ", "ー", "▁中"],
        "byte": ["<0xE2>", "<0x0B>", "<0xE2><0x80>"],
        "capitalised": ["The", "▁The", "A", "Éa", "ǅ"],
        "lower-case": ["the", "▁the", "é", "한", "ب", "\u0301"],
    }.items(),
)
def test_a_piece_has_the_kind_of_its_first_character_that_is_no_space(kind, pieces):
    assert [kind_of_piece(piece) for piece in pieces] == [kind] * len(pieces)


def test_words_in_a_sentence_are_counted_and_their_tokens_too():
    none, more = "no word", "word continuation"
    rows = [
        ("<bos>", "special", none, none),
        ("H", "capitalised word", "1", "1"),
        ("e", more, "2", "1"),
        ("l", more, "3", "1"),
        ("l", more, "4+", "1"),
        ("o", more, "4+", "1"),
        (",", "punctuation", none, none),
        ("▁the", "lower-case word", "1", "2"),
        ("▁w", "lower-case word", "1", "3"),
        ("or", more, "2", "3"),
        ("ld", more, "3", "3"),
        (".", "punctuation", none, none),
        ("▁", "space", none, none),
        ("(", "punctuation", none, none),
        ("1", "numeral", "1", "1"),
        ("9", "numeral", "2", "1"),
        ("st", more, "3", "1"),
        (")", "punctuation", none, none),
        ("▁It", "capitalised word", "1", "2"),
    ]
    pieces, classes, in_word, in_sentence = map(list, zip(*rows, strict=True))
    assert forms(pieces) == [classes, in_word, in_sentence]


def test_later_words_of_a_sentence_share_buckets():
    _, _, in_sentence = forms(["▁a"] * 20)
    assert in_sentence == ["1", "2", "3"] + ["4-7"] * 4 + ["8-15"] * 8 + ["16+"] * 5


def test_an_apostrophe_within_a_word_does_not_end_it_and_others_do():
    _, in_word, in_sentence = forms(["▁don", "'", "t", "▁'", "t", "'", "▁t", "▁n", "-", "t"])
    assert in_word == ["1", "no word", "2", "no word", "1", "no word", "1", "1", "no word", "1"]
    assert in_sentence == [
        "1",
        "no word",
        "1",
        "no word",
        "2",
        "no word",
        "3",
        "4-7",
        "no word",
        "4-7",
    ]
    assert forms(["▁a", ",", "'", "t"])[1] == ["1", "no word", "no word", "1"]


def test_a_word_does_not_reach_into_the_next_context():
    classes, in_word, in_sentence = forms(["▁a", "b", "c", "'", "d"], starts=[2, 4])
    assert classes == [
        "lower-case word",
        "word continuation",
        "lower-case word",
        "punctuation",
        "lower-case word",
    ]
    assert in_word == ["1", "2", "1", "no word", "1"]
    assert in_sentence == ["1", "1", "1", "no word", "1"]


def test_a_piece_that_only_ends_in_a_letter_begins_no_word():
    assert forms([".com", "mon"])[1] == ["no word", "1"]


def test_each_token_of_japanese_is_a_word_and_bytes_are_parts_of_words():
    _, in_word, in_sentence = forms(["日本", "語", "a", "<0xC3>", "<0xA9>", "b", "語"])
    assert in_word == ["1", "1", "1", "2", "3", "4+", "1"]
    assert in_sentence == ["1", "2", "3", "3", "3", "3", "4-7"]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", ".", "▁b"], [1, 1, 2]),
        (["a", ".", "\\n", "b"], [1, 1, 2, 2]),
        (["3", ".", "1"], [1, 1, 1]),  # no space follows
        (["a", "!", "\u201d", ")", "▁b"], [1, 1, 1, 1, 2]),  # what closes belongs to the sentence
        (["a", "?\u201d", "▁b"], [1, 1, 2]),  # in one piece
        (["a", ".", ".", ".", "▁b"], [1, 1, 1, 1, 2]),
        (["a", ".", "<eos>", "b"], [1, 1, 2, 2]),
        (["▁Mr", ".", "▁S"], [1, 1, 2]),  # a limit
        (["日", "。", "本"], [1, 1, 2]),
        (["日", "。", "」", "本"], [1, 1, 1, 2]),
        (["日", "\uff01", "\uff1f", "本"], [1, 1, 1, 2]),
        (["a", "\\n", "b"], [1, 1, 1]),  # a line break alone ends nothing
        (["a", "\\n", "\\n", "b"], [1, 1, 1, 2]),
        (["a", "\\r", "\\n", "\\r", "\\n", "b"], [1, 1, 1, 1, 1, 2]),
        (["a", "\n\n", "b"], [1, 1, 2]),
        (["a", ",", "▁b"], [1, 1, 1]),
        ([")", "▁b"], [1, 1]),
    ],
)  # fmt: skip
def test_sentences_end_where_the_rule_says(pieces, expected):
    assert sentences(pieces) == expected


def test_sentences_end_with_their_context():
    pieces = ["a", ".", ")", "b", "\\n", "\\n", "c"]
    assert sentences(pieces, starts=[2, 5]) == [1, 1, 2, 2, 2, 3, 3]
    pieces = ["a", ".", ")", "▁b"]  # the bracket closes nothing
    assert sentences(pieces, starts=[2]) == [1, 1, 2, 2]


def test_neighbours_stay_within_a_context():
    tokens_T, starts_T = np.array([5, 6, 7, 8, 9]), np.array([True, False, True, False, False])
    assert previous_token(tokens_T, starts_T).values_T.tolist() == [-1, 5, -1, 7, 8]
    assert next_token(tokens_T, starts_T).values_T.tolist() == [6, -1, 8, 9, -1]


def test_positions_are_bucketed_by_powers_of_two():
    attribute = position_in_row(np.array([3] * 9 + [5] * 2 + [4]))
    buckets = [attribute.labels[v] for v in attribute.values_T]
    assert buckets == ["0", "1", "2-3", "2-3", "4-7", "4-7", "4-7", "4-7", "8-15", "0", "1", "0"]


def test_values_without_a_label_are_refused():
    with pytest.raises(
        AttributeRangeError, match=r"attribute 'domain' has values from -1 to 1 and 2 labels"
    ):
        Attribute("domain", np.array([-1, 0, 1]), ("a", "b"))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_both_tokenizers_find_the_same_words_and_sentences(kind):
    tokenizer = (
        ByteTokenizer()
        if kind == "bytes"
        else train_sentencepiece(synthetic_documents("train"), 400)
    )
    text = 'The old bridge stood. "Don\'t go!" said Petra, in 1990.\n\nWhere is (it)? There'
    tokens_T = np.array([tokenizer.bos_id, *tokenizer.encode(text)])
    words = find_words(tokens_T, np.arange(tokens_T.size) == 0, tokenizer.piece)
    assert words.starts_word_T.sum() == 14
    first = words.starts_word_T & (words.word_in_sentence() == 1)
    assert [tokenizer.piece(i).strip("▁")[0] for i in tokens_T[first].tolist()] == [
        "T",
        "D",
        "s",
        "W",
        "T",
    ]
    assert KINDS[words.kind_T[0]] == "special"
    zeros_T, positions_T = np.zeros_like(tokens_T), np.arange(tokens_T.size)
    found = attributes_of(tokens_T, zeros_T, positions_T, tokenizer.piece)
    assert [attribute.name for attribute in found] == [
        "token",
        "previous token",
        "next token",
        "character class",
        "position in word",
        "word in sentence",
        "position in context",
        "position in row",
    ]
    assert all(attribute.values_T.shape == tokens_T.shape for attribute in found)
