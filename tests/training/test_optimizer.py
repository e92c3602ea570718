"""Schedules, weight decay, and the learning rate inside the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oracle
from cases.training import make, packed_batch, small_config
from moejax.config import Config, Knobs, OptimizerConfig
from moejax.training import optimizer as optimizer_module
from moejax.training.optimizer import (
    decay_mask,
    learning_rate_at,
    make_optimizer,
    make_schedule,
)
from moejax.training.step import make_train_step, put_batch


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_rise_to_the_peak_and_end_at_the_final_fraction(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_fraction=0.1, final_fraction=0.2)
    rates = np.array([make_schedule(config, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-5)
    assert rates.max() == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.2)
    assert (np.diff(rates[10:]) <= 1e-6).all()


def test_wsd_is_constant_until_its_last_phase():
    config = OptimizerConfig(
        schedule="wsd", warmup_fraction=0.1, decay_fraction=0.3, final_fraction=0.0
    )
    rates = np.array([make_schedule(config, 100)(step) for step in range(101)])
    np.testing.assert_allclose(rates[10:70], 1.0)
    np.testing.assert_allclose(rates[85], 0.5, atol=1e-5)


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.9, 0.1), (0.25, 0.75), (0.95, 0.05), (0.3, 0.2)]
)
def test_wsd_ends_at_the_final_fraction_whatever_its_fractions_round_to(fractions):
    warmup, decay = fractions
    config = OptimizerConfig(
        schedule="wsd", warmup_fraction=warmup, decay_fraction=decay, final_fraction=0.1
    )
    for num_steps in range(2, 24):
        assert make_schedule(config, num_steps)(num_steps) == pytest.approx(0.1), num_steps


def test_without_warm_up_the_first_step_has_the_full_rate():
    config = OptimizerConfig(warmup_fraction=0.0)
    assert make_schedule(config, 100)(0) == 1.0


def test_everything_decays_but_norm_scales_and_biases():
    moe = {"expert_bias": True, "router_bias": True, "num_shared_experts": 1}
    attention = {"qk_norm": "head", "qkv_bias": True, "out_bias": True}
    params = make(small_config(attention=attention, moe=moe)).abstract.params
    decays = {path: v.get_value() for path, v in nnx.to_flat_state(decay_mask(params))}
    assert {path[-1] for path, value in decays.items() if not value} == {
        "scale",
        "bias",
        "query_bias",
        "key_bias",
        "value_bias",
        "out_bias",
        "gate_up_bias",
        "down_bias",
    }
    assert {path[-1] for path, value in decays.items() if value} >= {
        "kernel",
        "gate_up",
        "down",
        "embedding",
        "query",
    }
    assert len(jax.tree.leaves(params)) == len(decays)


def variables(**arrays):
    """Parameters of no model: matrices, and vectors of stacked layers."""
    axes = {1: ("embed",), 2: ("layers", "embed"), 3: ("layers", "embed", "mlp")}
    params = {name: nnx.Param(x, axes=axes[x.ndim]) for name, x in arrays.items()}
    return nnx.State(params)


def test_two_steps_are_adamw_by_its_formula_at_the_rates_that_are_given():
    config = OptimizerConfig(clip_norm=0.0, beta1=0.8, beta2=0.9, weight_decay=0.1)
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, 3, 4), "scale": (2, 3)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = variables(**weights)
    optimizer = make_optimizer(config, params)
    state = optimizer.init(params)
    expected = {name: w.astype(np.float64) for name, w in weights.items()}
    mean, square = dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0.0)
    for count, rate in enumerate((0.5, 0.02), start=1):
        slopes = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        updates, state = optimizer.update(
            variables(**slopes), state, params, learning_rate=jnp.float32(rate)
        )
        params = optax.apply_updates(params, updates)
        for name, slope in slopes.items():
            mean[name] = 0.8 * mean[name] + 0.2 * slope
            square[name] = 0.9 * square[name] + 0.1 * slope.astype(np.float64) ** 2
            step = mean[name] / (1 - 0.8**count)
            step = step / (np.sqrt(square[name] / (1 - 0.9**count)) + 1e-8)
            decay = 0.1 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - rate * (step + decay)
    for name, value in expected.items():
        oracle.assert_close(params[name][...], value, err_msg=name)


def test_the_rate_is_the_knob_times_the_schedule_and_nothing_trains_without_it():
    config = Config(optimizer=OptimizerConfig(schedule="linear", warmup_fraction=0.5))
    knobs = Knobs.from_config(config)
    half_way = learning_rate_at(config, knobs, jnp.int32(249))
    assert half_way == pytest.approx(3e-3 / 2, rel=1e-6)
    params = variables(scale=np.ones(2, np.float32))
    optimizer = make_optimizer(config.optimizer, params)
    with pytest.raises(TypeError, match="learning_rate"):
        optimizer.update(params, optimizer.init(params), params)


OTHERS = {
    "lion": optax.scale_by_lion(0.9, 0.99),
    "momentum": optax.trace(0.9),
    "sign": optax.scale_by_sign(),
}
"""What may take the place of Adam: with two states of the parameters' shape, one, and none."""


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_takes_the_place_of_adam(name, monkeypatch):
    def other(config, params):
        decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(params))
        return OTHERS[name], decay

    monkeypatch.setattr(optimizer_module, "adamw", other)
    config = small_config(mesh={"data": 1, "fsdp": 2})
    setup = make(config, num_devices=2)
    with jax.set_mesh(setup.mesh):
        state = setup.init(0)
        before = jax.device_get(state.params)
        step = make_train_step(setup)
        batch = put_batch(packed_batch(config), setup)
        losses = []
        for _ in range(4):
            state, output = step(state, batch, Knobs.from_config(config))
            losses.append(float(output.scalars["loss/lm"]))
    _, own_state, *_ = state.opt_state
    assert type(own_state) is type(OTHERS[name].init({}))
    assert losses[-1] < losses[0] and int(state.skipped) == 0
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    assert all(jax.tree.leaves(changed))
