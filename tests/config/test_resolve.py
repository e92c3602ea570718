"""The configuration: what is refused and how, what is derived, and that no leaf and no sharding rule is dead."""

import ast
import dataclasses
import importlib.util
import json
import math
import time
import typing
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from cases.config import nested, other_value
from moejax import config as moejax_config
from moejax.config import (
    ROUTER_RULES,
    Config,
    ConfigError,
    Knobs,
    MeshConfig,
    ScheduleConfig,
    declared,
    default,
    divisors,
    leaves,
    read_value,
    resolve,
    resolve_recorded,
    to_config_dict,
    to_dict,
)
from moejax.config.sections.alarms import RULES as ALARM_RULES
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS
from moejax.models import Decoder
from moejax.moe.balancing.losses import LOSSES
from moejax.moe.router import ROUTERS
from moejax.sharding import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    _groups,
    make_mesh,
    partition_spec,
    resolve_mesh,
)

ROOT = Path(__file__).parents[2]
SECTIONS = {section.name: type(section.default) for section in dataclasses.fields(Config)}
RECIPES = sorted((ROOT / "configs").rglob("*.py"))

PERMISSIONS = {("moe", "allow_noncausal")}  # what only decides whether a configuration is refused
KNOBS = {
    field.name for field in dataclasses.fields(Knobs)
}  # read under that name, see the test of knobs


def refusal(changes):
    """The one-line message with which `changes` are refused."""
    with pytest.raises(ConfigError) as caught:
        resolve(nested(changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Keys and types
# ---------------------------------------------------------------------------------------------------


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
        moejax_config.check_key(wrong)


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
def test_a_value_of_the_wrong_type_is_an_error_that_names_key_value_and_type(key, value, type_name):
    message = refusal({key: value})
    assert message.startswith(f"{key}={value!r} ") and message.endswith(f"must be {type_name}")


def test_whole_numbers_are_accepted_for_fractions():
    resolved = resolve({"moe": {"balance_weight": 1}})
    assert resolved.moe.balance_weight == 1.0 and type(resolved.moe.balance_weight) is float


def literal_leaves():
    literals = [
        (key, typing.get_args(hint))
        for key, hint in leaves()
        if typing.get_origin(hint) is typing.Literal
    ]
    return [*literals, ("moe.router", tuple(ROUTER_RULES))]


@pytest.mark.parametrize(("key", "choices"), literal_leaves())
def test_a_name_that_is_no_choice_is_an_error_that_lists_the_choices_and_the_nearest(key, choices):
    message = refusal({key: choices[-1] + "x"})
    assert f"{key}='{choices[-1]}x'" in message and ", ".join(choices) in message
    assert message.endswith(f"the nearest is {choices[-1]}")


def test_the_choices_of_routers_and_grouped_products_are_the_tables():
    choices = dict(literal_leaves())
    assert set(ROUTER_RULES) == {*ROUTERS, "expert_choice", "soft"}
    assert {score for rules in ROUTER_RULES.values() for score in rules.scores} == {
        *choices["moe.score"]
    } - {"auto"}
    assert set(choices["moe.grouped_matmul"]) == {"auto", *IMPLEMENTATIONS}
    assert [jax.numpy.dtype(name).name for name in choices["model.compute_dtype"]] == [
        *choices["model.compute_dtype"]
    ]


# Ranges and combinations
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, 0) for key in (
            "model.num_layers", "model.d_model", "model.num_heads", "model.num_kv_heads", "model.d_ff", "data.seq_len",
            "train.num_steps", "train.batch_size", "train.accumulation", "train.log_every", "train.checkpoint_every",
            "train.keep_checkpoints", "train.max_nonfinite_steps", "moe.every", "moe.top_k", "moe.num_groups",
            "moe.top_k_groups", "moe.sinkhorn_iterations",
        )],
        *[(key, -1) for key in (
            "moe.num_experts", "moe.d_expert", "moe.num_shared_experts", "moe.first_dense", "train.eval_every",
            "train.seed", "moe.d_router", "moe.slots_per_expert",
        )],
        *[(key, value) for value in (-0.1, float("nan"), float("inf")) for key in (
            "moe.balance_weight", "moe.z_weight", "train.step_limit_s", "optimizer.learning_rate",
            "optimizer.weight_decay",
            "optimizer.clip_norm", "moe.capacity_factor", "moe.eval_capacity_factor", "moe.bias_rate",
            "moe.route_scale", "moe.noise_scale", "moe.sequence_balance_weight", "moe.importance_weight",
            "moe.load_weight", "moe.vmoe_load_weight",
        )],
        *[(key, value) for value in (-0.1, 1.1, float("nan")) for key in (
            "optimizer.final_fraction", "optimizer.beta1", "optimizer.beta2", "optimizer.warmup_fraction",
            "optimizer.decay_fraction", "moe.jitter", "moe.mixer_threshold",
        )],
        ("model.rope_theta", 0.5),
        ("train.seed", 2**31),
        ("moe.top_k", 16),
        ("data.vocab_size", 511),
        ("data.vocab_size", 65_537),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_an_error_that_names_key_and_value(key, value):
    message = refusal({key: value})
    assert message.startswith(f"{key}={value} must be "), message


