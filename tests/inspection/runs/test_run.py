"""Opening a run: from its directory alone, also after interruptions; errors name the remedy."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cases.training import small_config
from moejax.config import ConfigError, to_dict
from moejax.inspection.runs.run import open_run
from moejax.training.run_directory.routing_log import RoutingLog

FACTS = {
    "config": {"moe": {"num_experts": 4, "top_k": 2}, "train": {"num_steps": 100}},
    "versions": {"jax": "0.10.2"},
    "git_commit": "abc123",
    "device": "4 x TPU v5e",
    "command": "moejax train --config=configs/tiny_moe.py",
    "parameters": {"total": 1000, "active": 400},
}


def write_run(workdir, text='{"step": 10, "loss/lm": 3.0}\n', **facts):
    (workdir / "config.json").write_text(json.dumps(FACTS | facts))
    (workdir / "metrics.jsonl").write_text(text)


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_run_is_read_from_its_directory_alone(tmp_path):
    write_run(tmp_path)
    log = RoutingLog(tmp_path, [1], 4)
    log.append(10, np.array([[1, 2, 3, 4]]), np.full((1, 4), 0.25, np.float32))
    run = open_run(tmp_path)
    assert (run.name, run.config, run.versions) == (
        tmp_path.name,
        FACTS["config"],
        FACTS["versions"],
    )
    assert (run.git_commit, run.device, run.command) == (
        "abc123",
        FACTS["device"],
        FACTS["command"],
    )
    assert (run.parameters_total, run.parameters_active, run.is_dense) == (1000, 400, False)
    assert run.routing.counts_SNE.tolist() == [[[1, 2, 3, 4]]]
    assert run.keys == ("loss/lm",)


def test_a_dense_run_has_no_routing(tmp_path):
    write_run(tmp_path, config={"moe": {"num_experts": 0}})
    run = open_run(tmp_path)
    assert run.is_dense
    assert run.routing is None


def test_a_series_holds_the_lines_that_have_its_key(tmp_path):
    write_run(
        tmp_path,
        lines({"step": 10, "a": 1}, {"step": 15, "eval/loss": 2.5}, {"step": 20, "a": 0.5}),
    )
    run = open_run(tmp_path)
    steps, values = run.series("a")
    assert (steps.tolist(), values.tolist()) == ([10, 20], [1.0, 0.5])
    assert [x.tolist() for x in run.series("eval/loss")] == [[15], [2.5]]
    assert [x.tolist() for x in run.series("absent")] == [[], []]
    assert (run.last("a"), run.last("absent")) == (0.5, None)


def test_steps_that_a_resumed_run_wrote_again_replace_the_earlier_ones(tmp_path):
    # Interrupted after step 40, resumed from a checkpoint at 15 with another logging interval.
    before = [{"step": s, "a": s} for s in (10, 20, 30, 40)]
    after = [{"step": s, "a": -s} for s in (25, 35)]
    write_run(tmp_path, lines(*before, *after))
    steps, values = open_run(tmp_path).series("a")
    assert (steps.tolist(), values.tolist()) == ([10, 20, 25, 35], [10, 20, -25, -35])


def test_null_and_nan_read_as_nan(tmp_path):
    write_run(tmp_path, '{"step": 1, "a": null}\n{"step": 2, "a": NaN}\n{"step": 3, "a": 1}\n')
    values = open_run(tmp_path).series("a")[1]
    assert math.isnan(values[0])
    assert math.isnan(values[1])
    assert values[2] == 1


@pytest.mark.parametrize("tail", ['{"step": 20, "lo', '{"step": 20, "text": "é', "\0\0\0", "\n\n"])
def test_a_last_line_cut_off_by_a_crash_is_ignored(tmp_path, tail):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail.encode()[: len(tail)])  # also cuts a character in two
    assert open_run(tmp_path).series("loss/lm")[0].tolist() == [10]


def test_a_complete_last_line_without_a_line_break_is_kept(tmp_path):
    write_run(tmp_path, '{"step": 10, "a": 1}\n{"step": 20, "a": 1}')
    run = open_run(tmp_path)
    assert (run.series("a")[0].tolist(), run.last_step) == ([10, 20], 20)


def test_metrics_hold_a_row_per_step_with_training_and_evaluation_in_one(tmp_path):
    before = [
        {"step": 10, "b": 1, "a": 2},
        {"step": 20, "b": 3, "a": None},
        {"step": 20, "eval/loss": 4},
    ]
    after = [{"step": 20, "b": 5}, {"step": 30, "b": 6}]  # 20 was written again
    write_run(tmp_path, lines(*before, *after))
    run = open_run(tmp_path)
    table = run.metrics
    assert table.columns.tolist() == ["a", "b", "eval/loss"]
    assert table.index.name == "step"
    assert table.index.tolist() == [10, 20, 30]
    assert set(table.dtypes.astype(str)) == {"float64"}
    nan = math.nan
    np.testing.assert_array_equal(table, [[2, 1, nan], [nan, 5, 4], [nan, 6, nan]])
    assert run.series("b")[0].tolist() == [10, 20, 30]
    table["b"] = 0
    assert run.metrics["b"].tolist() == [1, 5, 6]  # a table that was changed changes no other


def test_metrics_of_a_run_without_any_are_empty(tmp_path):
    write_run(tmp_path, "")
    run = open_run(tmp_path)
    assert run.metrics.shape == (0, 0)
    assert run.last_step == 0


def test_metrics_are_read_once_until_reload(tmp_path):
    write_run(tmp_path, lines({"step": 10, "a": 1}))
    run = open_run(tmp_path)
    assert run.last("a") == 1
    assert len(run.metrics) == 1
    write_run(tmp_path, lines({"step": 10, "a": 1}, {"step": 20, "a": 2}))
    assert run.last("a") == 1
    assert len(run.metrics) == 1
    run.reload()
    assert run.last("a") == 2
    assert len(run.metrics) == 2


def test_a_reloaded_run_sees_new_entries_of_the_routing_log(tmp_path):
    write_run(tmp_path)
    run = open_run(tmp_path)
    assert run.routing is None
    RoutingLog(tmp_path, [1], 4).append(
        10, np.ones((1, 4), np.int64), np.full((1, 4), 0.25, np.float32)
    )
    assert run.reload().routing.num_entries == 1


def test_opening_and_describing_a_run_touches_neither_metrics_nor_routing(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # whoever opens it fails
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing" / "zarr.json").mkdir()
    run = open_run(tmp_path)
    assert "4 experts, top 2" in repr(run)
    assert "1,000 (400 active)" in repr(run)
    assert repr(run).count("\n") < 5
    assert "4 experts, top 2" in run._repr_html_()
    for read in (lambda: run.metrics, lambda: run.series("a"), lambda: run.routing):
        with pytest.raises((OSError, ValueError)):
            read()


def test_what_a_run_is_called_is_escaped(tmp_path):
    workdir = tmp_path / "<b>run"
    workdir.mkdir()
    write_run(workdir, device="<script>alert(1)</script>", git_commit="a\x00b")
    page = open_run(workdir)._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert "\x00" not in page
    assert "&lt;b&gt;run" in page
    assert "&lt;script&gt;" in page


def test_settings_are_resolved_and_what_cannot_be_is_named(tmp_path):
    write_run(tmp_path, config={"moe": {"num_experts": 4, "from_another_version": 1}})
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config.json: .*from_another_version"):
        _ = open_run(tmp_path).settings
    config = small_config()
    write_run(tmp_path, config=to_dict(config))
    assert open_run(tmp_path).settings == config


def test_saved_and_evaluated_steps_are_listed_in_order_and_only_complete_ones(tmp_path):
    write_run(tmp_path)
    run = open_run(tmp_path)
    assert run.checkpoints == ()
    assert run.evaluations.steps == ()
    with pytest.raises(ValueError, match=r"routing/evaluations has no evaluation"):
        run.evaluations.read()
    for name in ("100", "20", "300.orbax-checkpoint-tmp-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    folder = tmp_path / "routing" / "evaluations"
    folder.mkdir(parents=True)
    for step in (20, 100):
        np.savez(
            folder / f"{step}.npz",
            load=np.full((1, 4), step, np.float32),
            experts=np.zeros((1, 1, 1), np.uint8),
        )
    (folder / "300.partial").write_bytes(b"")
    assert run.checkpoints == (20, 100)
    assert run.evaluations.steps == (20, 100)
    assert run.evaluations.read()["load"][0, 0] == 100
    assert run.evaluations.read(20)["load"][0, 0] == 20
    (folder / "20.npz").write_bytes(b"PK damaged")
    with pytest.raises(
        ValueError, match=r"evaluations/20.npz cannot be read .*restore it from a copy"
    ):
        run.evaluations.read(20)


def test_a_missing_config_is_named_with_a_remedy(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json is missing; .*--workdir"):
        open_run(tmp_path)


def test_missing_metrics_are_named_with_a_remedy_when_they_are_asked_for(tmp_path):
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl is missing; .*--workdir"):
        _ = open_run(tmp_path).metrics


def test_a_missing_directory_is_named_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/nowhere is no directory; .*--workdir"):
        open_run(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '"config"', "{}", "\udcff"])
def test_a_damaged_config_is_named_with_a_remedy(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/config.json (is damaged|lacks) .*restore it, or start"
    ):
        open_run(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write_run(tmp_path)
    run = open_run(tmp_path)

    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(Path, "open", refused)
    for name, look in (
        ("config.json", lambda: open_run(tmp_path)),
        ("metrics.jsonl", lambda: run.series("a")),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} cannot be read \(Permission denied\); see who may"
        ) as caught:
            look()
        assert "damaged" not in str(caught.value)
        assert "delete" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", []),
        ("config", {"moe": 3}),
        ("config", {"moe": {"num_experts": "<script>"}}),
        ("config", {"moe": {"num_experts": 4, "num_zero_experts": -5}}),
        ("versions", "1.0"),
        ("parameters", {"total": 1}),
    ],
)
def test_a_config_entry_of_the_wrong_kind_is_named_with_a_remedy(tmp_path, key, value):
    write_run(tmp_path, **{key: value})
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/config.json: {key}.* must be .*restore it, or start"
    ):
        open_run(tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "10"}', '{"step": null}'])
def test_a_damaged_line_in_the_middle_is_named_with_a_remedy(tmp_path, line):
    write_run(tmp_path, f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl: line 2 .*delete that line"):
        open_run(tmp_path).series("a")


@pytest.mark.parametrize(
    "line",
    [f'{{"step": {2**63}, "a": 1}}', f'{{"step": 1, "a": {10**400}}}'],
    ids=["step", "value"],
)
def test_a_number_beyond_64_bits_is_named(tmp_path, line):
    write_run(tmp_path, line + "\n")
    with pytest.raises(
        ValueError,
        match=rf"{tmp_path}/metrics.jsonl: step \d+ or a is no number of 64 bits; delete",
    ):
        open_run(tmp_path).series("a")


def test_a_value_that_is_no_number_is_named(tmp_path):
    write_run(tmp_path, '{"step": 1, "a": "high"}\n')
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/metrics.jsonl, step 1: a='high' must be a number or null"
    ):
        open_run(tmp_path).series("a")


def test_a_damaged_routing_log_is_named_with_a_remedy(tmp_path):
    write_run(tmp_path)
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}/routing is damaged .*: mv "):
        _ = open_run(tmp_path).routing


def test_opening_a_run_needs_neither_plotting_nor_tables_nor_the_model():
    heavy = {"matplotlib", "pandas", "flax", "orbax", "tensorflow_datasets", "grain"}
    code = f"import sys, moejax.inspection; sys.exit(len({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
