"""Arms under the names of their points."""

import pytest

from cases.training import SMALL
from moejax.sweeps.arms import SweepError, plan_arms
from moejax.sweeps.store.directory import write_sweep
from moejax.sweeps.store.named_arms import named_arms
from moejax.sweeps.store.records import write_record

POINTS = {"few": {"moe.top_k": 2}, "recipe": {}, "many": {"moe.top_k": 4, "train.seed": 7}}


@pytest.fixture
def directory(tmp_path):
    """A sweep of the points, two of them with two seeds, all of whose arms are done."""
    points = [{**point, "train.seed": seed} for point in POINTS.values() for seed in (1, 0)]
    plan = plan_arms(SMALL | {"moe": SMALL["moe"] | {"top_k": 3}}, points)
    facts = {"recipe": "r.py", "match": "", "command": "c"}
    write_sweep(tmp_path, plan, largest_pack=2, **facts)
    for arm in plan.arms:
        end(tmp_path, arm, "done")
    return tmp_path


def end(directory, arm, status):
    row = {"arm": arm.id, "config_hash": arm.config_hash, "status": status, "error": None}
    write_record(directory / "arms" / arm.id, row)


def test_arms_have_the_names_of_their_points_in_order_and_then_their_seeds(directory):
    found = named_arms(directory, POINTS)
    names = [(each.name, each.seed) for each in found]
    assert names == [(name, seed) for name in POINTS for seed in (0, 1)]
    for each in found:
        assert each.arm.config.train.seed == each.seed
        assert each.workdir == directory / "arms" / each.arm.id
    assert [each.arm.config.moe.top_k for each in found] == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("status", ["failed", "stopped", None])
def test_a_sweep_that_is_not_trained_to_the_end_is_refused(directory, status):
    arm = named_arms(directory, POINTS)[3].arm
    if status is None:
        (directory / "arms" / arm.id / "record.json").unlink()
    else:
        end(directory, arm, status)
    message = rf"1 of 6 arms in .* are not trained to the end \({arm.id} ...\)"
    with pytest.raises(SweepError, match=message):
        named_arms(directory, POINTS)


def test_an_arm_of_no_point_is_refused(directory):
    others = {name: POINTS[name] for name in ("few", "many")}
    message = r"arm .*, the recipe itself, is none of few, many; give the directory"
    with pytest.raises(SweepError, match=message):
        named_arms(directory, others)
