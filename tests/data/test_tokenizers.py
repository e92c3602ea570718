"""Tokenizers are lossless, learn deterministically, and are saved as two files."""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moejax.config import ConfigError
from moejax.data.errors import DataError
from moejax.data.sources.synthetic import synthetic_documents
from moejax.data.tokenizers import (
    ByteTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)

TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\t\r\n",
    "a\u2581b \u2581\u2581",
    "emoji 👩‍👩‍👧 🇫🇷 é e\u0301",
    "\0 null",
    "<s></s><bos><eos><pad><unk><0x41>",
    "\ufeffBOM \ufffd \u2585 \u2047",
    "日本語のテキスト",
    "\u2028\u00a0\u3000",
    "x" * 9000,
]


@pytest.fixture(scope="module")
def bpe():
    return train_sentencepiece(synthetic_documents("train"), 512)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives_a_round_trip_without_special_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@settings(deadline=None, max_examples=200)
@given(st.text() | st.text(alphabet=" \n\t\u2581<>0xsabc\U0001f600"))
@example("<s> a")
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(-5, 600)))
def test_decoding_any_ids_never_raises(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_decoding_skips_special_ids_and_replaces_broken_characters(tokenizer):
    ids = tokenizer.encode("a€b")  # the euro sign is in neither vocabulary: three bytes
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == "a€b"
    cut = [i for i in ids if tokenizer.piece(i) != "<0xAC>"]
    assert len(cut) == len(ids) - 1
    assert tokenizer.decode(cut) == "a\ufffdb"
    assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"


def test_byte_b_is_id_b_plus_3():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("A\n") == [65 + 3, 10 + 3]
    assert tokenizer.vocab_size == 259
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)


def test_pieces_are_distinct_and_show_whitespace(tokenizer):
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    assert pieces[:3] == ["<pad>", "<bos>", "<eos>"]
    assert {"\u2581", "\\n", "<0xE2>"} <= set(pieces)
    assert not any(piece.strip() != piece or piece == "" for piece in pieces)
    assert tokenizer.piece(tokenizer.vocab_size) == f"<{tokenizer.vocab_size}>"


def test_bpe_merges_frequent_words(bpe):
    text = "asked in the harbour."
    assert len(bpe.encode(text)) < len(text.encode()) / 2


def test_training_is_deterministic(bpe):
    again = train_sentencepiece(synthetic_documents("train"), 512)
    assert again.fingerprint == bpe.fingerprint
    assert train_sentencepiece(synthetic_documents("train"), 513).fingerprint != bpe.fingerprint


def test_training_prints_nothing(capfd):
    train_sentencepiece(["some words and some more words"], 280)
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_too_large_for_the_text_names_the_largest_that_works():
    with pytest.raises(
        ConfigError, match=r"data\.vocab_size=4096 .* largest value that works is (\d+)"
    ) as error:
        train_sentencepiece(synthetic_documents("train"), 4096)
    largest = int(str(error.value).split("works is ")[1].split(",")[0])
    assert train_sentencepiece(synthetic_documents("train"), largest).vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters_says_so():
    with pytest.raises(
        ConfigError, match=r"data\.vocab_size=512 is too small .* use more than 2\d\d\d"
    ):
        train_sentencepiece(["".join(map(chr, range(0x4E00, 0x4E00 + 2000)))], 512)


def test_training_without_text_says_so():
    with pytest.raises(ConfigError, match=r"training split has no text; use data\.tokenizer=bytes"):
        train_sentencepiece(["", "\n"], 512)


def test_training_reads_words_of_any_length():
    # sentencepiece alone skips lines of many bytes, and stops at unbroken words of 65,536
    # characters.
    tokenizer = train_sentencepiece(["x" * 100_000 + " and words" * 3000], 284)
    assert "\u2581words" in {tokenizer.piece(i) for i in range(284)}


def test_training_stops_at_its_budget(monkeypatch):
    monkeypatch.setattr("moejax.data.tokenizers.learned.TRAINING_BYTES", 40)

    def endless():
        while True:
            yield "the same few words again and again"

    assert "again" in "".join(map(train_sentencepiece(endless(), 280).piece, range(280)))


def test_an_error_while_reading_training_text_arrives_unchanged():
    def texts():
        yield "fine"
        raise DataError("broken file")

    with pytest.raises(DataError, match="broken file"):
        train_sentencepiece(texts(), 512)


def test_a_tokenizer_is_saved_and_loaded_as_files(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    model_files = set() if tokenizer.kind == "bytes" else {"tokenizer.model"}
    assert names == {"tokenizer.json"} | model_files
    for attribute in ("kind", "vocab_size", "fingerprint"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    text = "\n".join(TRICKY)
    assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("tokenizer.json", lambda path: path.unlink()),
        ("tokenizer.json", lambda path: path.write_text("{")),
        ("tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("tokenizer.json", lambda path: path.write_text("[]")),
        ("tokenizer.json", lambda path: path.write_text('{"kind": "words", "vocab_size": 9}')),
        ("tokenizer.model", lambda path: path.unlink()),
        ("tokenizer.model", lambda path: path.write_bytes(path.read_bytes()[:1000])),
        (
            "tokenizer.model",
            lambda path: path.write_bytes(path.read_bytes().replace(b"harbour", b"HARBOUR")),
        ),
    ],
)
def test_a_damaged_tokenizer_names_the_file_and_the_remedy(bpe, tmp_path, file, damage):
    bpe.save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(DataError, match=rf"{tmp_path}/{file}.* remove the folder") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    import hashlib
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words"]),
        model_writer=model,
        vocab_size=270,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="ids 0, 1, 2"):
        SentencePieceTokenizer(model.getvalue())
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    digest = hashlib.sha256(model.getvalue()).hexdigest()
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"kind": "bpe", "vocab_size": 270, "sha256": digest})
    )
    with pytest.raises(DataError, match="no model this version reads"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_could_not_be_written_is_not_found_damaged(bpe, tmp_path, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", full)
        bpe.save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert not (tmp_path / "tokenizer.model").exists()
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == bpe.fingerprint


def test_an_indentation_is_one_token_and_comes_back(bpe):
    lines = "".join(f"def f{i}(x):\n        return x\n" for i in range(300))
    tokenizer = train_sentencepiece([lines, *synthetic_documents("train")], 512)
    indented = "\n        return"
    assert tokenizer.decode(tokenizer.encode(indented)) == indented
    # The end of line, and the blanks in one or two pieces; without pieces that are only blanks
    # there would be eight.
    before_the_word = [tokenizer.piece(i) for i in tokenizer.encode(indented)]
    blanks = [piece for piece in before_the_word if piece.startswith(("\u2581", " "))]
    assert len(blanks) <= 2, before_the_word
