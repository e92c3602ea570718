"""What a ladder's report says, and what it leaves out with a reason."""

import json
import math

import pytest

from cases.ladders import BUDGETS, LAWS, measurements
from moejax.strict_json import to_json
from moejax.sweeps.ladder.law import Law
from moejax.sweeps.ladder.report import report_of


def test_laws_prediction_and_projection_of_exact_losses():
    content = json.loads(to_json(report_of(measurements()).to_json()))
    for arm, law in LAWS.items():
        found = content["law"][arm]
        assert (found["E"], found["A"], found["a"]) == pytest.approx((law.E, law.A, law.a), 1e-4)
        low, high = found["a_interval"]
        assert low == pytest.approx(high, abs=1e-4) == pytest.approx(law.a, abs=1e-4)
        own = content["prediction"]["by_arm"][arm]
        assert own["budget"] == BUDGETS[-1]
        assert own["predicted"] == pytest.approx(own["measured"], abs=1e-4)
        projected = content["projection"][arm]
        assert projected["budget"] == 4 * BUDGETS[-1] and "measured" not in projected
        assert projected["predicted"] == pytest.approx(law.loss(2.4e14), abs=1e-4)
    assert [row["arm"] for row in content["arms"]] == ["dense"] * 4 + ["experts"] * 4
    assert content["arms"][0]["loss"] == pytest.approx(LAWS["dense"].loss(1e12))


def test_the_top_rung_is_held_out_of_its_own_prediction():
    measured = measurements()
    measured.loss["experts"][-1] += 0.1
    found = report_of(measured)
    arm, worst = found.worst_prediction
    assert arm == "experts" and worst.error == pytest.approx(-0.1, abs=1e-3)
    assert found.predictions["dense"].error == pytest.approx(0, abs=1e-3)
    content = found.to_json()["prediction"]
    assert content["arm"] == "experts" and content["error"] == worst.error


def test_too_few_rungs_are_said_and_the_rest_is_shown():
    three = report_of(measurements(budgets=BUDGETS[:3]))
    assert three.laws and not three.predictions
    assert three.notes["prediction"].endswith("train more budgets below the top one")
    two = report_of(measurements(budgets=BUDGETS[:2]))
    assert not two.laws and "needs 3" in two.notes["laws"] and len(two.arms) == 4
    assert two.to_json()["prediction"] is None


def test_an_arm_that_misses_a_rung_is_named_and_the_others_have_their_laws():
    measured = measurements(noise=1e-3)
    measured.loss["experts"][1] = math.nan
    found = report_of(measured)
    assert list(found.laws) == ["dense"] and found.notes["laws"].startswith("not of experts")
    assert list(found.predictions) == ["dense"]
    assert [row["seeds"] for row in found.arms] == [3, 3, 3, 3, 3, 0, 3, 3]
    assert found.arms[5]["loss"] is None and measured.num_missing == 3


def test_with_one_seed_there_is_no_interval():
    content = report_of(measurements(num_seeds=1)).to_json()
    assert content["law"]["dense"]["E_interval"] is None
    assert content["prediction"]["interval"] is None and content["arms"][0]["se"] is None


def test_scans_at_one_budget_join_the_joint_law():
    sizes = measurements({"small": Law(1.1, 80.0, 0.16)}, budgets=BUDGETS[:1])
    alone = report_of(measurements())
    joined = report_of(measurements(), [sizes])
    assert joined.joint.num_points == alone.joint.num_points + 1
