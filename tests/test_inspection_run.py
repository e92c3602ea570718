"""Opening a run: from its directory alone, as one however often it was interrupted; errors name file and remedy."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from moejax.inspection.run import open_run
from moejax.training.routing_log import RoutingLog

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
    assert (run.name, run.config, run.versions) == (tmp_path.name, FACTS["config"], FACTS["versions"])
    assert (run.git_commit, run.device, run.command) == ("abc123", FACTS["device"], FACTS["command"])
    assert (run.parameters_total, run.parameters_active, run.is_dense) == (1000, 400, False)
    assert run.routing.counts_SNE.tolist() == [[[1, 2, 3, 4]]]
    assert run.keys == ("loss/lm", "step")


def test_a_dense_run_has_no_routing(tmp_path):
    write_run(tmp_path, config={"moe": {"num_experts": 0}})
    run = open_run(tmp_path)
    assert run.is_dense and run.routing is None


def test_a_series_holds_the_lines_that_have_its_key(tmp_path):
    write_run(tmp_path, lines({"step": 10, "a": 1}, {"step": 15, "eval/loss": 2.5}, {"step": 20, "a": 0.5}))
    run = open_run(tmp_path)
    steps, values = run.series("a")
    assert (steps.tolist(), values.tolist()) == ([10, 20], [1.0, 0.5])
    assert [x.tolist() for x in run.series("eval/loss")] == [[15], [2.5]]
    assert [x.tolist() for x in run.series("absent")] == [[], []]
    assert (run.last("a"), run.last("absent")) == (0.5, None)


def test_steps_that_a_resumed_run_wrote_again_replace_the_earlier_ones(tmp_path):
    # Interrupted behind step 40, resumed from a checkpoint at 15 with another logging interval.
    before = [{"step": s, "a": s} for s in (10, 20, 30, 40)]
    after = [{"step": s, "a": -s} for s in (25, 35)]
    write_run(tmp_path, lines(*before, *after))
    steps, values = open_run(tmp_path).series("a")
    assert (steps.tolist(), values.tolist()) == ([10, 20, 25, 35], [10, 20, -25, -35])


def test_null_and_nan_read_as_nan(tmp_path):
    write_run(tmp_path, '{"step": 1, "a": null}\n{"step": 2, "a": NaN}\n{"step": 3, "a": 1}\n')
    values = open_run(tmp_path).series("a")[1]
    assert math.isnan(values[0]) and math.isnan(values[1]) and values[2] == 1


@pytest.mark.parametrize("tail", ['{"step": 20, "lo', '{"step": 20, "text": "\u00e9', "\0\0\0", "\n\n"])
def test_a_last_line_cut_off_by_a_crash_is_ignored(tmp_path, tail):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(tail.encode()[: len(tail)])  # also cuts a character in two
    assert [line["step"] for line in open_run(tmp_path).lines] == [10]


def test_a_complete_last_line_without_a_line_break_is_kept(tmp_path):
    write_run(tmp_path, '{"step": 10}\n{"step": 20}')
    assert [line["step"] for line in open_run(tmp_path).lines] == [10, 20]


@pytest.mark.parametrize("victim", ["config.json", "metrics.jsonl"])
def test_a_missing_file_is_named_with_a_remedy(tmp_path, victim):
    write_run(tmp_path)
    (tmp_path / victim).unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}/{victim} is missing; .*--workdir"):
        open_run(tmp_path)


def test_a_missing_directory_is_named_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/nowhere is no directory; .*--workdir"):
        open_run(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '"config"', "{}", "\udcff"])
def test_a_damaged_config_is_named_with_a_remedy(tmp_path, text):
    write_run(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json (is damaged|lacks) .*restore it, or start"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", []),
        ("config", {"moe": 3}),
        ("config", {"moe": {"num_experts": "<script>"}}),
        ("versions", "1.0"),
        ("parameters", {"total": 1}),
    ],
)
def test_a_config_entry_of_the_wrong_kind_is_named_with_a_remedy(tmp_path, key, value):
    write_run(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=rf"{tmp_path}/config.json: {key}.* must be .*restore it, or start"):
        open_run(tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "10"}', '{"step": null}'])
def test_a_damaged_line_in_the_middle_is_named_with_a_remedy(tmp_path, line):
    write_run(tmp_path, f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl: line 2 .*delete that line"):
        open_run(tmp_path)


def test_a_value_that_is_no_number_is_named(tmp_path):
    write_run(tmp_path, '{"step": 1, "a": "high"}\n')
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl, step 1: a='high' must be a number or null"):
        open_run(tmp_path).series("a")


def test_a_damaged_routing_log_is_named_with_a_remedy(tmp_path):
    write_run(tmp_path)
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing" / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}/routing is damaged .*delete it"):
        open_run(tmp_path)


def test_opening_a_run_needs_no_plotting_library():
    code = "import sys, moejax.inspection.run; sys.exit('matplotlib' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
