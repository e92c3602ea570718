"""Schedules of the learning rate, and the knob that they multiply."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import Config, Knobs, OptimizerConfig
from moejax.training.learning_rate import learning_rate_at, make_schedule


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


def test_the_rate_is_the_knob_times_the_schedule():
    config = Config(optimizer=OptimizerConfig(schedule="linear", warmup_fraction=0.5))
    knobs = Knobs.from_config(config)
    half_way = learning_rate_at(config, knobs, jnp.int32(249))
    assert half_way == pytest.approx(3e-3 / 2, rel=1e-6)
