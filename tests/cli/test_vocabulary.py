"""Recipes whose tokenizer is a file, whatever else is in them."""

import pytest
from ml_collections import ConfigDict

from cases.tokenizers import write_json_tokenizer
from moejax.cli.vocabulary import complete_vocabulary
from moejax.config import ConfigError, default, resolve
from moejax.data.tokenizers import open_tokenizer


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_json_tokenizer(tmp_path / "model")


def test_the_rows_of_the_embedding_are_the_ids_unless_they_are_set(path):
    num_ids = open_tokenizer(path).vocab_size
    for given, expected in ((0, num_ids), (num_ids, num_ids), (num_ids + 64, num_ids + 64)):
        recipe = default()
        recipe.data.tokenizer = "model/tokenizer.json"
        recipe.model.vocab_size = given
        complete_vocabulary(recipe)
        assert recipe.is_locked
        config = resolve(recipe)
        assert (config.vocab_size, config.data.tokenizer) == (expected, str(path))
    recipe.model.vocab_size = num_ids - 1
    with pytest.raises(ConfigError, match=f"has {num_ids} ids, and the embedding only"):
        complete_vocabulary(recipe)


def test_a_recipe_may_lack_sections(path):
    recipe = ConfigDict({"data": {"tokenizer": "model/tokenizer.json"}}).lock()
    complete_vocabulary(recipe)
    assert resolve(recipe).vocab_size == open_tokenizer(path).vocab_size


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": 3},
        {"data": {}},
        {"data": {"tokenizer": 3}},
        {"data": {"tokenizer": "bytes"}, "model": 3},
        {"data": {"tokenizer": "model/tokenizer.json"}, "model": {"vocab_size": "many"}},
        {"data": {"tokenizer": "gone.json"}, "model": {"vocab_size": 9}},
    ],
)
def test_what_is_wrong_elsewhere_is_left_to_others(path, sections):
    recipe = ConfigDict(sections).lock()
    complete_vocabulary(recipe)
    assert recipe.to_dict().get("model") == sections.get("model")
