"""Intervals of laws: they hold the truth about as often as they say."""

import math

import numpy as np
import pytest

from cases.ladders import LAWS, measurements
from moejax.sweeps.ladder.intervals import sample_laws
from moejax.sweeps.ladder.law import Law


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """With three seeds a bootstrap is a little short: Student's quantile would be 4.3, not 2."""
    held = {"a": 0, "prediction": 0}
    num_ladders = 40
    for seed in range(num_ladders):
        measured = measurements(noise=4e-3, seed=seed)
        samples = sample_laws(measured, LAWS, 4, num_samples=60)
        low, high = samples.interval("dense", "a")
        held["a"] += low <= LAWS["dense"].a <= high
        low, high = samples.loss_interval("dense", 2.4e14)
        held["prediction"] += low <= LAWS["dense"].loss(2.4e14) <= high
    assert all(0.75 * num_ladders <= number for number in held.values()), held


def test_without_noise_intervals_are_points_and_with_more_noise_they_are_wider():
    def width(noise):
        samples = sample_laws(measurements(noise=noise), LAWS, 4, num_samples=60)
        low, high = samples.loss_interval("dense", 2.4e14)
        return high - low

    assert width(0.0) == pytest.approx(0, abs=1e-5)
    assert 1.5 * width(1e-3) < width(4e-3)


def test_what_arms_of_a_seed_share_stays_shared():
    """The difference of two arms is not noisier for it."""
    measured = measurements(shared=0.02)
    samples = sample_laws(measured, LAWS, 4, num_samples=60)
    differences = [laws["dense"].loss(6e13) - laws["experts"].loss(6e13) for laws in samples.laws]
    levels = [laws["dense"].loss(6e13) for laws in samples.laws]
    assert np.std(differences) < 0.1 * np.std(levels)


def test_one_seed_says_nothing_of_noise():
    samples = sample_laws(measurements(num_seeds=1), LAWS, 4)
    assert samples.laws == ()
    assert all(map(math.isnan, samples.interval("dense", "E")))


def test_runs_that_are_missing_are_left_out_of_the_means():
    laws = {"dense": Law(1.0, 80.0, 0.16)}
    measured = measurements(laws, noise=1e-4)
    measured.loss["dense"][1, 0] = math.nan
    samples = sample_laws(measured, laws, 4, num_samples=60)
    assert 40 < len(samples.laws) < 60 or len(samples.laws) == 60
    low, high = samples.loss_interval("dense", 1e12)
    assert low <= measured.loss["dense"][0].mean() <= high
