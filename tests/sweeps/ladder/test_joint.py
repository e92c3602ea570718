"""The joint law in active parameters, total parameters and tokens."""

import numpy as np
import pytest

from moejax.sweeps.ladder.joint import NUMBERS, JointLaw, Points, fit_joint_law
from moejax.sweeps.ladder.law import LawError

TRUE = JointLaw(1.0, 400.0, 0.38, 0.12, 300.0, 0.3, num_points=0, worst=0.0)


def points(sizes=(0.4, 1.0, 2.5), ratios=(1, 3.5, 12), noise=0.0):
    """Four budgets, of which a fixed part goes into the size of the model."""
    random = np.random.default_rng(0)
    rows = []
    for budget in (1e12, 4e12, 1.6e13, 6e13):
        for size in sizes:
            for ratio in ratios:
                active = size * (budget / 120) ** 0.5
                row = (active, active * ratio, budget / 6 / active)
                rows.append((*row, TRUE.loss(*row) * np.exp(random.normal(0, noise))))
    return Points(*np.array(rows).T)


def test_exact_losses_give_back_the_joint_law():
    found = fit_joint_law(points())
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name
    assert found.num_points == 36 and found.worst < 1e-6


def test_noise_moves_the_exponents_little():
    found = fit_joint_law(points(noise=1e-3))
    assert found.n == pytest.approx(TRUE.n, abs=0.05)
    assert found.m == pytest.approx(TRUE.m, abs=0.02)
    assert found.d == pytest.approx(TRUE.d, abs=0.05)
    assert 1e-4 < found.worst < 1e-2


def test_points_that_do_not_determine_it_are_refused():
    few = Points(*(array[:6] for array in vars(points()).values()))
    with pytest.raises(LawError, match="6 points do not determine a joint law of 6 numbers"):
        fit_joint_law(few)
    with pytest.raises(LawError, match="the same ratio of total to active parameters"):
        fit_joint_law(points(ratios=(3.5,)))
    one_model = points(sizes=(1.0,))
    constant = np.full_like(one_model.tokens_P, 1e7)
    tied = Points(one_model.active_P, one_model.total_P, constant, one_model.loss_P)
    with pytest.raises(LawError, match="do not tell what parameters and what tokens are worth"):
        fit_joint_law(tied)
