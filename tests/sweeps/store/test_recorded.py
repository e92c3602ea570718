"""Sweeps that another version began: their arms are recognised by what they are, not by their ids.

The other version is a `sweep.json` with other ids, or without leaves, or with another default.
"""

import dataclasses
import json

import pytest

from cases.training import SMALL
from moejax.config import OptimizerConfig
from moejax.sweeps import choice
from moejax.sweeps.arms import SweepError, plan_arms
from moejax.sweeps.search.definition import Axis, Definition
from moejax.sweeps.search.trial import Trials
from moejax.sweeps.store.directory import add_arm, open_sweep, recorded_id, write_sweep
from moejax.sweeps.store.record_files import read_jsonl
from moejax.sweeps.store.records import collect, write_record
from moejax.training.multihost.signals import StopSignals

K, CLIP = "moe.top_k", "optimizer.clip_norm"
FACTS = {"recipe": "r.py", "match": "", "command": "c"}


def planned(*top_ks, base=SMALL):
    return plan_arms(base, choice(K, *top_ks))


def edit(directory, change):
    """Applies `change` to each arm of `sweep.json`, with its number."""
    path = directory / "sweep.json"
    definition = json.loads(path.read_text())
    new_ids = {}
    for number, entry in enumerate(definition["arms"]):
        before = entry["id"]
        change(number, entry)
        new_ids[before] = entry["id"]
    definition["packs"] = [[new_ids[arm_id] for arm_id in pack] for pack in definition["packs"]]
    path.write_text(json.dumps(definition))


def as_before(number, entry):
    """Gives an arm the id and hash of a version that made them in another way."""
    entry["config_hash"] = 10 * str(number) + 54 * "e"
    entry["id"] = entry["config_hash"][:10]


def without_late_leaves(number, entry):
    """Takes a leaf away that the earlier version did not have."""
    as_before(number, entry)
    del entry["config"]["train"]["check_memory"]
    del entry["config"]["moe"]["jitter"]


@pytest.mark.parametrize("change", [as_before, without_late_leaves])
def test_a_sweep_whose_ids_were_made_otherwise_goes_on_with_its_ids(tmp_path, change):
    write_sweep(tmp_path, planned(2, 3), largest_pack=2, **FACTS)
    edit(tmp_path, change)
    old_ids = ["0" * 10, "1" * 10]
    row = {"arm": old_ids[0], "config_hash": 10 * "0" + 54 * "e", "status": "done", "error": None}
    write_record(tmp_path / "arms" / old_ids[0], row)
    plan = planned(2, 3, 4)
    grown = write_sweep(tmp_path, plan, largest_pack=2, **FACTS)
    assert [*grown.arms] == [*old_ids, plan.arms[2].id]
    assert sorted(sum(grown.packs, ())) == sorted(grown.arms)
    assert [arm.id for arm in grown.open_arms()] == [old_ids[1], plan.arms[2].id]
    assert open_sweep(tmp_path).arms == grown.arms
    assert [row["arm"] for row in collect(tmp_path)] == [old_ids[0]]
    assert read_jsonl(tmp_path / "records.jsonl")[0]["override/moe.top_k"] == 2


def test_an_arm_whose_default_has_changed_is_refused_with_the_leaf_that_differs(tmp_path):
    """The arm has the same id: neither of the two versions sets the leaf."""
    plan = planned(2, 3)
    assert plan.arms[0].config.optimizer.clip_norm == OptimizerConfig().clip_norm
    write_sweep(tmp_path, plan, largest_pack=2, **FACTS)

    def with_other_default(number, entry):
        entry["config"]["optimizer"]["clip_norm"] = 0.25

    edit(tmp_path, with_other_default)
    before = (tmp_path / "sweep.json").read_text()
    message = (
        r"holds a sweep with 2 arms that this one does not have \(.*\); moe.top_k=2 was planned "
        r"with optimizer.clip_norm=0.25, which is 1.0 now; set in the recipe what it was planned"
    )
    with pytest.raises(SweepError, match=message):
        write_sweep(tmp_path, plan, largest_pack=2, **FACTS)
    assert (tmp_path / "sweep.json").read_text() == before
    # With what it was planned with, the sweep goes on, under its ids.
    base = SMALL | {"optimizer": {"clip_norm": 0.25}}
    assert planned(2, base=base).arms[0].id != plan.arms[0].id
    again = write_sweep(tmp_path, planned(2, 3, base=base), largest_pack=2, **FACTS)
    assert [*again.arms] == [arm.id for arm in plan.arms]
    # An arm with the default of today would have an id that is taken.
    both = plan_arms(SMALL, [{K: 2, CLIP: 0.25}, {K: 3, CLIP: 0.25}, {K: 2}])
    with pytest.raises(SweepError, match=r"the id .* is that of two configurations"):
        write_sweep(tmp_path, both, largest_pack=2, **FACTS)


def test_a_search_knows_the_arms_of_another_version_and_does_not_mistake_one(tmp_path):
    one, other = planned(2, 3).arms
    add_arm(tmp_path, one, recipe="r.py", command="c")
    edit(tmp_path, as_before)
    definition = Definition(
        "r.py", SMALL, (Axis(K, (2, 3)),), "random", "none", 0, 2, (1.0,), is_filtered=False
    )
    trials = Trials(tmp_path, definition, "c", StopSignals())
    assert [trials.arm_of({K: k}) for k in (2, 3)] == ["0" * 10, other.id]
    assert recorded_id(tmp_path / "new", one) == one.id
    assert [*add_arm(tmp_path, one, recipe="r.py", command="c").arms] == ["0" * 10]

    def with_id_of_other(number, entry):
        entry["id"] = other.id
        entry["config_hash"] = other.config_hash

    edit(tmp_path, with_id_of_other)
    with pytest.raises(SweepError, match=r"the id .* is that of two configurations"):
        add_arm(tmp_path, other, recipe="r.py", command="c")


def test_arms_of_equal_configurations_but_for_the_datas_folder_are_one(tmp_path):
    plan = planned(2)
    moved = dataclasses.replace(plan, arms=planned(2, base=moved_data()).arms)
    first = write_sweep(tmp_path, plan, largest_pack=1, **FACTS)
    second = write_sweep(tmp_path, moved, largest_pack=1, **FACTS)
    assert [*first.arms] == [*second.arms]
    (arm,) = second.arms.values()
    assert arm.config.data.directory == "elsewhere"


def moved_data():
    return SMALL | {"data": SMALL.get("data", {}) | {"directory": "elsewhere"}}
