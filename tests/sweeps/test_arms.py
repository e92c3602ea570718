"""Arms: all points are checked before any of them runs, and each configuration has one id."""

import dataclasses
import hashlib
import itertools
import json
import re
import time

import pytest

from cases.training import SMALL
from moejax.config import ConfigError, default, resolve, to_dict
from moejax.models.parameters import count_parameters
from moejax.sweeps import arms, choice, parse_axis, product, seeds, where
from moejax.sweeps.arms import Arm, SweepError, describe, plan_arms

E, K, SEED = "moe.num_experts", "moe.top_k", "train.seed"


def test_every_point_becomes_a_resolved_configuration_in_order():
    plan = plan_arms(SMALL, product(choice(E, 4, 8), seeds(2)))
    assert [arm.overrides for arm in plan.arms] == [{E: e, SEED: s} for e in (4, 8) for s in (0, 1)]
    resolved = [(arm.config.moe.num_experts, arm.config.train.seed) for arm in plan.arms]
    assert resolved == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert all(arm.config.moe.d_expert == 16 and not arm.matched for arm in plan.arms)
    assert plan.duplicates == () and plan.changes == ()
    assert "seed" not in SMALL["train"]  # the recipe is left as it was


def test_points_may_be_a_generator_and_an_empty_point_is_the_recipe():
    plan = plan_arms(SMALL, (point for point in ({}, {SEED: 1})))
    assert [arm.config.train.seed for arm in plan.arms] == [0, 1]
    assert plan.arms[0].config == resolve(SMALL)


def test_leaves_that_are_derived_follow_from_the_point():
    base = SMALL | {"moe": SMALL["moe"] | {"d_expert": 0}}
    plan = plan_arms(base, choice(K, 2, 4))
    assert [arm.config.moe.d_expert for arm in plan.arms] == [16, 8]


def test_all_points_that_cannot_work_are_named_before_one_runs():
    points = [{E: 4}, {K: 9}, {"moe.num_expert": 4}, {E: "4"}, {E: 8}, {"moe.router": "hsh"}]
    with pytest.raises(SweepError) as error:
        plan_arms(SMALL, points)
    text = str(error.value)
    assert text.startswith("4 of 6 points cannot work")
    for expected in (
        "moe.top_k=9: moe.top_k=9 must be between 1 and moe.num_experts=4",
        "moe.num_expert=4: moe.num_expert is not a config key; the nearest is moe.num_experts",
        "moe.num_experts=4: moe.num_experts='4' is text; it must be a whole number",
        "the nearest is hash",
    ):
        assert expected in text


def test_of_many_bad_points_ten_are_named_and_all_are_counted():
    with pytest.raises(SweepError, match=r"25 of 26 points") as error:
        plan_arms(SMALL, choice(K, *range(4, 30)))
    lines = str(error.value).splitlines()
    assert len(re.findall(r"\d+\. moe.top_k=", str(error.value))) == 10
    assert lines[-1].strip() == "and 15 more"


def test_a_key_that_is_no_leaf_and_a_point_that_is_no_dict_are_errors():
    for key in ("moe", "num_experts", "config.moe.num_experts"):
        with pytest.raises(SweepError, match=f"{key} is not a config key; the nearest is"):
            plan_arms(SMALL, [{key: 4}])
    with pytest.raises(SweepError, match=r"'moe.top_k': is no point; give a dict"):
        plan_arms(SMALL, (point for point in ("moe.top_k",)))


def test_a_sweep_without_points_is_an_error():
    with pytest.raises(SweepError, match="no points"):
        plan_arms(SMALL, [])


def test_points_of_one_configuration_are_one_arm_and_reported():
    plan = plan_arms(SMALL, [{}, {E: 4}, {E: 8}, {E: 4, K: 2}])
    assert [arm.overrides for arm in plan.arms] == [{}, {E: 8}]
    assert plan.duplicates == (({E: 4}, plan.arms[0].id), ({E: 4, K: 2}, plan.arms[0].id))


