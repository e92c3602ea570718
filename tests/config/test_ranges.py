"""Numbers and their ranges, and leaves that are read from text."""

import math
import time

import pytest

from cases.config import nested, refusal
from moejax.config import LOSS_WEIGHTS, declared, divisors, read_value, resolve
from moejax.config.errors import ConfigError

AT_LEAST_ONE = (
    "model.num_layers",
    "model.d_model",
    "attention.num_heads",
    "attention.num_kv_heads",
    "model.d_ff",
    "data.seq_len",
    "train.num_steps",
    "train.batch_size",
    "train.accumulation",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_nonfinite_steps",
    "moe.every",
    "moe.top_k",
    "moe.num_groups",
    "moe.top_k_groups",
    "moe.sinkhorn_iterations",
)
AT_LEAST_ZERO = (
    "moe.num_experts",
    "moe.d_expert",
    "moe.num_shared_experts",
    "moe.first_dense",
    "train.eval_every",
    "train.seed",
    "moe.d_router",
    "moe.slots_per_expert",
)
NOT_NEGATIVE = (
    "train.step_limit_s",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "moe.capacity_factor",
    "moe.eval_capacity_factor",
    "moe.bias_rate",
    "moe.route_scale",
    "moe.noise_scale",
    *[f"moe.{weight}" for weight in LOSS_WEIGHTS],
)
FRACTIONS = (
    "optimizer.final_fraction",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.warmup_fraction",
    "optimizer.decay_fraction",
    "moe.jitter",
    "moe.mixer_threshold",
)
OUT_OF_RANGE = [
    *[(key, 0) for key in AT_LEAST_ONE],
    *[(key, -1) for key in AT_LEAST_ZERO],
    *[(key, value) for value in (-0.1, math.nan, math.inf) for key in NOT_NEGATIVE],
    *[(key, value) for value in (-0.1, 1.1, math.nan) for key in FRACTIONS],
    ("attention.rope_theta", 0.5),
    ("train.seed", 2**31),
    ("moe.top_k", 16),
    ("data.vocab_size", 511),
    ("data.vocab_size", 65_537),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_an_error_that_names_key_and_value(key, value):
    message = refusal({key: value})
    assert message.startswith(f"{key}={value} must be "), message


HUGE = (10**400, 10**5000, -(10**400))


@pytest.mark.parametrize(
    "key", [each.key for each in declared().values() if each.annotation in (int, float)]
)
def test_absurd_numbers_are_refused_at_once(key):
    if declared()[key].annotation is float:
        absurd = (1e31, math.nan, math.inf, -math.inf, *HUGE)
    else:
        large = 10**9 if declared()[key].leaf.at_most == 10_000 else 10**12
        absurd = (large, *HUGE)
    for value in absurd:
        started = time.perf_counter()
        message = refusal({key: value})
        assert message.startswith(f"{key}=")
        assert len(message) < 250
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
        (
            "optimizer.weight_decay",
            math.nan,
            "optimizer.weight_decay=nan must be at least 0 and finite",
        ),
        (
            "moe.exchange_buffer",
            math.inf,
            "moe.exchange_buffer=inf must be above 0 and at most 1000000",
        ),
        (
            "moe.exchange_buffer",
            1e-60,
            "moe.exchange_buffer=1e-60 must be above 0 and at most 1000000, and is 0 in float32",
        ),
        ("mesh.tensor", 0, "mesh.tensor=0 must be at least 1, or -1"),
    ],
)
def test_a_message_names_the_bound_that_counts_in_plain_numbers(key, value, text):
    assert refusal({key: value}) == text


def test_a_bound_itself_is_accepted_although_float32_cannot_hold_it():
    assert resolve(nested({"moe.jitter": 0.99})).moe.jitter == 0.99


def test_divisors_are_found_at_once_and_the_nearest_of_many_are_named():
    assert divisors(16) == "1, 2, 4, 8, 16" and divisors(1) == "1"
    started = time.perf_counter()
    assert divisors(2**31 - 1) == f"1, {2**31 - 1}"
    near = [int(number) for number in divisors(720_720, near=1000).split(", ")]
    assert len(near) == 12 and {990, 1001} <= set(near) and near == sorted(near)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("moe.num_experts", "0x10", 16),
        ("moe.num_experts", " 8 ", 8),
        ("model.remat", "False", False),
        ("model.remat", "true", True),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("data.files", " a b", " a b"),
        ("moe.router", "hash", "hash"),
    ],
)
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
