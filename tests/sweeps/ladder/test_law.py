"""Laws of losses over compute: recovered from exact losses, and little moved by a bad run."""

import math

import numpy as np
import pytest

from moejax.sweeps.ladder.law import Law, LawError, fit_laws

BUDGETS = [1e12, 4e12, 1.6e13, 6e13]
TRUE = {"dense": Law(1.0, 80.0, 0.16), "experts": Law(1.0, 110.0, 0.175)}


def curves(laws=TRUE, budgets=BUDGETS):
    return {arm: (budgets, [law.loss(c) for c in budgets]) for arm, law in laws.items()}


def test_exact_losses_give_back_their_laws():
    for arm, law in fit_laws(curves()).items():
        true = TRUE[arm]
        np.testing.assert_allclose((law.E, law.A, law.a), (true.E, true.A, true.a), rtol=1e-5)


@pytest.mark.parametrize("true", [Law(0.0, 24.0, 0.1), Law(2.5, 900.0, 0.3), Law(3.0, 4.0, 0.02)])
def test_a_single_arm_with_three_rungs_is_predicted_at_a_fourth(true):
    (law,) = fit_laws(curves({"one": true}, BUDGETS[:3])).values()
    assert law.loss(6e13) == pytest.approx(true.loss(6e13), rel=1e-4)


def test_arms_share_the_loss_that_no_compute_saves():
    noisy = curves()
    random = np.random.default_rng(1)
    for arm, (budgets, losses) in noisy.items():
        noisy[arm] = (budgets, [loss * math.exp(random.normal(0, 2e-3)) for loss in losses])
    dense, experts = fit_laws(noisy).values()
    assert dense.E == experts.E != pytest.approx(1.0, abs=1e-9)


def test_one_bad_run_among_many_moves_the_law_little():
    budgets = np.geomspace(1e12, 1e14, 12).tolist()
    losses = [TRUE["dense"].loss(c) for c in budgets]
    losses[5] *= 1.2
    (law,) = fit_laws({"dense": (budgets, losses)}).values()
    for budget in budgets:
        assert law.loss(budget) == pytest.approx(TRUE["dense"].loss(budget), rel=1e-3)


def test_the_budget_of_a_loss_inverts_the_law():
    law = TRUE["dense"]
    assert law.budget(law.loss(3e12)) == pytest.approx(3e12)
    assert law.budget(law.E) == law.budget(0.5) == math.inf
    assert Law(1.0, 80.0, 1e-3).budget(1.0001) == math.inf  # more than a float holds


def test_losses_that_determine_no_law_are_refused():
    with pytest.raises(LawError, match=r"dense has losses at 2 rungs, .* needs 3; train more"):
        fit_laws(curves(budgets=BUDGETS[:2]))
    with pytest.raises(LawError, match=r"one has a loss of -1.0"):
        fit_laws({"one": (BUDGETS[:3], [3.0, 2.0, -1.0])})
    with pytest.raises(LawError, match="no arm has ended"):
        fit_laws({})
