"""Ids of arms: sweeps of earlier versions are found again."""

import dataclasses

import pytest

from cases.config import nested, other_value
from moejax.config import declared, resolve, resolve_recorded, with_defaults
from moejax.sweeps.ids import FIRST_LEAVES, LEFT_OUT, hash_config

# As they were when sweeps first had ids: a change here loses the arms of every sweep there is.
FIRST_IDS = [
    ({}, "def3efb08887b7cc5ff980e1421bc86e7718334488eb66c3d7990b8185df2dfa"),
    (
        {
            "moe": {"num_experts": 4, "router": "noisy_topk", "load_weight": 0.1},
            "data": {"tokenizer": "bytes", "directory": "elsewhere"},
        },
        "2f5689af4271370fc3a7f1e2e38aafa1bacce6b928501f03bee5c7785dbeeb46",
    ),
    (
        {"moe": {"num_experts": 0}, "optimizer": {"schedule": "wsd"}},
        "9732ffd611238a1b7b0f7adbef286934799c8e62e1f7196b41320b14a0edf6a4",
    ),
]


@pytest.mark.parametrize(("source", "digits"), FIRST_IDS)
def test_a_configuration_has_the_id_that_it_always_had(source, digits):
    assert hash_config(resolve(source)) == digits


def test_every_leaf_that_changes_what_is_computed_changes_the_id():
    before = hash_config(resolve({}))
    for key in declared():
        value, with_it = other_value(key)
        config = resolve_recorded(nested({key: value} | with_it))
        assert (hash_config(config) == before) is (key in LEFT_OUT), key


def test_a_new_leaf_changes_no_id_until_it_differs_from_its_default():
    late = set()
    for key, each in declared().items():
        if each.name not in FIRST_LEAVES[each.section].split():
            late.add(key)
    assert "data.text_field" in late and "train.check_memory" in late
    config = resolve({"data": {"source": "files", "files": "x.jsonl"}})
    body = dataclasses.replace(config, data=dataclasses.replace(config.data, text_field="body"))
    assert hash_config(body) != hash_config(config)


def test_the_first_leaves_still_exist():
    names = {f"{section}.{name}" for section, text in FIRST_LEAVES.items() for name in text.split()}
    assert names <= declared().keys() and len(names) == 123


def test_what_was_recorded_before_a_leaf_existed_has_its_default():
    recorded = {"data": {"source": "synthetic"}, "moe": {}}
    filled = with_defaults(recorded)
    assert filled["data"]["source"] == "synthetic" and filled["data"]["text_field"] == "text"
    assert filled["train"]["check_memory"] is True
