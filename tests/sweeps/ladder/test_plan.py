"""Plans of ladders: every run trains what its budget pays for, in the shape of its rung."""

import pytest

from cases.training import SMALL
from moejax.planning.count import count
from moejax.sweeps.arms import SweepError
from moejax.sweeps.ladder.plan import name_arms, plan_ladder
from moejax.sweeps.matching import training_flops

E, K = "moe.num_experts", "moe.top_k"
POINTS = [{E: 0}, {E: 4}, {E: 8}]
BUDGETS = (1e9, 4e9)


def rule(budget, arm):
    """Wider at the second rung, and half the batch for eight experts."""
    width = 32 if budget == BUDGETS[0] else 64
    batch = 2 if arm.get(E) == 8 else 4
    return {"model.d_model": width, "model.d_ff": 2 * width, "train.batch_size": batch}


def test_each_run_has_the_shape_of_its_rung_and_the_steps_that_are_paid():
    planned = plan_ladder(SMALL, POINTS, BUDGETS, rule, num_seeds=2)
    arms = {arm.id: arm for arm in planned.plan.arms}
    assert len(arms) == len(planned.runs) == 2 * 3 * 2
    for run in planned.runs:
        arm = arms[run.id]
        assert arm.config.model.d_model == (32 if run.budget == 1e9 else 64)
        assert arm.config.train.batch_size == (2 if run.arm == "num_experts=8" else 4)
        assert arm.config.train.seed == run.seed
        assert arm.config.moe.num_experts == planned.points[run.arm][E]
        step = training_flops(arm.config, count(arm.config)) / arm.config.train.num_steps
        assert abs(training_flops(arm.config, arm.count) - run.budget) <= step / 2
        assert arm.overrides["model.d_model"] == arm.config.model.d_model
    assert [run.budget for run in planned.runs] == sorted(run.budget for run in planned.runs)


def test_what_an_arm_sets_goes_before_the_rule():
    planned = plan_ladder(SMALL, [{"model.d_model": 48}], BUDGETS, rule, num_seeds=1)
    assert [arm.config.model.d_model for arm in planned.plan.arms] == [48, 48]
    assert [arm.config.model.d_ff for arm in planned.plan.arms] == [64, 128]
    assert "model.d_model" not in planned.rungs[1e9]["d_model=48"]


def test_arms_are_named_by_what_they_set():
    points = [
        {E: 0},
        {"model.d_ff": 64, E: 0},
        {E: 0, K: 4},
        {E: 8, K: 2},
        {},
        {"moe.latent_dim": 8},
    ]
    assert list(name_arms(points)) == [
        "dense",
        "dense,d_ff=64",
        "num_experts=8,top_k=2",
        "recipe",
        "latent_dim=8",
    ]
    same_leaf = [{"model.norm": "layer", "moe.norm": "x"}]
    assert list(name_arms(same_leaf)) == ["model.norm=layer,moe.norm=x"]


@pytest.mark.parametrize(
    ("points", "budgets", "found", "message"),
    [
        (POINTS, (), {}, "the ladder has no rungs; give --budgets"),
        (POINTS, (4e9, 1e9), {}, r"budgets 4e\+09,1e\+09 must be positive .* increase"),
        (POINTS, (0.0, 1e9), {}, "must be positive"),
        (POINTS, (1e9, float("inf")), {}, "must be positive"),
        ([], BUDGETS, {}, "the ladder has no arms; give axes"),
        ([{E: 4}, {E: 4}], BUDGETS, {}, "the arm num_experts=4 is given twice"),
        ([{E: 4}, {E: 4, K: 2}], BUDGETS, {}, "num_experts=4 and num_experts=4,top_k=2 have the"),
        (POINTS, BUDGETS, {"train.num_steps": 5}, "rung.. sets train.num_steps=5, which a ladder"),
        ([{"train.seed": 1}], BUDGETS, {}, "an arm sets train.seed=1, which a ladder sets itself"),
        (POINTS, (1e6, 1e9), {}, "pays for .* steps, and a run has at least 10; let rung"),
        (POINTS, BUDGETS, {"model.d_modle": 4}, "model.d_modle is not a config key"),
        ([{K: 9, E: 4}], BUDGETS, {}, "moe.top_k=9 must be between 1 and moe.num_experts=4"),
    ],
)
def test_what_cannot_be_a_ladder_is_refused(points, budgets, found, message):
    with pytest.raises(ValueError, match=message):
        plan_ladder(SMALL, points, budgets, lambda budget, arm: found, num_seeds=1)


def test_two_rungs_of_one_configuration_are_refused():
    """Their budgets are too close for a step more."""
    with pytest.raises(SweepError, match=r"is the same at 1\.00 GFLOP and at the next budget"):
        plan_ladder(SMALL, [{E: 4}], (1e9, 1.0001e9), lambda budget, arm: {}, num_seeds=1)
