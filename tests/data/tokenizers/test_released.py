"""Tokenizers of released models: special ids, round trips, copies in runs, and bad files."""

import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.tokenizers import (
    CORPUS,
    WRITERS,
    json_content,
    piece_content,
    write_json_tokenizer,
    write_piece_tokenizer,
)
from moejax.config import ConfigError
from moejax.data import DataError, Tokenizer
from moejax.data.tokenizers import check_rows, load_tokenizer, open_tokenizer
from moejax.data.tokenizers.load import RELEASED

TRICKY = ["", " ", "  two  ", "a\n\n\tb", "emoji 👩‍👩‍👧 é e\u0301", "日本語", *CORPUS]


@pytest.fixture(scope="module", params=sorted(WRITERS))
def path(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(path):
    return open_tokenizer(path)


def test_both_kinds_are_tokenizers(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.kind in RELEASED


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives_a_round_trip_without_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\u2581")))
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(-5, 600)))
def test_decoding_any_ids_never_raises(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)
    assert all(tokenizer.piece(i) for i in ids)


def test_text_that_looks_like_a_special_token_is_text_unless_it_is_markup(tmp_path):
    chat = open_tokenizer(write_json_tokenizer(tmp_path / "json"))
    text = "a<|im_end|>b"
    assert chat.eos_id not in chat.encode(text) and chat.decode(chat.encode(text)) == text
    assert chat.encode_markup(text) == [*chat.encode("a"), chat.eos_id, *chat.encode("b")]
    pieces = open_tokenizer(write_piece_tokenizer(tmp_path / "pieces"))
    text = "a</s>b"
    assert pieces.eos_id not in pieces.encode(text) and pieces.decode(pieces.encode(text)) == text
    assert pieces.encode_markup(text) == [*pieces.encode("a"), pieces.eos_id, *pieces.encode("b")]


def test_special_ids_are_those_that_the_files_beside_name(tmp_path):
    chat = open_tokenizer(write_json_tokenizer(tmp_path / "json"))
    ids = {text: chat.encode_markup(text)[0] for text in ("<|im_end|>", "<|endoftext|>")}
    assert (chat.eos_id, chat.pad_id) == (ids["<|im_end|>"], ids["<|endoftext|>"])
    # Without a token that begins a document, the one that ends it does.
    assert (chat.bos_id, chat.adds_bos, chat.end_ids) == (chat.eos_id, False, (chat.eos_id,))
    pieces = open_tokenizer(write_piece_tokenizer(tmp_path / "pieces"))
    assert (pieces.bos_id, pieces.eos_id, pieces.pad_id) == (1, 2, 2)
    assert pieces.adds_bos
    named = {"pad_token": "<|im_start|>", "bos_token": "<|endoftext|>", "add_bos_token": True}
    other = open_tokenizer(write_json_tokenizer(tmp_path / "other", **named))
    assert other.adds_bos and other.bos_id == chat.pad_id != other.pad_id
    assert other.fingerprint != chat.fingerprint


def test_names_may_be_in_the_map_of_special_tokens_alone(tmp_path):
    path = write_json_tokenizer(tmp_path)
    names = {"eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    named = open_tokenizer(path)
    (tmp_path / "special_tokens_map.json").unlink()
    # Ids are in two files, of which that of generation counts, and in it the first.
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [named.eos_id]}))
    assert open_tokenizer(path).eos_id == named.eos_id
    (tmp_path / "generation_config.json").unlink()
    assert open_tokenizer(path).eos_id == 5
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match="no file says which token ends a document"):
        open_tokenizer(path)


@pytest.mark.parametrize(("adds", "expected"), [(None, True), (False, False), (True, True)])
def test_what_a_json_file_puts_before_a_text_counts_unless_the_settings_differ(
    tmp_path, adds, expected
):
    path = write_json_tokenizer(tmp_path, add_bos_token=adds, bos_token="<|endoftext|>")
    found = json.loads(json_content())
    id = next(token["id"] for token in found["added_tokens"] if token["content"] == "<|endoftext|>")
    found["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [id], "tokens": ["<|endoftext|>"]}
        },
    }
    path.write_text(json.dumps(found))
    tokenizer = open_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (id, expected)
    assert id not in tokenizer.encode("a")
    path.write_bytes(json_content())  # which puts nothing before a text
    assert open_tokenizer(path).adds_bos is (adds is True)