@pytest.mark.parametrize(
    "key", [each.key for each in declared().values() if each.annotation in (int, float)]
)
def test_no_number_is_so_absurd_that_it_is_not_refused_at_once(key):
    absurd = [
        10**9 if declared()[key].leaf.at_most == 10_000 else 10**12,
        10**400,
        10**5000,
        -(10**400),
    ]
    if declared()[key].annotation is float:
        absurd = [1e31, math.nan, math.inf, -math.inf, 10**400, 10**5000, -(10**400)]
    for value in absurd:
        started = time.perf_counter()
        message = refusal({key: value})
        assert message.startswith(f"{key}=") and len(message) < 250
        assert time.perf_counter() - started < 1


@pytest.mark.parametrize("key", ["optimizer.beta1", "optimizer.beta2"])
def test_a_decay_that_is_1_in_float32_is_refused_and_one_below_it_is_not(key):
    for value in (1.0, 1 - 1e-9):
        assert refusal({key: value}).startswith(f"{key}={value} must be at least 0 and below 1")
    assert refusal({key: 1 - 1e-9}).endswith("and is 1 in float32")
    for value in (0.0, 0.5, 1 - 1e-6):
        assert resolve(nested({key: value}))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("moe.num_experts", -4, "moe.num_experts=-4 must be at least 0"),
        ("train.seed", 2**31, "train.seed=2147483648 must be at least 0 and at most 2147483647"),
        ("optimizer.weight_decay", math.nan, "optimizer.weight_decay=nan must be at least 0 and finite"),
        ("moe.exchange_buffer", math.inf, "moe.exchange_buffer=inf must be above 0 and at most 1000000"),
        ("moe.exchange_buffer", 1e-60, "moe.exchange_buffer=1e-60 must be above 0 and at most 1000000, "
         "and is 0 in float32"),
        ("mesh.tensor", 0, "mesh.tensor=0 must be at least 1, or -1"),
    ],
)  # fmt: skip
def test_a_message_names_the_bound_that_counts_in_plain_numbers(key, value, text):
    assert refusal({key: value}) == text


def test_a_bound_itself_is_accepted_although_float32_cannot_hold_it():
    assert resolve(nested({"moe.jitter": 0.99})).moe.jitter == 0.99


@pytest.mark.parametrize("source", [None, [], "moe", 3, [("moe", {})]])
def test_what_is_no_mapping_is_an_error_that_says_what_it_must_be(source):
    with pytest.raises(ConfigError, match="it must be sections of leaves"):
        moejax_config.resolve_recorded(source)


