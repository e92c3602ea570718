"""Schedules and weight decay."""

import jax
import numpy as np
import pytest
from flax import nnx

from cases.training import make, small_config
from moejax.config import OptimizerConfig
from moejax.training.optimizer import decay_mask, make_schedule


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
    params = make(small_config(model={"qk_norm": True}, moe=moe)).abstract.params
    decays = {path: v.get_value() for path, v in nnx.to_flat_state(decay_mask(params))}
    assert {path[-1] for path, value in decays.items() if not value} == {
        "scale",
        "bias",
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
