"""Matched arms: they have the recipe's number; what matching may change, and what it refuses."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import resolve
from moejax.models.parameters import count_parameters
from moejax.planning.count import count
from moejax.sweeps import choice, product, seeds
from moejax.sweeps.arms import Arm, SweepError, plan_arms
from moejax.sweeps.matching import MatchError, short, training_flops

E, K, SEED, WIDTH, D_FF, STEPS = (
    "moe.num_experts", "moe.top_k", "train.seed", "moe.d_expert", "model.d_ff", "train.num_steps",
)  # fmt: skip
BASE = {
    "model": {"num_layers": 3, "d_model": 64, "d_ff": 256},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "moe": {"num_experts": 8, "top_k": 2, "d_expert": 128, "renormalize": False},
    "data": {"tokenizer": "bytes", "seq_len": 32, "source": "synthetic"},
    "train": {"batch_size": 8, "num_steps": 200},
}


def changed(**sections):
    return {name: BASE.get(name, {}) | sections.get(name, {}) for name in {*BASE, *sections}}


def active(config):
    return count_parameters(config).active


def total(config):
    return count_parameters(config).total


def flops(config):
    return count(config).flops_per_token


NUMBERS = {"active_params": active, "total_params": total, "flops": flops}


@pytest.mark.parametrize("match", NUMBERS)
def test_arms_have_the_number_of_the_recipe(match):
    plan = plan_arms(BASE, product(choice(E, 4, 8, 16), choice(K, 1, 2, 4)), match=match)
    wanted = NUMBERS[match](resolve(BASE))
    assert len(plan.arms) == 10
    for arm in plan.arms:
        assert NUMBERS[match](arm.config) == pytest.approx(wanted, rel=0.01), arm.overrides
        assert set(arm.matched) <= {WIDTH, D_FF}
        leaf = D_FF if arm.config.moe.num_experts == 0 else WIDTH
        section, name = leaf.split(".")
        of_arm = getattr(getattr(arm.config, section), name)
        assert of_arm == arm.matched.get(leaf, BASE[section][name]) and of_arm % 8 == 0
    assert len(plan.changes) == sum(bool(arm.matched) for arm in plan.arms)


def test_the_width_is_the_one_worked_out_by_hand():
    # 4 of 16 experts at half the width have as many active parameters as 2 of 8, except for 8 more
    # columns of the router.
    plan = plan_arms(BASE, [{E: 16, K: 4}], match="active_params", dense_control=False)
    (arm,) = plan.arms
    assert arm.matched == {WIDTH: 64} and arm.overrides == {E: 16, K: 4}
    assert active(arm.config) - active(resolve(BASE)) == 3 * 64 * 8
    (line,) = plan.changes
    reached = short(active(arm.config))
    expected = f"{E}=16 {K}=4: moe.d_expert 128 -> 64, active {reached} (+0.7 %)"
    assert line == expected


def test_what_matching_changed_is_reported_once_for_all_seeds():
    points = product(choice(E, 16), choice(K, 1, 4), seeds(3))
    plan = plan_arms(BASE, points, match="active_params", dense_control=False)
    assert len(plan.arms) == 6 and all(arm.matched for arm in plan.arms)
    assert [line.partition(":")[0] for line in plan.changes] == [f"{E}=16 {K}=1", f"{E}=16 {K}=4"]


def test_the_recipe_itself_and_arms_with_its_number_are_not_changed():
    plan = plan_arms(
        changed(moe={"d_expert": 1027}), [{}, {SEED: 1}], match="flops", dense_control=False
    )
    assert [arm.matched for arm in plan.arms] == [{}, {}] and plan.changes == ()
    # 1024 would be close enough, but is another arm.
    assert [arm.config.moe.d_expert for arm in plan.arms] == [1027, 1027]


def test_shared_experts_latent_widths_and_layers_that_differ_count():
    moe = {"num_shared_experts": 1, "d_latent": 32, "first_dense": 1, "per_layer": "-1: top_k=1"}
    plan = plan_arms(
        changed(moe=moe),
        [{"moe.num_shared_experts": 2}, {"moe.d_latent": 0}],
        match="active_params",
    )
    for arm in plan.arms:
        assert active(arm.config) == pytest.approx(active(resolve(changed(moe=moe))), rel=0.01)
    assert plan.arms[0].matched and plan.arms[1].matched


def test_where_no_multiple_of_8_is_close_the_width_is_any_number():
    base = changed(moe={"num_experts": 8, "d_expert": 16})
    plan = plan_arms(base, [{E: 12}], match="total_params", dense_control=False)
    (arm,) = plan.arms
    assert arm.matched == {WIDTH: 11}
    assert total(arm.config) == pytest.approx(total(resolve(base)), rel=0.05)


def test_widths_are_multiples_of_the_parts_they_are_split_into():
    base = changed(
        mesh={"tensor": 6}, moe={"num_experts": 8, "d_expert": 96},
        model={"d_model": 48}, attention={"num_heads": 6, "num_kv_heads": 6},
        data={"tokenizer": "bpe", "vocab_size": 516},
    )  # fmt: skip
    plan = plan_arms(base, [{E: 12}, {E: 7}], match="total_params")
    for arm in plan.arms:
        width = arm.config.moe.d_expert if arm.config.moe.num_experts else arm.config.model.d_ff
        assert width % 6 == 0 and arm.matched
        assert total(arm.config) == pytest.approx(total(resolve(base)), rel=0.05)


def test_each_setting_of_other_leaves_than_experts_has_a_dense_control():
    points = product(
        choice(E, 4, 8), choice("moe.balance_weight", 0.0, 0.1), choice(D_FF, 64, 128), seeds(2)
    )
    base = changed(moe={"first_dense": 1})
    plan = plan_arms(base, points, match="total_params")
    controls = plan.arms[16:]
    assert [arm.overrides for arm in controls] == [{SEED: 0, E: 0}, {SEED: 1, E: 0}]
    for arm in controls:
        assert [*arm.matched] == [D_FF] and arm.config.moe_layers == ()
        assert total(arm.config) == pytest.approx(total(resolve(base)), rel=0.01)
    assert not any(arm.config.moe.num_experts == 0 for arm in plan.arms[:16])


def test_the_control_switches_off_what_needs_experts_in_the_recipe():
    base = changed(
        moe={"per_layer": "0: router=hash"},
        schedule={"top_k": "step:0.5:0.5", "jitter": "constant"},
    )
    plan = plan_arms(base, [{E: 4, "schedule.z_weight": "linear:0"}], match="active_params")
    assert plan.arms[-1].overrides == {E: 0, "moe.per_layer": "", "schedule.top_k": "constant"}


def test_a_dense_arm_of_the_sweep_is_the_control():
    plan = plan_arms(BASE, [{E: 0}, {E: 8}], match="total_params")
    assert [arm.overrides for arm in plan.arms] == [{E: 0}, {E: 8}] and plan.duplicates == ()
    plan = plan_arms(BASE, product(choice(E, 0, 8), choice(K, 1, 2)), match="total_params")
    assert [arm.overrides for arm in plan.arms] == [{E: 0, K: 1}, {E: 8, K: 1}, {E: 8, K: 2}]
    assert len(plan_arms(BASE, [{E: 8}], match="flops", dense_control=False).arms) == 1


def test_there_is_no_control_without_matching():
    assert len(plan_arms(BASE, [{E: 8}]).arms) == 1


def test_steps_are_adjusted_so_that_training_costs_the_same():
    points = [{E: 16, K: 4}, {"data.seq_len": 64}, {"train.batch_size": 16}, {"moe.d_expert": 64}]
    plan = plan_arms(BASE, points, match="flops", adjust="steps")
    wanted = training_flops(resolve(BASE), count(resolve(BASE)))
    for arm in plan.arms:
        config = arm.config
        tokens = config.train.num_steps * config.train.batch_size * config.data.seq_len
        assert tokens * flops(config) == pytest.approx(wanted, rel=0.005)
        assert set(arm.matched) <= {STEPS} and config.model.d_ff == 256
    assert plan.arms[2].matched == {STEPS: 100}
    assert plan.arms[-1].overrides[E] == 0
    assert plan.changes[0].startswith("moe.num_experts=16 moe.top_k=4: train.num_steps 200 -> ")


@pytest.mark.parametrize(
    ("points", "settings", "message"),
    [
        (
            [{WIDTH: 64}],
            {"match": "flops"},
            "sets moe.d_expert=64, which match=flops adjusts; leave it out",
        ),
        ([{E: 0, D_FF: 64}], {"match": "flops"}, "sets model.d_ff=64"),
        ([{STEPS: 9}], {"match": "flops", "adjust": "steps"}, "sets train.num_steps=9"),
        (
            [{"model.d_model": 512}],
            {"match": "active_params"},
            r"model.d_model=512: cannot have .* with moe.d_expert=1,",
        ),
        ([{E: 16}, {"model.num_layers": 90}], {"match": "flops"}, "1 of 2 points"),
        (
            [{"moe.per_layer": "0-2: d_expert=64"}],
            {"match": "flops"},
            "no layer has the width moe.d_expert",
        ),
    ],
)
def test_arms_that_cannot_be_matched_are_refused_with_the_remedy(points, settings, message):
    with pytest.raises(SweepError, match=message) as error:
        plan_arms(BASE, points, **settings)
    assert "leave" in str(error.value) and "or" in str(error.value)


def test_parameters_cannot_be_matched_by_steps():
    with pytest.raises(MatchError, match="use adjust=width, or match=flops"):
        plan_arms(BASE, [{E: 4}], match="total_params", adjust="steps")


def test_steps_too_few_to_come_close_are_refused():
    with pytest.raises(SweepError, match=r"closest.*train longer"):
        plan_arms(
            changed(train={"num_steps": 3}),
            [{"train.batch_size": 7}],
            match="flops",
            adjust="steps",
        )


def test_a_matched_arm_that_was_written_and_read_is_the_same():
    arm = plan_arms(BASE, [{E: 16}], match="total_params").arms[0]
    assert arm.matched and Arm.from_json(json.loads(json.dumps(arm.to_json()))) == arm


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*NUMBERS]),
    st.integers(2, 40),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from([1, 2, 5]),
)
def test_no_other_width_comes_closer_than_the_tolerance_allows(
    match, experts, top_k, shared, tensor
):
    base = changed(mesh={"tensor": tensor})
    point = {E: experts, K: min(top_k, experts), "moe.num_shared_experts": shared}
    try:
        (arm,) = plan_arms(base, [point], match=match, dense_control=False).arms
    except SweepError:
        return
    wanted = count_of(resolve(base), match)

    def deviation(width):
        moe = dataclasses.replace(arm.config.moe, d_expert=width)
        return abs(count_of(dataclasses.replace(arm.config, moe=moe), match) / wanted - 1)

    width = arm.config.moe.d_expert
    assert width % tensor == 0
    neighbours = [other for other in (width - tensor, width + tensor) if other > 0]
    is_closest = all(deviation(width) <= deviation(other) for other in neighbours)
    assert deviation(width) <= 0.01 or is_closest


def count_of(config, match):
    counted = count(config)
    parameters = {"active_params": counted.active, "total_params": counted.total}
    return parameters.get(match, counted.flops_per_token)


def test_numbers_are_short():
    assert [short(n) for n in (999, 1250, 12_500, 999_600, 1_250_000, 46_700_000_000)] == [
        "999", "1.25 k", "12.5 k", "1.00 M", "1.25 M", "46.7 G",
    ]  # fmt: skip