def test_divisors_are_found_at_once_and_the_nearest_of_many_are_named():
    assert divisors(16) == "1, 2, 4, 8, 16" and divisors(1) == "1"
    started = time.perf_counter()
    assert divisors(2**31 - 1) == f"1, {2**31 - 1}"
    near = [int(number) for number in divisors(720_720, near=1000).split(", ")]
    assert len(near) == 12 and {990, 1001} <= set(near) and near == sorted(near)
    assert time.perf_counter() - started < 1


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
def test_a_name_that_people_use_is_led_to_the_choice_that_is_meant(wrong, known, near):
    assert refusal({wrong: known}).endswith(f"the nearest is {near}")


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("moe.num_experts", "0x10", 16), ("moe.num_experts", " 8 ", 8), ("model.remat", "False", False),
        ("model.remat", "true", True), ("optimizer.learning_rate", "1e-3", 1e-3), ("data.files", " a b", " a b"),
        ("moe.router", "hash", "hash"),
    ],
)  # fmt: skip
def test_text_is_read_as_the_type_of_its_leaf(key, text, found):
    value = read_value(key, text)
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("moe.num_experts", "eight", "moe.num_experts='eight' must be a whole number"),
        ("moe.num_experts", "4.5", "moe.num_experts='4.5' must be a whole number"),
        ("model.remat", "maybe", "model.remat='maybe' must be True or False"),
        ("moe.z_weight", "small", "moe.z_weight='small' must be a number"),
        ("moe.num_experts", "9" * 5000, "must be a whole number"),
    ],
)
def test_text_that_is_no_value_of_a_leaf_is_refused_in_plain_words(key, text, message):
    with pytest.raises(ConfigError) as caught:
        read_value(key, text)
    assert message in str(caught.value) and len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model.d_model": 30}, ["model.d_model=30", "model.num_heads=4", "use 32"]),
        (
            {"model.d_model": 12},
            ["model.d_model=12", "model.num_heads=4", "use "],
        ),  # heads of odd width
        ({"model.num_kv_heads": 3}, ["model.num_heads=4", "model.num_kv_heads=3", "1, 2, 4"]),
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
def test_an_impossible_combination_is_an_error_that_names_every_key_involved(changes, parts):
    message = refusal(changes)
    assert all(part in message for part in parts), message


def test_the_remedies_that_messages_name_work():
    assert resolve(nested({"model.d_model": 32})) and resolve(nested({"model.num_kv_heads": 1}))
    assert resolve(nested({"moe.top_k": 1, "moe.renormalize": False})).moe.d_expert == 1024
    assert resolve(nested({"moe.top_k": 3, "moe.d_expert": 341}))
    for d_model in range(1, 40):
        try:
            resolve(nested({"model.d_model": d_model}))
        except ConfigError as error:
            assert resolve(nested({"model.d_model": int(str(error).split("use ")[1])}))


def test_more_choices_than_experts_are_refused_as_such_not_for_the_expert_width_derived_from_them():
    assert refusal({"moe.top_k": 9}).startswith(
        "moe.top_k=9 must be between 1 and moe.num_experts=8"
    )


def test_fields_that_a_dense_model_does_not_use_do_not_refuse_it():
    assert (
        resolve(nested({"moe.num_experts": 0, "moe.first_dense": 9, "moe.top_k": 3})).num_moe_layers
        == 0
    )


# Derived values and round trips
# -----------------------------------------------------------------------------------


def test_resolve_derives_the_width_of_an_expert_and_leaves_a_given_one_alone():
    assert resolve({}).moe.d_expert == 1024 // 2
    assert resolve(nested({"moe.top_k": 4})).moe.d_expert == 256
    assert resolve(nested({"moe.d_expert": 100})).moe.d_expert == 100
    assert resolve(nested({"moe.num_experts": 0})).moe.d_expert == 0


