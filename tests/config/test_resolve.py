"""The configuration: what is refused and how, and what is derived."""

import dataclasses
import json
import re
import typing

import jax
import pytest
from ml_collections import ConfigDict

from cases.config import nested, other_value, refusal
from moejax.config import (
    ROUTER_RULES,
    SECTIONS,
    ConfigError,
    check_key,
    check_vocabulary,
    default,
    leaves,
    resolve,
    resolve_recorded,
    to_config_dict,
    to_dict,
    with_defaults,
)
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS
from moejax.moe.router import ROUTERS

# Keys and types
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("moe.num_expert", "moe.num_experts"),
        ("moe.topk", "moe.top_k"),
        ("model.n_layers", "model.num_layers"),
        ("train.num_step", "train.num_steps"),
        ("optimizer.learning_rte", "optimizer.learning_rate"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_one(wrong, nearest):
    message = refusal({wrong: 1})
    assert wrong in message and message.endswith(f"the nearest is {nearest}")
    with pytest.raises(ConfigError, match=nearest):
        check_key(wrong)


def test_an_unknown_section_is_an_error_that_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match="optimiser is not a config section; the nearest is optimizer"
    ):
        resolve({"optimiser": {}})


def test_a_section_that_is_no_mapping_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="moe"):
        resolve({"moe": 3})


