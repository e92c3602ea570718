"""`moejax ladder`: planned, trained, killed, reported and judged, as users do it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cases.ladders import LAWS
from cases.training import SMALL
from moejax.cli import main
from moejax.sweeps.ladder.directory import open_ladder, write_ladder
from moejax.sweeps.ladder.gates import GateRule
from moejax.sweeps.ladder.plan import plan_ladder
from moejax.sweeps.store.directory import write_sweep
from moejax.sweeps.store.records import record_of, write_record

ROOT = Path(__file__).parents[2]

RECIPE = '''
"""Debug models at three budgets."""
import runpy
BUDGETS = (2e8, 4e8, 8e8)
def get_config():
    config = runpy.run_path("{debug}")["get_config"]()
    config.model.num_layers = 1
    config.data.seq_len = 32
    config.train.log_every = 5
    config.train.eval_every = 0
    config.train.checkpoint_every = 10
    return config
def rung(budget, arm):
    return {{"train.batch_size": 4, "model.d_ff": 64 if budget < 5e8 else 96}}
def gate():
    return {{"speedup": 1.0, "noise": 0.004}}
def sweep():
    yield {{"moe.num_experts": 0}}
    yield {{"moe.num_experts": 4}}
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small_ladder.py"
    path.write_text(RECIPE.format(debug=ROOT / "configs/debug.py"))
    return f"--config={path}"


def printed(capsys, *arguments):
    """Runs the verb and returns its JSON."""
    assert main(["ladder", *arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_lists_the_runs_and_says_what_could_be_seen(recipe, capsys, tmp_path):
    before = sorted(tmp_path.iterdir())
    found = printed(capsys, recipe, "--dry-run")
    assert sorted(tmp_path.iterdir()) == before
    assert found["runs"] == 3 * 2 * 3 and len(found["list"]) == 6
    assert found["verdict"] == "with 3 seeds this cannot see less than 0.0124 nats"
    first, second = found["list"][0], found["list"][1]
    assert (first["arm"], second["arm"]) == ("dense", "num_experts=4")
    for row in found["list"]:
        assert row["flops"] == pytest.approx(row["budget"], rel=0.05)
        assert row["flops"] == row["tokens"] * row["flops_per_token"]
        assert row["rung"]["model.d_ff"] == (64 if row["budget"] < 5e8 else 96)
    one_seed = printed(capsys, recipe, "--dry-run", "--seeds=1", "--budgets=2e8,4e8")
    assert one_seed["runs"] == 4 and "1 seed nothing can be told apart" in one_seed["verdict"]


def test_a_ladder_of_six_arms_four_rungs_and_three_seeds_is_planned_soon(recipe, capsys):
    started = time.process_time()
    found = printed(
        capsys,
        recipe,
        "--dry-run",
        "--budgets=2e8,4e8,8e8,16e8",
        "moe.balance_weight=0.01,0.1,0.2",
    )
    assert found["runs"] == 4 * 4 * 3  # the dense arms are one
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (("def rung", "def rang"), [], "has no function rung(budget, arm)"),
        (("return {", "return 3 #{"), [], "returns 3; return a dict"),
        (("BUDGETS", "RUNGS"), [], "--budgets is missing; give the FLOPs of the rungs"),
        (("2e8, 4e8", '"many", 4e8'), [], "BUDGETS of the recipe has 'many', which is no number"),
        (("speedup", "speed"), [], "gate() gives speed, which is no rule; the nearest is speedup"),
        (("model.d_ff", "model.dff"), [], "model.dff is not a config key; the nearest"),
        (("64 if", "64 / 0 if"), [], "small_ladder.py, line 14: ZeroDivisionError"),
        (("", ""), ["--budgets=1e9,x"], "--budgets has 'x', which is no number of FLOPs"),
        (("", ""), ["--budgets=4e8,2e8"], "must be positive numbers of FLOPs that increase"),
        (("", ""), ["--seeds=0"], "--seeds=0 must be at least 1"),
        (("", ""), ["--pack=0"], "--pack=0 must be at least 1"),
        (("", ""), ["--processes=3"], "--processes=3 goes with --runner=pool or slurm"),
        (("", ""), ["moe.top_k=2", "moe.top_k=1"], "moe.top_k is given twice"),
        (("", ""), ["reprot"], "reprot is neither an axis, KEY=VALUES, nor one of report, gate"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused_and_writes_nothing(
    recipe, capsys, tmp_path, change, arguments, message
):
    path = tmp_path / "small_ladder.py"
    path.write_text(path.read_text().replace(*change) if change[0] else path.read_text())
    assert main(["ladder", recipe, f"--dir={tmp_path / 'new'}", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a ladder whose records have the losses of two laws."""
    directory = tmp_path_factory.mktemp("ladders") / "known"
    points = [{"moe.num_experts": 0}, {"moe.num_experts": 4}]
    budgets = (1e9, 4e9, 1.6e10, 6e10)
    planned = plan_ladder(SMALL, points, budgets, lambda budget, arm: {}, num_seeds=2)
    sweep = write_sweep(
        directory, planned.plan, largest_pack=8, recipe="r.py", match="", command="moejax ladder"
    )
    ladder = write_ladder(sweep, planned, GateRule(speedup=1.1))
    for run in ladder.runs:
        law = LAWS["dense" if run.arm == "dense" else "experts"]
        arm = sweep.arms[run.id]
        row = record_of(
            sweep.workdir(run.id),
            arm.to_json(),
            status="done",
            error=None,
            wall_s=2.0 if run.arm == "dense" else 3.0,
            step_s=0.1,
            packed=1,
        )
        loss = law.loss(1e3 * run.budget) + 1e-3 * run.seed
        row |= {"final/eval/loss": loss, "tokens": 4096 * arm.config.train.num_steps}
        write_record(sweep.workdir(run.id), row)
    return directory


