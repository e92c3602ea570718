"""Verdicts: effective speed-ups from paired seeds, and what a ladder is able to see."""

import math

import numpy as np
import pytest

from cases.ladders import BUDGETS, LAWS, measurements
from moejax.inspection.analysis.differences import mean_difference
from moejax.sweeps.arms import SweepError
from moejax.sweeps.ladder.gates import GateRule, smallest_detectable
from moejax.sweeps.ladder.judge import judge
from moejax.sweeps.ladder.law import Law

DENSE = LAWS["dense"]
TWICE = Law(DENSE.E, DENSE.A * 2**-DENSE.a, DENSE.a)
"""Reaches every loss with half of the compute."""


def verdict(measured, candidate="twice", gate=None, **more):
    gate = GateRule() if gate is None else gate
    return judge((measured, "dense"), (measured, candidate), DENSE, gate, **more)


def test_a_candidate_that_needs_half_of_the_compute_is_twice_as_fast():
    found = verdict(measurements({"dense": DENSE, "twice": TWICE}))
    assert [rung.budget for rung in found.rungs] == list(BUDGETS)
    for rung in found.rungs:
        assert rung.flops.value == pytest.approx(2)
        assert rung.time.value == pytest.approx(0.5)  # its steps take four times as long
        assert rung.gain.num_seeds == 3
    assert [rung.is_extrapolated for rung in found.rungs] == [False] * 3 + [True]
    assert found.verdict == "works"


@pytest.mark.parametrize(
    ("gain", "noise", "speedup", "expected"),
    [
        (0.02, 1e-3, 1.0, "works"),
        (-0.02, 1e-3, 1.0, "does not"),
        (0.002, 5e-3, 1.0, "not told apart"),
        (0.02, 1e-3, 1.5, "does not"),  # faster, and not by as much as was asked for
    ],
)
def test_a_verdict_is_by_the_interval_at_the_top_rung(gain, noise, speedup, expected):
    moved = Law(DENSE.E - gain, DENSE.A, DENSE.a)
    measured = measurements({"dense": DENSE, "twice": moved}, noise=noise, shared=0.05)
    assert verdict(measured, gate=GateRule(speedup=speedup)).verdict == expected


def test_pairs_are_of_one_seed_whatever_the_seeds_share():
    quiet = measurements({"dense": DENSE, "twice": TWICE}, shared=0.5)
    top = verdict(quiet).rungs[-1]
    assert top.gain.low == pytest.approx(top.gain.mean) == pytest.approx(top.gain.high)


def test_more_candidates_make_intervals_wider():
    measured = measurements({"dense": DENSE, "twice": TWICE}, noise=3e-3)
    one = verdict(measured).rungs[-1].gain
    three = verdict(measured, num_candidates=3).rungs[-1].gain
    assert one.mean == three.mean and three.high - three.low > 1.4 * (one.high - one.low)


def test_rungs_and_seeds_of_two_ladders_are_matched():
    base = measurements({"dense": DENSE}, budgets=BUDGETS[:3], num_seeds=2)
    other = measurements({"twice": TWICE}, budgets=BUDGETS[1:], num_seeds=3)
    found = judge((base, "dense"), (other, "twice"), DENSE, GateRule())
    assert [rung.budget for rung in found.rungs] == list(BUDGETS[1:3])
    assert found.rungs[0].gain.num_seeds == 2
    missing = measurements({"twice": TWICE}, budgets=(1e9, 2e9, 3e9))
    with pytest.raises(SweepError, match="no rung and seed in common"):
        judge((base, "dense"), (missing, "twice"), DENSE, GateRule())


def test_a_loss_that_the_baseline_never_reaches_is_beyond_all_speed_ups():
    below = Law(DENSE.E - 1.0, DENSE.A, DENSE.a)
    found = verdict(measurements({"dense": DENSE, "twice": below}))
    assert found.rungs[-1].flops.value == math.inf and found.verdict == "works"
    of_top = found.to_json()["rungs"][-1]
    assert of_top["flops_speedup"] is None and of_top["flops_interval"] == [None, None]


def test_the_smallest_effect_is_seen_in_about_eight_of_ten_ladders():
    random = np.random.default_rng(0)
    for num_seeds in (3, 5):
        effect = smallest_detectable(1.0, num_seeds)
        pairs_LS = effect + random.normal(0, 1, (4000, num_seeds))
        seen = [mean_difference(pairs_S[None]).is_told_apart for pairs_S in pairs_LS]
        assert 0.74 < np.mean(seen) < 0.92, num_seeds
    assert smallest_detectable(1.0, 3, num_candidates=4) > smallest_detectable(1.0, 3)


def test_what_cannot_be_seen_is_not_known_without_noise_or_with_one_seed():
    assert GateRule(noise=0.004).detectable(3) == pytest.approx(0.0124, abs=2e-4)
    assert GateRule(noise=0.004).detectable(1) is None
    assert GateRule().detectable(3) is None


def test_a_gate_of_another_form_is_refused():
    assert GateRule.from_recipe({"speedup": 1, "noise": 0.01}) == GateRule(1.0, 0.01)
    with pytest.raises(SweepError, match=r"gives speed_up, which is no rule; the nearest is speed"):
        GateRule.from_recipe({"speed_up": 2})
    for value in (-1, math.nan, math.inf, "2", True):
        with pytest.raises(SweepError, match="it must be a number from 0 on"):
            GateRule.from_recipe({"speedup": value})