def test_derived_properties_follow_their_sources():
    assert (
        resolve({}).vocab_size == 4096
        and resolve(nested({"data.tokenizer": "bytes"})).vocab_size == 320
    )
    assert resolve(nested({"model.num_heads": 8, "model.num_kv_heads": 8})).head_dim == 32
    assert (
        resolve(
            nested({"model.num_layers": 7, "moe.first_dense": 1, "moe.every": 2})
        ).num_moe_layers
        == 3
    )


@pytest.mark.parametrize("key", [key for key, _ in leaves()])
def test_every_leaf_can_be_set_and_survives_config_dict_json_and_back(key):
    value, more = other_value(key)
    resolved = resolve(nested({key: value} | more))
    section, name = key.split(".")
    assert getattr(getattr(resolved, section), name) == value != getattr(SECTIONS[section](), name)
    assert resolve(to_config_dict(resolved)) == resolved
    assert resolve(json.loads(json.dumps(to_dict(resolved)))) == resolved


def test_the_default_config_dict_is_locked_and_holds_every_leaf():
    source = default()
    assert isinstance(source, ConfigDict) and source.is_locked
    assert {f"{s}.{name}" for s, leaves_ in source.to_dict().items() for name in leaves_} == {
        k for k, _ in leaves()
    }
    with pytest.raises(AttributeError):
        source.moe.num_expert = 3
    assert all(
        value is not None for section in source.to_dict().values() for value in section.values()
    )


def test_a_resolved_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).moe.num_experts = 3


def test_knobs_are_scalars_with_the_values_of_the_config():
    names = [
        field.name
        for field in dataclasses.fields(Knobs)
        if field.name not in ("seed", "learning_rate")
    ]
    values = {name: other_value(f"moe.{name}")[0] for name in names}
    others = {"moe.router": "noisy_topk", "optimizer.learning_rate": 2e-3, "train.seed": 2**31 - 1}
    # The weights of the load losses do not go with a selection bias: what is read is not in
    # question here.
    config = resolve_recorded(
        nested({f"moe.{name}": value for name, value in values.items()} | others)
    )
    knobs = Knobs.from_config(config)
    assert (knobs.seed.dtype, int(knobs.seed)) == (np.int32, 2**31 - 1)
    assert knobs.learning_rate == np.float32(2e-3)
    assert {name: float(getattr(knobs, name)) for name in names} == {
        n: np.float32(v) for n, v in values.items()
    }
    assert all(value.shape == () for value in jax.tree.leaves(knobs))
    assert all(getattr(knobs, name).dtype == np.float32 for name in (*names, "learning_rate"))


# No dead leaves
# ---------------------------------------------------------------------------------------------------


def attribute_reads():
    """(what it is read from, attribute) for each attribute read in moejax.

    Functions of moejax/config only validate, apart from those that derive layers from leaves.
    """
    for path in sorted((ROOT / "moejax").rglob("*.py")):
        is_config = "config" in path.relative_to(ROOT).parts
        tree = ast.parse(path.read_text())
        if is_config and path.name != "layer_pattern.py":
            tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                # The properties of a section read their own leaves.
                owner = "config" if owner == "self" and is_config else owner.lstrip("_")
                yield owner, node.attr


# Schedules are read in a loop over them (`training/schedules.py`); tests/training/test_schedules.py
# follows each.
SCHEDULED = {("schedule", field.name) for field in dataclasses.fields(ScheduleConfig)}

# Thresholds are read in a loop over the rules (`training/health/alarms.py`); its test tries each.
WATCHED = {("alarms", rule) for rule in ALARM_RULES}


def dead_leaves(reads):
    """Leaves that nobody reads from something named after their section or `config`, apart from validation."""
    return [
        key
        for key, _ in leaves()
        for section, name in [key.split(".")]
        if (section, name) not in reads
        and ("config", name) not in reads
        and not (section == "moe" and name in KNOBS)
    ]