def test_a_report_has_laws_prediction_and_arms_as_json_and_a_page(measured, capsys):
    found = printed(capsys, "report", str(measured))
    for arm, law in zip(("dense", "num_experts=4"), LAWS.values(), strict=True):
        assert found["law"][arm]["a"] == pytest.approx(law.a, abs=2e-3)
        assert found["law"][arm]["E"] == pytest.approx(law.E, abs=0.02)
        assert len(found["law"][arm]["A_interval"]) == 2
    prediction = found["prediction"]
    assert prediction["budget"] == 6e10
    assert prediction["predicted"] == pytest.approx(prediction["measured"], abs=2e-3)
    assert len(found["arms"]) == 8
    page = Path(found["report"]).read_text()
    assert found["report"] == str(measured / "ladder.html")
    for words in ("Loss over compute", "L = E + A C⁻ᵃ", "num_experts=4", "<svg", "data:image/svg"):
        assert (words in page) == (words != "<svg"), words
    assert main(["ladder", "report", str(measured)]) == 0
    table = capsys.readouterr().out
    assert "predicted from those below" in table and "num_experts=4" in table


def test_a_gate_gives_speed_ups_and_a_verdict(measured, capsys):
    found = printed(capsys, "gate", f"{measured}:dense", f"{measured}:num_experts=4")
    (candidate,) = found["candidates"]
    assert (found["baseline"], candidate["candidate"]) == ("dense", "num_experts=4")
    assert (candidate["verdict"], candidate["gate"]) == ("works", 1.1)
    for rung in candidate["rungs"]:
        law, other = LAWS.values()
        budget = 1e3 * rung["budget"]
        expected = law.budget(other.loss(budget)) / budget
        assert rung["flops_speedup"] == pytest.approx(expected, rel=0.02)
        assert rung["time_speedup"] == pytest.approx(expected * 2 / 3, rel=0.02)
    assert main(["ladder", "gate", f"{measured}:dense", f"{measured}:num_experts=4"]) == 0
    assert "works" in capsys.readouterr().out


def test_folders_and_arms_that_are_none_are_refused(measured, capsys, tmp_path):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/ladder.json").write_text('{"budgets": 3}')
    for arguments, message in (
        (["report"], "name a ladder: moejax ladder report DIR"),
        (["report", str(tmp_path)], "ladder.json does not exist; name a folder that moejax ladder"),
        (["report", str(tmp_path / "damaged")], "ladder.json is damaged"),
        (["report", str(measured), "--seeds=2"], "--seeds=2 is not for moejax ladder report"),
        (["gate", str(measured)], "name a baseline and a candidate"),
        (["gate", str(measured), str(measured)], "has several arms; write"),
        (["gate", f"{measured}:dense", f"{measured}:x"], "has no arm x; its arms are dense, num_"),
        (["gate", f"{measured}:dense", f"{measured}:dense"], "is the baseline itself"),
    ):
        assert main(["ladder", *arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, captured.err


def ladder(*arguments):
    """Starts a process of `moejax ladder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "moejax", "ladder", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def losses_of(directory):
    rows = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    return {row["arm"]: row["final/eval/loss"] for row in rows}


@pytest.mark.slow
def test_a_ladder_killed_at_any_point_ends_with_the_same_records(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = [recipe, f"--config.data.directory={tmp_path / 'rows'}", "--seeds=2", "--json"]
    whole = ladder(*own, f"--dir={tmp_path / 'whole'}")
    output, errors = whole.communicate(timeout=400)
    assert whole.returncode == 0, errors[-3000:]
    assert json.loads(output)["law"]["dense"]["a"] > 0
    killed = tmp_path / "killed"
    for pause_s in (0.5, 3.0, 6.0, 9.0):
        process = ladder(*own, f"--dir={killed}")
        try:
            process.communicate(timeout=pause_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    last = ladder(*own, f"--dir={killed}")
    output, errors = last.communicate(timeout=400)
    assert last.returncode == 0, errors[-3000:]
    assert losses_of(killed) == losses_of(tmp_path / "whole")
    assert open_ladder(killed).runs == open_ladder(tmp_path / "whole").runs
    assert re.search(r"num_experts=4", output)
