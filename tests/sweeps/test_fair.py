"""Fair learning rates: trials, the rate that they show, and arms that train at it."""

import dataclasses
import math

import pytest

from cases.training import SMALL
from moejax.sweeps import product, seeds
from moejax.sweeps.arms import plan_arms
from moejax.sweeps.axes import choice
from moejax.sweeps.fair import (
    FACTORS,
    RATE,
    arms_of,
    extend_trials,
    find_rate,
    plan_trials,
    with_fair_rates,
)
from moejax.sweeps.matching import training_flops

BASE = SMALL | {"train": SMALL["train"] | {"num_steps": 40}, "optimizer": {"learning_rate": 0.01}}


def plan(*values, num_seeds=3):
    return plan_arms(BASE, product(choice("moe.num_experts", *values), seeds(num_seeds)))


def losses_of(trials, best_rate):
    """Losses that are a parabola in the logarithm of the rate."""
    return {
        arm.id: 2 + math.log(arm.config.optimizer.learning_rate / best_rate) ** 2
        for arm in trials.arms.values()
    }


def one(best_rate, factors=FACTORS):
    """The trials of one setting and their losses."""
    (trials,) = plan_trials(plan(4)).values()
    trials = dataclasses.replace(trials, arms={f: trials.arms[f] for f in factors})
    return trials, losses_of(trials, best_rate)


def test_each_setting_is_tried_once_at_each_rate_in_a_quarter_of_the_steps():
    trials = plan_trials(plan(4, 8))
    assert len(trials) == 2 and len(arms_of(trials)) == 2 * len(FACTORS)
    for arm in arms_of(trials):
        assert arm.config.train.num_steps == 10 and arm.config.train.seed == 0
        assert arm.overrides[RATE] == arm.config.optimizer.learning_rate
    rates = sorted({arm.config.optimizer.learning_rate for arm in arms_of(trials)})
    assert rates == [0.0025, 0.005, 0.01, 0.02, 0.04]


def test_six_fair_arms_cost_at_most_three_times_as_much_as_unfair_ones():
    """With all the rates that may be tried beyond the first five."""
    for num_seeds in (1, 3):
        arms = plan(2, 4, 5, 6, 7, 8, num_seeds=num_seeds)
        trials = plan_trials(arms)
        for _ in range(5):
            worst = {}
            for of_setting in trials.values():
                worst |= losses_of(of_setting, 1e9)
            trials = extend_trials(trials, worst)

        def cost(some):
            return sum(training_flops(arm.config, arm.count) for arm in some)

        assert cost(arms_of(trials)) + cost(arms.arms) <= 3 * cost(arms.arms)


def test_the_lowest_point_of_the_parabola_is_found_between_the_trials():
    trials, losses = one(best_rate=0.0123)
    found = find_rate(trials, losses)
    assert found.rate == pytest.approx(0.0123) and found.is_bracketed
    assert found.rates == (0.0025, 0.005, 0.01, 0.02, 0.04)


@pytest.mark.parametrize(("best_rate", "last"), [(0.1, 0.08), (1.0, 0.16), (1e-4, 0.000625)])
def test_rates_beyond_the_last_are_tried_twice_at_most(best_rate, last):
    (key, trials), *_ = plan_trials(plan(4)).items()
    for _ in range(4):
        trials = extend_trials({key: trials}, losses_of(trials, best_rate))[key]
    rates = [arm.config.optimizer.learning_rate for arm in trials.arms.values()]
    assert rates == sorted(rates) and last in rates and len(rates) <= 7
    found = find_rate(trials, losses_of(trials, best_rate))
    if best_rate == 0.1:
        assert found.is_bracketed and found.rate == pytest.approx(0.1)
    else:
        assert not found.is_bracketed and found.rate == last


def test_trials_that_diverged_count_as_worse_than_all_others():
    trials, losses = one(best_rate=0.02)
    del losses[trials.arms[4.0].id]
    losses[trials.arms[2.0].id] = math.nan
    found = find_rate(trials, losses)
    # A neighbour is not known, so there is no parabola.
    assert found.rate == 0.01 and found.is_bracketed
    assert math.isnan(found.losses[-1]) and math.isnan(found.losses[-2])
    none = find_rate(trials, {})
    assert none.rate == 0.01 and not none.is_bracketed


def test_equal_losses_keep_the_rate_of_the_recipe():
    trials, _ = one(best_rate=0.01, factors=(0.5, 1.0, 2.0))
    same = {arm.id: 2.0 for arm in trials.arms.values()}
    assert find_rate(trials, same).rate in (0.005, 0.01)


def test_all_seeds_of_a_setting_train_at_its_rate_and_say_so():
    arms = plan(4, 8)
    trials = plan_trials(arms)
    rates = {}
    for number, (key, of_setting) in enumerate(trials.items()):
        rates[key] = find_rate(of_setting, losses_of(of_setting, 0.005 * (1 + number)))
    fair = with_fair_rates(arms, rates)
    assert len({arm.id for arm in fair.arms}) == 6
    for before, after in zip(arms.arms, fair.arms, strict=True):
        expected = 0.005 if before.config.moe.num_experts == 4 else 0.01
        assert after.config.optimizer.learning_rate == pytest.approx(expected)
        assert after.matched == {RATE: after.config.optimizer.learning_rate}
        assert after.overrides == before.overrides
        assert after.config.train == before.config.train