def test_every_leaf_of_the_config_is_read_somewhere_besides_its_validation():
    reads = set(attribute_reads())
    reads |= PERMISSIONS | SCHEDULED | WATCHED
    assert dead_leaves(reads) == []


def test_every_knob_is_read_somewhere():
    reads = {attribute for owner, attribute in attribute_reads() if owner == "knobs"}
    # Weights are read in a loop over the losses: getattr(knobs, f"{name}_weight").
    reads |= {f"{name}_weight" for name in LOSSES}
    assert {field.name for field in dataclasses.fields(Knobs)} <= reads


def test_a_leaf_that_nobody_reads_would_be_found():
    reads = {read for read in attribute_reads() if read[1] != "qk_norm"}
    reads |= PERMISSIONS | SCHEDULED | WATCHED
    assert dead_leaves(reads) == ["model.qk_norm"]


# Recipes
# ----------------------------------------------------------------------------------------------------------


def load_recipe(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_resolves_and_its_header_says_what_it_is_and_how_to_run_it(path):
    recipe = load_recipe(path)
    source = recipe.get_config()
    assert isinstance(source, ConfigDict) and source.is_locked
    assert isinstance(resolve(source), Config)
    header = recipe.__doc__
    command = f"--config={path.relative_to(ROOT).as_posix()}"
    assert header and command in header, "the header names the command that runs it"


def test_there_is_a_recipe_for_every_router():
    routers = {
        load_recipe(path).get_config().moe.router
        for path in RECIPES
        if path.parent.name == "routers"
    }
    assert routers == ROUTER_RULES.keys()


# The reference products are for tests; every other layer is for models deeper than these.
WITHOUT_A_RECIPE = {"moe.grouped_matmul", "moe.every"}


def test_every_option_of_experts_schedules_and_alarms_is_set_by_a_recipe():
    options = {key for key, _ in leaves() if key.split(".")[0] in ("moe", "schedule", "alarms")}
    lines = "".join(path.read_text() for path in RECIPES)
    assert {key for key in options if f"config.{key} = " not in lines} == WITHOUT_A_RECIPE


# Mesh
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "resolved"),
    [
        ({}, (8, 1, 1, 1, 1, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 4, 1, 1, 1, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 1, 1, 2, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "expert": 2}, (2, 2, 2, 1, 1, 1, 1, 1)),
        ({"expert": 2, "dcn_expert": 2}, (2, 1, 2, 1, 1, 1, 1, 2)),
        ({"data": 1, "fsdp": 2, "dcn_data": 2, "dcn_fsdp": -1}, (1, 2, 1, 1, 1, 2, 2, 1)),
    ],
)
def test_the_open_size_of_a_mesh_takes_all_remaining_devices(sizes, resolved):
    assert dataclasses.astuple(resolve_mesh(MeshConfig(**sizes), 8)) == resolved


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"expert": 3}, ["mesh.expert=3", "8 devices", "1, 2, 4, 8"]),
        ({"data": 2, "expert": 2}, ["mesh.data=2", "mesh.expert=2", "8 devices", "1, 2, 4, 8"]),
        ({"data": 16}, ["mesh.data=16", "1, 2, 4, 8"]),
        ({"data": -1, "fsdp": -1}, ["mesh.data=-1", "mesh.fsdp=-1", "only one"]),
        ({"tensor": 0}, ["mesh.tensor=0", "at least 1", "-1"]),
        ({"tensor": -2}, ["mesh.tensor=-2", "at least 1", "-1"]),
        ({"dcn_expert": 3}, ["mesh.dcn_expert=3", "8 devices", "1, 2, 4, 8"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_that_names_sizes_that_would(sizes, parts):
    with pytest.raises(ConfigError) as caught:
        resolve_mesh(MeshConfig(**sizes), 8)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"mesh.expert": 8, "moe.num_experts": 12}, ["moe.num_experts=12", "mesh.expert=8", "8 or 16"]),
        ({"mesh.expert": 8, "moe.num_experts": 4}, ["moe.num_experts=4", "mesh.expert=8", "use 8"]),
        ({"mesh.fsdp": 8, "model.d_model": 36, "model.num_heads": 1, "model.num_kv_heads": 1},
         ["model.d_model=36", "mesh.fsdp=8", "32 or 40"]),
        ({"mesh.tensor": 4}, ["model.num_kv_heads=2", "mesh.tensor=4", "use 4"]),
        ({"mesh.tensor": 8, "model.num_kv_heads": 4}, ["model.num_heads=4", "mesh.tensor=8", "use 8"]),
        ({"mesh.tensor": 2, "moe.d_expert": 25}, ["moe.d_expert=25", "mesh.tensor=2", "24 or 26"]),
        ({"mesh.tensor": 2, "moe.num_experts": 0, "model.d_ff": 25}, ["model.d_ff=25", "mesh.tensor=2", "24 or 26"]),
        ({"mesh.tensor": 2, "data.vocab_size": 999}, ["data.vocab_size=999", "mesh.tensor=2", "998 or 1000"]),
        ({"mesh.expert": 4, "mesh.dcn_expert": 2, "moe.num_experts": 4},
         ["moe.num_experts=4", "mesh.dcn_expert * mesh.expert = 8", "use 8"]),
        ({"mesh.context": 2, "data.seq_len": 255}, ["data.seq_len=255", "mesh.context=2", "254 or 256"]),
        ({"mesh.context": 2, "moe.router": "soft", "moe.allow_noncausal": True}, ["mesh.context=2", "mesh.context=1"]),
        ({"mesh.dcn_data": 2, "train.batch_size": 12},
         ["train.batch_size=12", "mesh.dcn_data * mesh.data * mesh.fsdp * mesh.expert = 8", "16"]),
        ({"mesh.expert": 2, "moe.exchange_chunks": 3, "data.seq_len": 8},
         ["moe.exchange_chunks=3", "16 tokens of a device", "1, 2, 4, 8, 16"]),
        ({"mesh.expert": 2, "moe.per_layer": "0: exchange_chunks=3", "data.seq_len": 8},
         ["moe.exchange_chunks=3", "16 tokens of a device", "1, 2, 4, 8, 16"]),
        ({"train.batch_size": 12}, ["train.batch_size=12", "mesh.data * mesh.fsdp * mesh.expert = 8", "16"]),
        ({"train.batch_size": 16, "train.accumulation": 4}, ["train.accumulation=4", "microbatches of 4", "32"]),
    ],
)  # fmt: skip
def test_a_size_that_the_mesh_cannot_split_is_an_error_that_names_sizes_that_would_work(
    changes, parts
):
    with pytest.raises(ConfigError) as caught:
        make_mesh(resolve(nested(changes)))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_mesh_has_all_axes_and_auto_types_and_one_device_is_a_mesh_too():
    mesh = make_mesh(resolve(nested({"mesh.expert": 4, "mesh.tensor": 2})))
    assert dict(mesh.shape) == {
        "data": 1,
        "fsdp": 1,
        "dcn_expert": 1,
        "expert": 4,
        "context": 1,
        "tensor": 2,
    }
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert dict(make_mesh(resolve({}), jax.devices()[:1]).shape) == dict.fromkeys(MESH_AXES, 1)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def test_fast_axes_stay_within_a_group_of_devices_and_slow_ones_go_from_one_group_to_the_next():
    mesh = make_mesh(
        resolve(nested({"mesh.data": 1, "mesh.fsdp": 2, "mesh.dcn_fsdp": 2, "mesh.expert": 2}))
    )
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert dict(mesh.shape) == {
        "data": 1,
        "fsdp": 4,
        "dcn_expert": 1,
        "expert": 2,
        "context": 1,
        "tensor": 1,
    }
    assert ids.reshape(4, 2).tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]  # of `fsdp` the first two in one group
    mesh = make_mesh(resolve(nested({"mesh.data": 2, "mesh.dcn_data": 2, "mesh.dcn_expert": 2})))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids.reshape(4, 2).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_no_slice_is_torn_apart_and_slices_ask_for_slow_axes():
    devices = [FakeDevice(i, slice_index=i % 2, platform="tpu") for i in range(8)]
    assert [[device.id for device in group] for group in _groups(devices, 2)] == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]
    assert [len(group) for group in _groups(devices, 4)] == [2, 2, 2, 2]
    assert {device.slice_index for device in _groups(devices, 4)[1]} == {0}
    for num_groups in (1, 3):
        with pytest.raises(
            ConfigError, match=f"= {num_groups} does not fit 2 slices.*use mesh.dcn_data=2"
        ):
            _groups(devices, num_groups)
    hosts = [FakeDevice(i, slice_index=i % 2, platform="gpu") for i in range(8)]
    assert _groups(hosts, 1) == [hosts]
    assert [[device.slice_index for device in group] for group in _groups(hosts, 2)] == [
        [0] * 4,
        [1] * 4,
    ]