def test_tokens_beside_the_vocabulary_of_a_sentencepiece_model_are_tokens(tmp_path):
    added = {
        "320": {"content": "<|im_start|>", "special": True},
        "321": {"content": "<think>", "special": False},
        "322": {"content": "<tight>", "special": True, "rstrip": True, "lstrip": True},
    }
    path = write_piece_tokenizer(tmp_path, added_tokens_decoder=added)
    (tmp_path / "added_tokens.json").write_text('{"<late>": 330}')
    tokenizer = open_tokenizer(path)
    assert tokenizer.vocab_size == 331
    assert tokenizer.encode_markup("<|im_start|>") == [320]
    # What is no special token is a word like others, also in plain text.
    assert 321 in tokenizer.encode("a<think>") and 320 not in tokenizer.encode("a<|im_start|>")
    ids = tokenizer.encode_markup("the <tight> people")
    assert ids == [*tokenizer.encode("the"), 322, *tokenizer.encode("people")]
    assert tokenizer.decode(tokenizer.encode_markup("the<|im_start|>people<think>")) == (
        "thepeople<think>"
    )
    assert [tokenizer.piece(i) for i in (320, 325, 330)] == ["<|im_start|>", "<325>", "<late>"]


def test_only_legacy_sentencepiece_puts_a_space_before_every_part(tmp_path):
    legacy = open_tokenizer(write_piece_tokenizer(tmp_path / "legacy"))
    modern = open_tokenizer(write_piece_tokenizer(tmp_path / "modern", legacy=False))
    assert legacy.encode("the people") == modern.encode("the people")
    of_each = [tokenizer.encode_markup("</s>the") for tokenizer in (legacy, modern)]
    pieces = [[legacy.piece(i) for i in ids] for ids in of_each]
    assert pieces[0][1].startswith("\u2581") and not pieces[1][1].startswith("\u2581")
    assert modern.decode(modern.encode_markup("a</s> the")) == "a the"


def test_pieces_are_readable(tmp_path):
    chat = open_tokenizer(write_json_tokenizer(tmp_path / "json"))
    pieces = [chat.piece(i) for i in range(chat.vocab_size)]
    assert {"\u2581", "\\n", "\u2581the", "<|im_end|>", "<0xE2>"} <= set(pieces)
    assert chat.piece(chat.vocab_size) == f"<{chat.vocab_size}>"
    model = open_tokenizer(write_piece_tokenizer(tmp_path / "pieces"))
    pieces = [model.piece(i) for i in range(model.vocab_size)]
    assert {"\u2581the", "<0xE2>", "</s>"} <= set(pieces)


def test_a_token_without_text_and_an_id_without_a_token_have_a_piece(tmp_path):
    path = write_json_tokenizer(tmp_path, eos_token="end", pad_token=None)
    vocabulary = {"": 0, "the": 1, "end": 2, "far": 9}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "end"}
    path.write_text(json.dumps({"version": "1.0", "model": model}))
    tokenizer = open_tokenizer(path)
    assert tokenizer.vocab_size == 10
    assert [tokenizer.piece(i) for i in (0, 1, 5, 9, 10)] == ["<0>", "the", "<5>", "far", "<10>"]
    assert tokenizer.decode([1, 5, 9]) == "the far"


def test_a_copy_in_a_run_needs_no_other_file(path, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "tokenizer.json",
        "tokenizer.model",
    }
    copy = load_tokenizer(tmp_path / "run")
    for attribute in ("kind", "vocab_size", "fingerprint", "bos_id", "eos_id", "pad_id"):
        assert getattr(copy, attribute) == getattr(tokenizer, attribute)
    text = "\n".join(TRICKY)
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.encode_markup("<s></s>") == tokenizer.encode_markup("<s></s>")
    with pytest.raises(DataError, match="describes the tokenizer of a run"):
        open_tokenizer(tmp_path / "run" / "tokenizer.json")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda values: values | {"special": {}}, "is corrupt"),
        (lambda values: values | {"special": 3}, "is corrupt"),
        (lambda values: values | {"vocab_size": 9}, "has vocab_size=9"),
        (lambda values: values | {"kind": "other"}, "has kind='other'"),
        (
            lambda values: values | {"special": values["special"] | {"eos_id": 9999}},
            "eos_id=9999 is none of its",
        ),
        (
            lambda values: values | {"special": values["special"] | {"added": [{"id": 2**40}]}},
            "is corrupt",
        ),
    ],
)
def test_a_damaged_copy_names_the_file_and_the_remedy(tokenizer, tmp_path, damage, problem):
    tokenizer.save(tmp_path)
    description = tmp_path / "tokenizer.json"
    description.write_text(json.dumps(damage(json.loads(description.read_text()))))
    with pytest.raises(DataError, match=problem) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_more_ids_than_rows_are_refused(tokenizer):
    check_rows(tokenizer, tokenizer.vocab_size, "it")
    with pytest.raises(ConfigError, match=r"it has \d+ ids, and the embedding only 9 rows"):
        check_rows(tokenizer, 9, "it")