def test_dense_arms_that_differ_only_in_leaves_of_experts_are_one():
    points = product(
        choice(E, 0, 4),
        choice("moe.balance_weight", 0.0, 0.5),
        choice("schedule.z_weight", "constant"),
    )
    plan = plan_arms(SMALL, points)
    assert [arm.overrides[E] for arm in plan.arms] == [0, 4, 4]
    dense = plan.arms[0]
    # The axes stay as they were given.
    assert dense.overrides == {E: 0, "moe.balance_weight": 0.0, "schedule.z_weight": "constant"}
    assert [arm_id for _, arm_id in plan.duplicates] == [dense.id]
    assert dense.config == resolve(SMALL | {"moe": SMALL["moe"] | {"num_experts": 0}})
    for arm in plan.arms[1:]:
        of_experts = SMALL["moe"] | {"balance_weight": arm.overrides["moe.balance_weight"]}
        assert arm.config == resolve(SMALL | {"moe": of_experts})
    wide, narrow = plan_arms(SMALL, [{E: 0, "model.d_ff": 64, K: 1}, {E: 0, K: 1}]).arms
    assert wide.config.model.d_ff == 64 and narrow.id == dense.id


def test_two_configurations_of_one_id_are_an_error(monkeypatch):
    monkeypatch.setattr(arms, "hash_config", lambda config: 10 * "a" + f"{config.train.seed}")
    message = r"the id a{10} is that of two .*, train.seed=0 and train.seed=1; give one"
    with pytest.raises(SweepError, match=message):
        plan_arms(SMALL, seeds(2))


def test_a_plan_checks_that_sizes_of_the_mesh_divide():
    message = r"1 of 2 points .*\n.*moe.num_experts=6: moe.num_experts=6 .* of mesh.expert=4"
    with pytest.raises(SweepError, match=message):
        plan_arms(SMALL | {"mesh": {"data": -1, "expert": 4}}, choice(E, 4, 6))


def test_too_many_points_are_refused_before_they_are_made():
    start = time.monotonic()
    space = product(*(choice(key, *range(1000)) for key in (E, K, SEED)))
    message = r"has 1,000,000,000 points and may have 100,000; give its axes fewer values"
    with pytest.raises(SweepError, match=message):
        plan_arms(SMALL, space)
    with pytest.raises(SweepError, match=r"has more than 100,000 points"):
        plan_arms(SMALL, ({SEED: seed} for seed in itertools.count()))
    assert time.monotonic() - start < 5


def test_an_id_hashes_what_differs_from_the_defaults_but_the_datas_folder():
    first, second, other = plan_arms(
        SMALL, [{}, {"moe.z_weight": 0.5}, {"moe.z_weight": 0.25, "data.directory": "elsewhere"}]
    ).arms
    assert re.fullmatch(r"[0-9a-f]{64}", first.config_hash) and first.id == first.config_hash[:10]
    assert len({first.id, second.id, other.id}) == 3
    (elsewhere,) = plan_arms(SMALL, [{"data.directory": "elsewhere"}]).arms
    assert elsewhere.config_hash == first.config_hash
    defaults = default().to_dict()
    differing = {}
    for section, leaves in to_dict(second.config).items():
        for name, value in leaves.items():
            if value != defaults[section][name]:
                differing[f"{section}.{name}"] = value
    # These two have the values that are derived for them.
    assert differing.pop("moe.score") == "softmax" and differing.pop("moe.d_expert") == 16
    assert differing["moe.z_weight"] == 0.5
    by_name = dict(sorted(differing.items()))
    text = json.dumps(by_name).replace(": ", ":").replace(", ", ",")
    assert second.config_hash == hashlib.sha256(text.encode()).hexdigest()


