"""generation_config.json: what it asks for, and what is not implemented."""

import json
import logging

import pytest

from moejax.data import DataError
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.text.generation import NEUTRAL, GenerationDefaults, read_generation


def read(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_generation(folder)


def test_a_folder_that_says_nothing_has_no_defaults(tmp_path):
    assert read_generation(tmp_path) == GenerationDefaults()
    assert read(tmp_path, transformers_version="4.57.6", bos_token_id=1) == GenerationDefaults()


def test_values_are_those_of_the_file(tmp_path):
    found = read(
        tmp_path,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        max_new_tokens=512,
        eos_token_id=[7, 9],
    )
    assert found == GenerationDefaults(0.6, 0.95, 20, 512, (7, 9))
    assert read(tmp_path, eos_token_id=3).end_ids == (3,)
    assert read(tmp_path, temperature=1, top_p=1) == GenerationDefaults(1.0, 1.0)


def test_a_model_that_does_not_sample_is_greedy(tmp_path):
    assert read(tmp_path, do_sample=False, temperature=0.6).temperature == 0


def test_what_is_not_implemented_is_logged_unless_it_has_no_effect(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "moejax"):
        assert read(tmp_path, **NEUTRAL, min_new_tokens=None).ignored == {}
        assert not caplog.messages
        found = read(tmp_path, repetition_penalty=1.05, suppress_tokens=[3], temperature=0.5)
    assert found.ignored == {"repetition_penalty": 1.05, "suppress_tokens": [3]}
    assert found.temperature == 0.5
    (message,) = caplog.messages
    assert message.endswith("left out: repetition_penalty=1.05, suppress_tokens=[3]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 0.5),
        ("max_new_tokens", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", -1),
        ("do_sample", "yes"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_key(tmp_path, key, value):
    with pytest.raises(HfError, match=rf"generation_config.json: {key}=.* must be") as error:
        read(tmp_path, **{key: value})
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(DataError, match="must be one JSON object"):
        read_generation(tmp_path)