def test_ids_that_end_a_text_can_be_added(tokenizer):
    other = tokenizer.with_ends([7, tokenizer.eos_id, 8])
    assert other.end_ids == (tokenizer.eos_id, 7, 8)
    assert tokenizer.end_ids == (tokenizer.eos_id,)
    assert other.fingerprint == tokenizer.fingerprint


def broken(files):
    """Returns a function that writes files over those of a tokenizer."""

    def write(path):
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            path.with_name(name.replace("FILE", path.name)).write_bytes(data)

    return write


BAD_FILES = {
    "nothing": (broken({"FILE": b""}), "can be read"),
    "noise": (broken({"FILE": os.urandom(500)}), "can be read"),
    "text": (broken({"FILE": "no tokenizer at all"}), "can be read"),
    "other JSON": (broken({"FILE": '{"vocab": [1]}'}), "it is JSON without `model`"),
    "deep JSON": (broken({"FILE": "{" + '"a":{' * 100_000}), "can be read"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:700]), "can be read"),
    "no such file": (lambda path: path.unlink(), "No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "directory"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is no ordinary file"),
    "settings that are no JSON": (broken({"tokenizer_config.json": "{"}), "is damaged"),
    "settings that are a list": (broken({"tokenizer_config.json": "[]"}), "one JSON object"),
    "a name that is a number": (
        broken({"tokenizer_config.json": '{"eos_token": 3}'}),
        "eos_token=3 must be the text",
    ),
    "a name that is no token": (
        broken({"tokenizer_config.json": '{"eos_token": "<nothing>"}'}),
        "eos_token='<nothing>' is no token",
    ),
    "no end": (
        broken({"tokenizer_config.json": '{"eos_token": null}'}),
        "no file says which token ends a document",
    ),
    "a begin without a token": (
        broken(
            {
                "tokenizer_config.json": json.dumps(
                    {"bos_token": None, "eos_token": "a", "add_bos_token": True}
                )
            }
        ),
        "add_bos_token=true needs bos_token",
    ),
    "an id that is text": (broken({"added_tokens.json": '{"<x>": "7"}'}), "has the id '7'"),
    "an added token of an id that is another": (
        broken({"added_tokens.json": '{"<x>": 7}'}),
        "'<x>' is not its token 7",
    ),
    "an id that is no number": (
        broken({"tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "y"}}}'}),
        r"added_tokens_decoder\[x\] is damaged",
    ),
    "ids that no embedding has": (
        broken({"added_tokens.json": '{"<x>": 99999999}'}),
        "<x>|largest",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_bad_files_are_refused_in_one_line(tmp_path, kind, case):
    damage, problem = BAD_FILES[case]
    path = WRITERS[kind](tmp_path)
    damage(path)
    with pytest.raises(DataError, match=problem) as error:
        open_tokenizer(path, "data.tokenizer")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_file_that_is_too_large_is_refused_without_reading_it(tmp_path):
    path = write_json_tokenizer(tmp_path)
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(DataError, match="is larger than"):
        open_tokenizer(path)


def test_flipped_bytes_never_raise_anything_else(tmp_path):
    for kind, content in (("json", json_content()), ("pieces", piece_content())):
        path = WRITERS[kind](tmp_path / kind)
        outcomes = SimpleNamespace(refused=0, read=0)
        for number in range(60):
            damaged = bytearray(content)
            for place in (number * 977, number * 131 + 7, number * 3301 + 99):
                damaged[place % len(content)] ^= 1 << (number % 7)
            path.write_bytes(bytes(damaged))
            try:
                open_tokenizer(path).encode("The people.")
                outcomes.read += 1
            except DataError as error:
                assert "\n" not in str(error)
                outcomes.refused += 1
        assert outcomes.refused, kind


def test_beside_a_link_is_where_the_link_is(tmp_path):
    path = write_json_tokenizer(tmp_path / "snapshots")
    blob = tmp_path / "blob"
    path.rename(blob)
    path.symlink_to(blob)
    assert (
        open_tokenizer(path).eos_id
        == open_tokenizer(write_json_tokenizer(tmp_path / "plain")).eos_id
    )