def test_an_arm_that_was_written_and_read_is_the_same():
    (arm,) = plan_arms(SMALL, [{E: 8}]).arms
    entry = json.loads(json.dumps(arm.to_json()))
    assert [*entry] == [
        "id", "config_hash", "overrides", "matched", "config", "params_total", "params_active",
        "flops_per_token",
    ]  # fmt: skip
    assert Arm.from_json(entry) == arm and Arm.from_json(entry).config_hash == arm.config_hash
    # One of a version that lacked a leaf, and so had another hash.
    del entry["config"]["moe"]["z_weight"]
    older = entry | {"id": 10 * "a", "config_hash": 64 * "a"}
    kept = Arm.from_json(older).to_json()
    assert (kept["id"], kept["config_hash"]) == (older["id"], older["config_hash"])
    built = count_parameters(arm.config)
    assert (entry["params_total"], entry["params_active"]) == (built.total, built.active)
    assert entry["flops_per_token"] == arm.count.flops_per_token


def test_a_damaged_entry_is_an_error():
    (arm,) = plan_arms(SMALL, [{}]).arms
    entry = arm.to_json()
    for damaged in ({}, entry | {"config": {"moe": {"top_k": 99}}}, entry | {"overrides": None}):
        with pytest.raises(SweepError, match="damaged"):
            Arm.from_json(damaged)


def test_overrides_are_described_as_one_writes_them():
    assert describe({E: 16, "moe.router": "hash"}) == "moe.num_experts=16 moe.router=hash"
    assert describe({}) == "the recipe itself"


def test_many_points_resolve_without_reading_types_again(monkeypatch):
    plan_arms(SMALL, [{}])

    def refuse(*_):
        raise AssertionError("types are read again")

    monkeypatch.setattr("typing.get_type_hints", refuse)
    points = product(
        choice(E, 4, 8, 16),
        choice("moe.d_expert", *range(8, 88, 8)),
        choice("model.num_layers", 2, 3),
    )
    plan = plan_arms(SMALL, points)
    assert len(plan.arms) == 60 and len({dataclasses.astuple(arm.count) for arm in plan.arms}) == 60


def test_a_recipe_that_cannot_work_is_refused_where_arms_match_it():
    with pytest.raises(ConfigError, match=r"moe.top_k=9"):
        plan_arms(SMALL | {"moe": {"top_k": 9, "d_expert": 4}}, [{K: 2}], match="flops")


def test_a_point_that_sets_a_leaf_its_arm_does_not_read_is_refused():
    iterations = choice("moe.sinkhorn_iterations", 3, 8)
    space = product(choice("moe.router", "softmax_topk", "sinkhorn"), iterations)
    base = SMALL | {"moe": SMALL["moe"] | {"allow_noncausal": True}}
    with pytest.raises(SweepError) as error:
        plan_arms(base, space)
    text = str(error.value)
    assert text.startswith("1 of 4 points cannot work")
    assert "moe.sinkhorn_iterations=3 does nothing with moe.router=softmax_topk" in text
    assert "where(space" in text

    def is_read(point):
        return point["moe.router"] == "sinkhorn" or point["moe.sinkhorn_iterations"] == 8

    assert len(plan_arms(base, where(space, is_read)).arms) == 3
    for dead in ("data.files=x", "optimizer.decay_fraction=0.5", "moe.exchange=ring"):
        with pytest.raises(SweepError, match="does nothing"):
            plan_arms(SMALL, parse_axis(dead))


def test_a_leaf_that_the_recipe_sets_may_be_for_some_arms_only():
    base = SMALL | {"moe": SMALL["moe"] | {"bias_rate": 5e-3}}
    plan = plan_arms(base, choice("moe.selection_bias", False, True))
    assert [arm.config.moe.bias_rate for arm in plan.arms] == [5e-3, 5e-3]


def test_an_arm_that_was_planned_with_a_dead_leaf_is_read():
    entry = plan_arms(SMALL, [{}]).arms[0].to_json()
    entry["config"]["moe"]["sinkhorn_iterations"] = 3
    assert Arm.from_json(entry).config.moe.sinkhorn_iterations == 3