# Sharding rules
# ---------------------------------------------------------------------------------------------------


def parameter_axes(changes):
    """The logical axes of every parameter of a config, with its shape."""
    model = nnx.eval_shape(lambda: Decoder(resolve(nested(changes)), rngs=nnx.Rngs(params=0)))
    params = jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return [(param.axes, param.shape) for param in params]


@pytest.fixture(scope="module")
def all_axes():
    every_part = {
        "model.qk_norm": True, "model.tied_embeddings": False, "moe.first_dense": 1, "moe.every": 2,
        "moe.num_shared_experts": 1, "moe.d_latent": 16,
    }  # fmt: skip
    return [
        *parameter_axes(every_part),
        *parameter_axes({}),
        *parameter_axes({"moe.num_experts": 0}),
    ]


def test_every_axis_of_every_parameter_has_a_name_and_a_rule(all_axes):
    for axes, shape in all_axes:
        assert len(axes) == len(shape)
        assert set(axes) <= set(RULES)
        partition_spec(axes)


def test_every_sharding_rule_is_used_by_a_parameter(all_axes):
    assert {axis for axes, _ in all_axes for axis in axes} == set(RULES)


def mesh_axes_of(axis):
    rule = RULES[axis] or ()
    return (rule,) if isinstance(rule, str) else rule


