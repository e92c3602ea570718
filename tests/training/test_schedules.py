"""Schedules of knobs: each function at its ends, and each leaf in the step that it scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cases.config import with_loss
from cases.training import initial_state, make, packed_batch, small_config
from moejax.config import LOSS_SPECS, ConfigError, Knobs, ScheduleConfig, resolve
from moejax.training.router_state import active_top_k_at
from moejax.training.schedules import factor, scheduled
from moejax.training.step import make_train_step, put_batch

NUM_STEPS = 11  # the last one is number 10


def factors(text, name="z_weight"):
    config = small_config(schedule={name: text}, train={"num_steps": NUM_STEPS})
    return [float(factor(config, name, jnp.int32(step))) for step in range(NUM_STEPS)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", np.ones(11)),
        ("linear:0", np.linspace(1, 0, 11)),
        ("linear:3", np.linspace(1, 3, 11)),
        ("cosine:0.2", 0.2 + 0.8 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2),
        ("exponential:0.01", 0.01 ** (np.arange(11) / 10)),
        ("step:0.5:0.25", [1] * 5 + [0.25] * 6),
        ("warmup:0.5", np.minimum(np.arange(11) / 5, 1)),
    ],
)
def test_a_schedule_goes_from_its_start_to_its_end_over_the_run(text, expected):
    np.testing.assert_allclose(factors(text), expected, atol=1e-6)


def test_an_exponential_schedule_stays_at_its_end_for_the_update_behind_the_last_step():
    config = small_config(schedule={"z_weight": "exponential:0.1"}, train={"num_steps": NUM_STEPS})
    np.testing.assert_allclose(factor(config, "z_weight", jnp.int32(NUM_STEPS + 3)), 0.1, rtol=1e-5)


NEEDS = {
    "capacity_factor": {"dispatch": "capacity"},
    "noise_scale": {"router": "noisy_topk"},
    "bias_rate": {"selection_bias": True},
    "jitter": {"jitter": 0.1},
    "expert_dropout": {"expert_dropout": 0.1},
    **{f"{name}_weight": with_loss(name) for name in LOSS_SPECS},
}


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(ScheduleConfig) if f.name != "top_k"]
)
def test_every_leaf_scales_the_knob_of_its_name_and_no_other(name):
    config = small_config(
        moe=NEEDS.get(name, {}), schedule={name: "linear:0.5"}, train={"num_steps": NUM_STEPS}
    )
    knobs = Knobs.from_config(config)
    now = scheduled(knobs, config, jnp.int32(10))
    for field in dataclasses.fields(Knobs):
        expected = getattr(knobs, field.name) * (0.5 if field.name == name else 1)
        np.testing.assert_allclose(getattr(now, field.name), expected, rtol=1e-6)
    assert getattr(knobs, name) > 0


def outputs(config, steps):
    setup = make(config)
    with jax.set_mesh(setup.mesh):
        state, step, batch = (
            initial_state(setup),
            make_train_step(setup),
            put_batch(packed_batch(config), setup),
        )
        found = []
        for _ in range(steps):
            state, output = step(state, batch, Knobs.from_config(config))
            found.append(jax.device_get(output))
    return found


def test_top_k_falls_during_training_and_tokens_then_visit_their_best_experts_only():
    config = small_config(
        moe={"top_k": 4, "renormalize": False},
        schedule={"top_k": "step:0.5:0.25"},
        train={"num_steps": 5},
        mesh={"data": 1},
    )
    found = outputs(config, 5)
    choices = [
        float(o.routing.assignments_E.sum(axis=1)[0] / o.routing.num_tokens[0]) for o in found
    ]
    assert choices == [4, 4, 1, 1, 1]
    assert all(np.all(np.isfinite(list(o.scalars.values()))) for o in found)
    assert [float(o.scalars["schedule/top_k"]) for o in found] == [1, 1, 0.25, 0.25, 0.25]
    assert int(active_top_k_at(config, 4, 0)) == 4 and int(active_top_k_at(config, 4, 4)) == 1


def test_a_bias_stays_once_its_rate_is_scheduled_to_zero():
    config = small_config(
        moe={"selection_bias": True, "bias_rate": 0.1}, train={"num_steps": 5}, mesh={"data": 1},
        schedule={"bias_rate": "step:0.5:0", "balance_weight": "linear:0"},
    )  # fmt: skip
    found = outputs(config, 5)
    ranges = [float(o.scalars["moe/bias_range"]) for o in found]
    assert ranges[0] > 0 and ranges[1] == ranges[2] == ranges[3] == ranges[4] != ranges[0]
    weighted = [float(o.scalars["loss/balance_weighted"]) for o in found]
    plain = [float(o.scalars["loss/balance"]) for o in found]
    np.testing.assert_allclose(
        weighted, 2 * 0.1 * np.linspace(1, 0, 5) * plain, rtol=1e-5
    )  # two layers


@pytest.mark.parametrize(
    ("schedule", "moe", "parts"),
    [
        ({"z_weight": "liner:0"}, {}, ["schedule.z_weight='liner:0'", "nearest is linear"]),
        ({"z_weight": "linear"}, {}, ["schedule.z_weight='linear'", "linear:END"]),
        ({"z_weight": "step:2:0"}, {}, ["FRACTION above 0 and at most 1"]),
        ({"z_weight": "exponential:0"}, {}, ["between 1e-06 and 1e6"]),
        ({"z_weight": "linear:0.5"}, {"z_weight": 0.0}, ["schedule.z_weight", "moe.z_weight=0.0"]),
        (
            {"capacity_factor": "linear:2"},
            {"dispatch": "capacity"},
            ["schedule.capacity_factor", "must not exceed 1"],
        ),
        ({"capacity_factor": "linear:0.5"}, {}, ["schedule.capacity_factor", "read by a layer"]),
        ({"bias_rate": "linear:0.5"}, {}, ["schedule.bias_rate", "read by a layer"]),
        ({"noise_scale": "linear:0.5"}, {}, ["schedule.noise_scale", "read by a layer"]),
        (
            {"noise_scale": "linear:0"},
            {"router": "noisy_topk", "load_weight": 0.1},
            ["schedule.noise_scale", "moe.load_weight=0.1"],
        ),
        (
            {"balance_weight": "linaer:0"},
            {"num_experts": 0},
            ["schedule.balance_weight='linaer:0'"],
        ),
        (
            {"balance_weight": "linear:0"},
            {"num_experts": 0},
            ["schedule.balance_weight", "read by a layer"],
        ),
        ({"jitter": "linear:20"}, {"jitter": 0.1}, ["schedule.jitter", "below 1"]),
        (
            {"top_k": "linear:0.5"},
            {"router": "noisy_topk", "top_k": 4, "vmoe_load_weight": 0.1},
            ["schedule.top_k", "moe.vmoe_load_weight=0.1"],
        ),
        ({"top_k": "linear:0.5"}, {}, ["falls to 1 expert", "moe.renormalize=False"]),
        (
            {"top_k": "linear:0.5"},
            {"router": "quantile"},
            ["schedule.top_k", "moe.router=quantile"],
        ),
    ],
)
def test_a_schedule_that_cannot_be_read_or_does_not_fit_is_refused(schedule, moe, parts):
    with pytest.raises(ConfigError) as caught:
        resolve({"schedule": schedule, "moe": {"d_expert": 8} | moe})
    assert all(part in str(caught.value) for part in parts), str(caught.value)
