"""The text side of a released model: tokenizer, chat and sampling together."""

import json

import pytest

from cases.tokenizers import WRITERS, write_json_tokenizer, write_piece_tokenizer
from moejax.config import ConfigError
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.text.folder import read_text

TALK = [{"role": "user", "content": "the people"}]


def test_a_chat_becomes_ids_with_the_special_ids_of_the_model(tmp_path):
    write_json_tokenizer(tmp_path / "json")
    text = read_text(tmp_path / "json")
    ids = text.apply_chat_template(TALK)
    encode = text.tokenizer.encode
    start, end = (text.tokenizer.encode_markup(name)[0] for name in ("<|im_start|>", "<|im_end|>"))
    user = [start, *encode("user\nthe people"), end, *encode("\n")]
    assert ids == [*user, start, *encode("assistant\n")]
    assert text.apply_chat_template(TALK, add_generation_prompt=False) == user
    write_piece_tokenizer(tmp_path / "pieces")
    text = read_text(tmp_path / "pieces")
    ids = text.apply_chat_template(TALK)
    assert ids == [1, *text.tokenizer.encode(" [INST] the people [/INST]")]


def test_what_ends_a_text_is_in_both_files(tmp_path):
    write_json_tokenizer(tmp_path)
    assert read_text(tmp_path).tokenizer.end_ids == (read_text(tmp_path).tokenizer.eos_id,)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 6], "temperature": 0.3})
    )
    text = read_text(tmp_path)
    assert text.tokenizer.end_ids == (text.tokenizer.eos_id, 5, 6)
    assert text.generation.temperature == 0.3


def test_a_tokenizer_or_an_end_beyond_the_embedding_is_refused(tmp_path):
    write_json_tokenizer(tmp_path)
    text = read_text(tmp_path)
    num_ids = text.tokenizer.vocab_size
    text.check_rows(num_ids)
    with pytest.raises(ConfigError, match=f"has {num_ids} ids, and the embedding only"):
        text.check_rows(num_ids - 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": num_ids + 8}))
    with pytest.raises(ConfigError, match=f"eos_token_id={num_ids + 8} is beyond the {num_ids}"):
        read_text(tmp_path).check_rows(num_ids)


def test_of_two_files_the_one_that_says_more_is_read(tmp_path):
    write_piece_tokenizer(tmp_path)
    assert read_text(tmp_path).tokenizer.kind == "sentencepiece"
    write_json_tokenizer(tmp_path)
    assert read_text(tmp_path).tokenizer.kind == "tokenizers"


def test_a_folder_without_what_is_asked_for_says_so(tmp_path):
    with pytest.raises(HfError, match=r"has no tokenizer.json and no tokenizer.model"):
        read_text(tmp_path)
    for kind, write in WRITERS.items():
        write(tmp_path / kind, chat_template=None)
        with pytest.raises(HfError, match="has no chat template"):
            read_text(tmp_path / kind).apply_chat_template(TALK)
