"""Records of arms: what a row says about a run, and the joint files."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from cases.sweeps import entry_of, write_definition, write_run
from moejax.inspection.figures.axes import seconds_trained
from moejax.inspection.runs.run import open_run
from moejax.sweeps.runners.packs import training_seconds
from moejax.sweeps.store.record_files import RecordError, read_parquet, write_parquet
from moejax.sweeps.store.records import (
    collect,
    read_definition,
    read_record,
    read_records,
    record_of,
    write_record,
)
from moejax.training.health.speed import median_speed


def record(workdir, entry, **more):
    facts = {"status": "done", "error": None, "wall_s": 5.0, "step_s": 0.05, "packed": 1} | more
    return record_of(workdir, entry, **facts)


def make_sweep(directory, points, **more):
    entries = [entry_of(point) for point in points]
    write_definition(directory, entries)
    for entry in entries:
        workdir = write_run(directory / "arms" / entry["id"], entry, **more)
        write_record(workdir, record(workdir, entry))
    return entries


def rewrite(path, change):
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_row_says_what_an_arm_was_and_how_it_ended(tmp_path):
    entry = entry_of({"moe.num_experts": 4, "train.seed": 7}, matched={"moe.d_expert": 96})
    workdir = write_run(tmp_path / entry["id"], entry, loss=3.0, dropped=0.25)
    row = record(workdir, entry)
    expected = {
        "arm": entry["id"], "config_hash": entry["config_hash"], "status": "done", "error": None,
        "packed": 1, "override/moe.num_experts": 4, "override/train.seed": 7,
        "matched/moe.d_expert": 96, "seed": 7, "params_total": 4000, "params_active": 1000,
        "flops_per_token": 6000, "flops_total": 6000.0 * 6400, "steps": 100, "steps_planned": 100,
        "fraction": 1.0, "tokens": 6400, "wall_s": 5.0, "step_s": 0.05, "final/eval/loss": 3.0,
        "final/loss/lm": 3.0, "best/eval/loss": 3.0, "best/step": 100, "tail/moe/dropped": 0.25,
        "tail/loss/lm": 3.0, "median/perf/tokens_per_s": 1000.0, "alarms": 0, "alarm_rules": "[]",
        "device": "1 x cpu (cpu)", "git_commit": "abc",
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    evaluations = [
        [0.25, 25, 3.75, None],
        [0.5, 50, 3.5, None],
        [0.75, 75, 3.25, None],
        [1.0, 100, 3.0, None],
    ]
    assert json.loads(row["evaluations"]) == evaluations
    assert json.loads(row["versions"])["jax"] == "0.9"


def test_the_tail_is_a_tenth_of_the_planned_steps_and_at_least_one_interval(tmp_path):
    entry = entry_of({}, steps=400)
    workdir = write_run(tmp_path / "a", entry, end=400)
    row = record(workdir, entry)
    # The last 40 of 400 steps are the intervals that end at 370, 380, 390 and 400.
    assert row["tail/loss/lm"] == pytest.approx(3 + (30 + 20 + 10 + 0) / 4 / 400)
    entry = entry_of({}, steps=20)
    row = record(write_run(tmp_path / "b", entry, end=20), entry)
    assert row["tail/loss/lm"] == 3.0  # two steps would hold no interval


def test_the_speed_of_an_arm_is_the_median_over_its_intervals(tmp_path):
    entry = entry_of({})
    workdir = write_run(tmp_path / "a", entry)

    def slow_down(line):
        return line | {"perf/tokens_per_s": 10.0} if line["step"] > 80 else line

    rewrite(workdir / "metrics.jsonl", slow_down)
    _, speeds = open_run(workdir).series("perf/tokens_per_s")
    assert record(workdir, entry)["median/perf/tokens_per_s"] == median_speed(speeds) == 1000.0


def test_every_speed_of_an_arm_in_a_pack_is_for_its_share_of_the_time(tmp_path):
    entry = entry_of({})
    alone = write_run(tmp_path / "alone", entry)
    packed = write_run(tmp_path / "packed", entry)
    in_pack = {"perf/tokens_per_s": 250.0, "perf/arms": 4}  # a machine that does 1,000

    def put_in_pack(line):
        return line | in_pack if "perf/tokens_per_s" in line else line

    rewrite(packed / "metrics.jsonl", put_in_pack)
    rows = [record(alone, entry), record(packed, entry)]
    assert rows[0]["median/perf/tokens_per_s"] == rows[1]["median/perf/tokens_per_s"] == 1000.0
    shares = [training_seconds(workdir) for workdir in (alone, packed)]
    assert shares[0].step_s == shares[1].step_s and (shares[0].arms, shares[1].arms) == (1, 4)
    seconds = [seconds_trained(open_run(workdir).series)[1] for workdir in (alone, packed)]
    np.testing.assert_allclose(seconds[0], seconds[1], rtol=1e-12)


def test_a_schedule_of_top_k_leaves_the_arithmetic_of_an_arm_unknown(tmp_path):
    entry = entry_of({})
    entry["config"] |= {"schedule": {"top_k": "linear"}}
    row = record(write_run(tmp_path / "a", entry), entry)
    assert row["flops_per_token"] is None and row["flops_total"] is None


def test_the_best_evaluation_need_not_be_the_last(tmp_path):
    entry = entry_of({})
    workdir = write_run(tmp_path / "a", entry)

    def better(line):
        is_best = line["step"] == 75 and "eval/loss" in line
        return line | {"eval/loss": 2.5} if is_best else line

    rewrite(workdir / "metrics.jsonl", better)
    row = record(workdir, entry)
    assert (row["best/eval/loss"], row["best/step"], row["final/eval/loss"]) == (2.5, 75, 3.0)


def test_a_loss_that_is_not_finite_at_the_end_is_no_final_loss(tmp_path):
    entry = entry_of({})
    workdir = write_run(tmp_path / "a", entry)

    def blow_up(line):  # a metrics file leaves out what is not finite
        return {"step": 100} if line["step"] == 100 and "eval/loss" in line else line

    rewrite(workdir / "metrics.jsonl", blow_up)
    row = record(workdir, entry)
    assert row["final/eval/loss"] is None and row["final/eval/max_violation"] is None
    assert row["best/step"] == 75 and row["final/loss/lm"] == 3.0


def test_an_arm_that_failed_early_has_a_row_too(tmp_path):
    entry = entry_of({"moe.top_k": 2})
    failure = {"status": "failed", "error": "loss is nan\nat step 3"}
    row = record(tmp_path / "none", entry, **failure, wall_s=None, step_s=None)
    assert (row["status"], row["error"]) == ("failed", "loss is nan")
    assert (row["steps"], row["tokens"]) == (0, None)
    assert row["evaluations"] == "[]" and row["device"] is None and row["fraction"] == 0
    row = record(write_run(tmp_path / "half", entry, end=55), entry, status="stopped")
    assert (row["steps"], row["fraction"], row["final/eval/loss"]) == (50, 0.5, 3.5)
    message = "status='over' must be one of done, stopped, failed, pruned"
    with pytest.raises(RecordError, match=message):
        record(tmp_path / "none", entry, status="over")


def test_alarms_are_counted_when_they_begin(tmp_path):
    entry = entry_of({})
    workdir = write_run(tmp_path / "a", entry)
    lines = [("collapse", "on"), ("drops", "on"), ("collapse", "off"), ("collapse", "on")]
    text = [
        json.dumps({"step": i, "rule": rule, "state": state, "layers": [0]})
        for i, (rule, state) in enumerate(lines)
    ]
    (workdir / "alarms.jsonl").write_text("\n".join(text) + "\n")
    row = record(workdir, entry)
    assert row["alarms"] == 3 and json.loads(row["alarm_rules"]) == ["collapse", "drops"]


def test_rows_of_ended_arms_are_joined_in_the_order_of_the_sweep(tmp_path):
    entries = make_sweep(tmp_path, [{"moe.top_k": k} for k in (4, 1, 2)])
    (tmp_path / "arms" / entries[1]["id"] / "record.json").unlink()
    assert [row["override/moe.top_k"] for row in collect(tmp_path)] == [4, 2]
    frame = read_records(tmp_path)
    assert list(frame["override/moe.top_k"]) == [4, 2]
    assert type(frame["override/moe.top_k"][0]) is int
    assert not list(tmp_path.glob("*.partial"))


def test_rows_have_the_axes_that_the_sweep_has_now(tmp_path):
    (entry,) = make_sweep(tmp_path, [{"moe.top_k": 1, "train.seed": 0}])
    now = {"overrides": {"moe.top_k": 1, "moe.z_weight": 0.01}, "matched": {"moe.d_expert": 16}}
    write_definition(tmp_path, [entry | now])
    (row,) = collect(tmp_path)
    assert [key for key in row if key.startswith(("override/", "matched/"))] == [
        "override/moe.top_k", "override/moe.z_weight", "matched/moe.d_expert",
    ]  # fmt: skip
    assert [*row][:5] == ["arm", "config_hash", "status", "error", "override/moe.top_k"]
    before = read_record(tmp_path / "arms" / entry["id"])
    kept = {key: value for key, value in before.items() if "/" not in key}
    assert {key: value for key, value in row.items() if "/" not in key} == kept


def test_both_joint_files_hold_the_same_with_mixed_values_on_one_axis(tmp_path):
    mixed = [{"a.b": 1}, {"a.b": 0.5}, {"a.b": "auto"}]
    points = [*mixed, {"a.c": True}, {"a.d": 1}, {"a.d": 0.5, "a.e": '<&"'}]
    make_sweep(tmp_path, points)
    collect(tmp_path)
    from_jsonl = read_records(tmp_path)
    (tmp_path / "records.jsonl").unlink()
    from_parquet = read_records(tmp_path)
    assert from_jsonl.equals(from_parquet[from_jsonl.columns])
    assert from_parquet["override/a.b"].tolist() == [1, 0.5, "auto", None, None, None]
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "records.parquet")}
    expected = {
        "override/a.d": "double", "final/eval/loss": "double", "steps": "int64",
        "override/a.b": "string", "override/a.c": "bool", "error": "null",
    }  # fmt: skip
    assert {name: types[name] for name in expected} == expected


def test_integers_beyond_64_bits_and_no_rows_at_all_fit_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"arm": "a", "n": 2**70}, {"arm": "b", "n": 1}])
    assert [row["n"] for row in read_parquet(path)] == [2.0**70, 1.0]
    write_parquet(path, [])
    assert read_parquet(path) == []
    make_sweep(tmp_path / "empty", [])
    assert collect(tmp_path / "empty") == [] and len(read_records(tmp_path / "empty")) == 0


def test_all_of_a_record_is_there_or_nothing(tmp_path):
    entry = entry_of({})
    assert read_record(tmp_path / "a") is None
    row = record(tmp_path / "a", entry, status="failed", error="x")
    write_record(tmp_path / "a", row)
    assert read_record(tmp_path / "a") == row
    with pytest.raises(TypeError):
        write_record(tmp_path / "a", {"arm": object()})
    assert read_record(tmp_path / "a") == row


DAMAGED_RECORDS = [
    ("{", r"records.jsonl is damaged .*remove it and run"),
    ('{"arm": 3}\n', r"records.jsonl: row 1 has no arm"),
]

DAMAGED_ROWS = [
    ('{"arm"', r"record.json is damaged .*remove it"),
    ("[]", r"must be a JSON object with an arm"),
]

DAMAGED_DEFINITIONS = [
    ("{", r"sweep.json is damaged .*restore it"),
    ("[]", r"sweep.json must be a JSON object with a list"),
    ('{"arms": [3]}', r"sweep.json: arm 0 must have id"),
]


def check_damages(path, damages, read):
    before = path.read_text()
    for damaged, message in damages:
        path.write_text(damaged)
        with pytest.raises(RecordError, match=message):
            read()
    path.write_text(before)


def test_damaged_files_are_named_with_a_remedy(tmp_path):
    message = r"sweep.json is missing; .* give the directory of a sweep"
    with pytest.raises(RecordError, match=message):
        collect(tmp_path)
    with pytest.raises(RecordError, match=r"neither records.jsonl nor records.parquet"):
        read_records(tmp_path)
    (entry,) = make_sweep(tmp_path, [{"moe.top_k": 1}])
    workdir = tmp_path / "arms" / entry["id"]
    collect(tmp_path)
    check_damages(tmp_path / "records.jsonl", DAMAGED_RECORDS, lambda: read_records(tmp_path))
    check_damages(workdir / "record.json", DAMAGED_ROWS, lambda: collect(tmp_path))
    definition = tmp_path / "sweep.json"
    path_as_id = (
        definition.read_text().replace(entry["id"], "../../else"),
        r"sweep.json: arm 0: id '../../else' must be ten hexadecimal digits",
    )
    damages = [*DAMAGED_DEFINITIONS, path_as_id]
    check_damages(definition, damages, lambda: read_definition(tmp_path))
    (tmp_path / "records.jsonl").unlink()
    (tmp_path / "records.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordError, match=r"records.parquet is damaged .*remove it"):
        read_records(tmp_path)
    (workdir / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(RecordError, match=r"metrics.jsonl: line 1 is damaged"):
        record(workdir, entry)


def test_a_row_of_another_configuration_is_refused(tmp_path):
    (entry,) = make_sweep(tmp_path, [{"moe.top_k": 1}])
    workdir = tmp_path / "arms" / entry["id"]
    write_record(workdir, read_record(workdir) | {"config_hash": "other"})
    with pytest.raises(RecordError, match=r"record.json is of arm .* with config_hash other, not"):
        collect(tmp_path)