def test_no_parameter_would_be_split_twice_over_one_mesh_axis(all_axes):
    for axes, _ in all_axes:
        used = [mesh_axis for axis in axes for mesh_axis in mesh_axes_of(axis)]
        assert len(used) == len(set(used)), axes


def test_a_logical_axis_without_a_rule_is_an_error_that_names_it_and_the_known_ones():
    with pytest.raises(ValueError, match=r"'embd' has no rule .*'embed'"):
        partition_spec(("embd", "mlp"))
    assert partition_spec(("experts", "embed", "gate_up", "mlp")) == PartitionSpec(
        ("dcn_expert", "expert"), "fsdp", None, "tensor"
    )


def test_rules_name_axes_of_the_mesh_and_the_batch_is_split_over_all_but_context_and_tensor():
    assert {mesh_axis for axis in RULES for mesh_axis in mesh_axes_of(axis)} <= set(MESH_AXES)
    assert set(BATCH_AXES) == set(MESH_AXES) - {"context", "tensor"}


def test_the_dense_twin_differs_from_the_tiny_moe_in_its_experts_alone():
    moe, dense = (
        to_dict(
            resolve(load_recipe(Path(__file__).parents[2] / f"configs/tiny_{kind}.py").get_config())
        )
        for kind in ("moe", "dense")
    )
    assert {section for section in moe if moe[section] != dense[section]} == {"moe"}
    assert dense["moe"]["num_experts"] == 0
    assert moe["moe"]["top_k"] * moe["moe"]["d_expert"] == dense["model"]["d_ff"]