@pytest.mark.parametrize(
    ("key", "value", "type_name"),
    [
        ("moe.num_experts", 8.0, "a whole number"),
        ("moe.num_experts", "8", "a whole number"),
        ("moe.num_experts", True, "a whole number"),
        ("moe.num_experts", None, "a whole number"),
        ("moe.renormalize", 1, "True or False"),
        ("moe.balance_weight", "0.1", "a number"),
        ("moe.balance_weight", True, "a number"),
        ("data.files", 3, "text"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_key_value_and_type(key, value, type_name):
    message = refusal({key: value})
    assert message.startswith(f"{key}={value!r} ") and message.endswith(f"must be {type_name}")


def test_whole_numbers_are_accepted_for_fractions():
    resolved = resolve({"moe": {"balance_weight": 1}})
    assert resolved.moe.balance_weight == 1.0 and type(resolved.moe.balance_weight) is float


def literal_leaves():
    """Returns the keys of leaves with a fixed list of choices, and their choices."""
    literals = [(key, hint) for key, hint in leaves() if typing.get_origin(hint) is typing.Literal]
    choices = [(key, typing.get_args(hint)) for key, hint in literals]
    return [*choices, ("moe.router", tuple(ROUTER_RULES))]


@pytest.mark.parametrize(("key", "choices"), literal_leaves())
def test_a_name_that_is_no_choice_is_refused_with_the_nearest_choice(key, choices):
    message = refusal({key: choices[-1] + "x"})
    assert f"{key}='{choices[-1]}x'" in message and ", ".join(choices) in message
    assert message.endswith(f"the nearest is {choices[-1]}")


def test_a_tokenizer_is_a_choice_or_a_file_for_which_the_rows_are_known():
    message = refusal({"data.tokenizer": "bpes"})
    assert "data.tokenizer='bpes' must be one of bytes, bpe, or the name of a file" in message
    assert message.endswith("the nearest is bpe")
    message = refusal({"data.tokenizer": "some/tokenizer"})
    assert message.startswith("model.vocab_size=0 ") and "data.tokenizer=some/tokenizer" in message
    config = resolve(nested({"data.tokenizer": "tokenizer.json", "model.vocab_size": 700}))
    assert (config.vocab_size, config.num_token_ids, config.num_tokenizer_ids) == (700, 700, 700)
    check_vocabulary(config)
    assert "data.vocab_size=600" in refusal(
        {"data.tokenizer": "a/b", "model.vocab_size": 700, "data.vocab_size": 600}
    )


def test_the_choices_of_routers_and_grouped_products_are_the_tables():
    choices = dict(literal_leaves())
    assert set(ROUTER_RULES) == {*ROUTERS, "expert_choice", "soft"}
    scores = set()
    for rules in ROUTER_RULES.values():
        scores.update(rules.scores)
    assert set(choices["moe.score"]) == scores | {"auto"}
    assert "auto" not in scores
    assert set(choices["moe.grouped_matmul"]) == {"auto", *IMPLEMENTATIONS}
    dtypes = choices["model.compute_dtype"]
    assert tuple(jax.numpy.dtype(name).name for name in dtypes) == dtypes


@pytest.mark.parametrize("source", [None, [], "moe", 3, [("moe", {})]])
def test_a_configuration_that_is_no_mapping_is_refused(source):
    with pytest.raises(ConfigError, match="it must be sections of leaves"):
        resolve_recorded(source)


@pytest.mark.parametrize(
    ("wrong", "known", "near"),
    [
        ("moe.router", "topk", "softmax_topk"),
        ("moe.router", "deepseek", "sigmoid_topk"),
        ("data.source", "txt", "files"),
        ("data.source", "text", "files"),
        ("data.source", "local", "files"),
    ],
)
def test_a_common_name_is_answered_with_the_choice_that_is_meant(wrong, known, near):
    assert refusal({wrong: known}).endswith(f"the nearest is {near}")


# Combinations
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.d_model": 30}, ["model.d_model=30", "attention.num_heads=4", "use 32"]),
        # Heads of odd width:
        ({"model.d_model": 12}, ["model.d_model=12", "attention.num_heads=4", "use "]),
        (
            {"attention.num_kv_heads": 3},
            ["attention.num_heads=4", "attention.num_kv_heads=3", "1, 2, 4"],
        ),
        ({"moe.router": "switch"}, ["moe.router=switch", "moe.top_k=2", "1"]),
        ({"moe.top_k": 1}, ["moe.renormalize=True", "moe.top_k=1", "moe.renormalize=False"]),
        ({"moe.top_k": 3}, ["model.d_ff=1024", "moe.top_k=3", "set moe.d_expert"]),
        (
            {"moe.dispatch": "capacity", "moe.capacity_factor": 8.5},
            ["moe.capacity_factor=8.5", "moe.num_experts=8"],
        ),
        (
            {"moe.first_dense": 4},
            ["model.num_layers=4", "moe.first_dense=4", "moe.every=1", "no MoE layer"],
        ),
        ({"moe.first_dense": 9}, ["model.num_layers=4", "moe.first_dense=9", "no MoE layer"]),
        ({"moe.every": 5}, ["model.num_layers=4", "moe.every=5", "no MoE layer"]),
        ({"data.source": "tfds"}, ["data.source=tfds", "data.name", "data.source_dir"]),
        ({"data.source": "files"}, ["data.source=files", "data.files"]),
        (
            {"train.accumulation": 3},
            ["train.batch_size=16", "train.accumulation=3", "1, 2, 4, 8, 16"],
        ),
        (
            {
                "optimizer.schedule": "wsd",
                "optimizer.warmup_fraction": 0.6,
                "optimizer.decay_fraction": 0.6,
            },
            ["optimizer.warmup_fraction=0.6", "optimizer.decay_fraction=0.6"],
        ),
    ],
)
def test_an_impossible_combination_is_refused_by_every_key_involved(changes, parts):
    message = refusal(changes)
    assert all(part in message for part in parts), message


def test_the_remedies_that_messages_name_work():
    assert resolve(nested({"model.d_model": 32})) and resolve(nested({"attention.num_kv_heads": 1}))
    assert resolve(nested({"moe.top_k": 1, "moe.renormalize": False})).moe.d_expert == 1024
    assert resolve(nested({"moe.top_k": 3, "moe.d_expert": 341}))
    for d_model in range(1, 40):
        try:
            resolve(nested({"model.d_model": d_model}))
        except ConfigError as error:
            assert resolve(nested({"model.d_model": int(re.search(r"use (\d+)", str(error))[1])}))


def test_more_choices_than_experts_are_refused_before_their_width():
    assert refusal({"moe.top_k": 9}).startswith(
        "moe.top_k=9 must be between 1 and moe.num_experts=8"
    )


def test_leaves_that_a_dense_model_does_not_read_do_not_refuse_it():
    unread = {"moe.num_experts": 0, "moe.first_dense": 9, "moe.top_k": 3}
    assert resolve(nested(unread)).num_moe_layers == 0


# Derived values and round trips
# -------------------------------------------------------------------------------------------------


def test_the_width_of_an_expert_is_derived_unless_it_is_given():
    assert resolve({}).moe.d_expert == 1024 // 2
    assert resolve(nested({"moe.top_k": 4})).moe.d_expert == 256
    assert resolve(nested({"moe.d_expert": 100})).moe.d_expert == 100
    assert resolve(nested({"moe.num_experts": 0})).moe.d_expert == 0


def test_derived_properties_follow_their_sources():
    assert resolve({}).vocab_size == 4096
    assert resolve(nested({"data.tokenizer": "bytes"})).vocab_size == 320
    assert resolve(nested({"attention.num_heads": 8, "attention.num_kv_heads": 8})).head_dim == 32
    pattern = {"model.num_layers": 7, "moe.first_dense": 1, "moe.every": 2}
    assert resolve(nested(pattern)).num_moe_layers == 3


@pytest.mark.parametrize("key", [key for key, _ in leaves()])
def test_every_leaf_can_be_set_and_survives_config_dict_json_and_back(key):
    value, more = other_value(key)
    resolved = resolve(nested({key: value} | more))
    section, name = key.split(".")
    assert getattr(getattr(resolved, section), name) == value
    assert getattr(SECTIONS[section](), name) != value
    assert resolve(to_config_dict(resolved)) == resolved
    assert resolve(json.loads(json.dumps(to_dict(resolved)))) == resolved


def test_the_default_config_dict_is_locked_and_holds_every_leaf():
    source = default()
    assert isinstance(source, ConfigDict) and source.is_locked
    values = {}
    for section, given in source.to_dict().items():
        values |= {f"{section}.{name}": value for name, value in given.items()}
    assert set(values) == {key for key, _ in leaves()}
    assert None not in values.values()
    with pytest.raises(AttributeError):
        source.moe.num_expert = 3


def test_a_resolved_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).moe.num_experts = 3


def test_a_run_that_was_recorded_with_leaves_of_attention_in_the_section_model_is_read():
    recorded = {"model": {"d_model": 48, "num_heads": 6, "num_kv_heads": 3, "qk_norm": True}}
    config = resolve_recorded(recorded)
    assert (config.attention.num_heads, config.attention.num_kv_heads) == (6, 3)
    assert (config.attention.qk_norm, config.model.d_model) == ("head", 48)
    assert with_defaults(recorded)["attention"]["num_heads"] == 6
    assert resolve_recorded({"model": {"qk_norm": False}}) == resolve({})
    with pytest.raises(ConfigError, match=r"model\.num_heads .*attention\.num_heads"):
        resolve(recorded)


def test_an_embedding_of_its_own_size_must_have_a_row_for_every_id_that_is_trained_on():
    config = resolve(nested({"model.vocab_size": 300, "data.tokenizer": "bytes"}))
    assert (config.vocab_size, config.num_token_ids) == (300, 300)
    check_vocabulary(config)
    check_vocabulary(resolve({}))
    few = resolve(nested({"model.vocab_size": 258, "data.tokenizer": "bytes"}))
    with pytest.raises(ConfigError, match=r"model\.vocab_size=258 must be at least 259"):
        check_vocabulary(few)
