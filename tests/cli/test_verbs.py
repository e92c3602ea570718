"""The command: a mistake is one line and exit 2; --json is one document; what it prints is true."""

import errno
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.cli import VERBS, main
from moejax.inspection.runs.run import open_run
from moejax.models.placement import place_experts
from moejax.training.run import TrainResult

REPOSITORY = Path(__file__).parents[2]
DEBUG = REPOSITORY / "configs/debug.py"
TRAIN = ["train", f"--config={DEBUG}"]
ONE_DEVICE = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The debug recipe, trained and reported by the command on one device.

    Returns the folder, the run directory and the printed JSON.
    """
    folder = tmp_path_factory.mktemp("cli")
    environment = os.environ | ONE_DEVICE | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "moejax",
            "train",
            f"--config={DEBUG}",
            "--json",
            "--config.moe.num_experts=6",
            "--config.train.num_steps=10",
            "--workdir=no such/../runs/debug",
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder / "log").write_text(done.stderr)
    return folder, folder / "runs/debug", json.loads(done.stdout)


@pytest.fixture
def in_folder(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    return trained[1]


def test_train_prints_its_figures_and_writes_the_report(trained):
    _, workdir, rows = trained
    assert rows["steps"] == 10
    assert rows["parameters, total"] > rows["parameters, active"] > 0
    assert len(rows["expert load, layer 1"]) == 6
    assert sum(rows["expert load, layer 1"]) == pytest.approx(6, abs=0.05)
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["config"]["moe"]["num_experts"] == 6
    page = (workdir / "report.html").read_text()
    assert "bits per byte" in page.lower() and "<img" in page
    assert 'class="moejax-trace"' in page and "Routing goes most by" in page


def test_a_run_begins_with_the_weights_of_another_by_a_flag(trained, capsys, monkeypatch):
    folder, workdir, _ = trained
    monkeypatch.chdir(folder)
    fork = ["train", f"--config={workdir / 'config.json'}", "--init=runs/debug:10"]
    arguments = ["--config.train.num_steps=12", "--config.init.state=all", "--workdir=forked"]
    done = subprocess.run(
        [sys.executable, "-m", "moejax", *fork, *arguments, "--json", "--noreport"],
        env=os.environ | ONE_DEVICE | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    facts = json.loads((folder / "forked/config.json").read_text())
    assert facts["config"]["init"]["source"] == f"{workdir.resolve()}:10"
    assert [entry["step"] for entry in facts["lineage"]] == [10]
    lines = [json.loads(line) for line in (folder / "forked/metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss/lm" in line] == [12]
    for more, message in (
        (["--config.init.source=runs/other"], "name two sources; leave one out"),
        (["--init=none"], "--init is given twice"),
    ):
        assert main([*fork, *more, "--workdir=other"]) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(folder / "forked")
    assert not (folder / "other").exists()


def test_the_log_of_a_training_says_where_it_runs_and_repeats_nothing(trained):
    lines = (trained[0] / "log").read_text().splitlines()
    assert "1 x cpu, mesh: one device" in lines
    for beginning in ("grouped_matmul: tiled on cpu", "synthetic train: "):
        assert len([line for line in lines if line.startswith(beginning)]) == 1
    steps = [line for line in lines if re.match(r"step \d+/10  loss", line)]
    first, *_, last = steps
    assert first.startswith("step 1/10") and "left" not in first
    assert last.endswith("0:00 left")


def test_a_path_with_dots_means_the_same_folder_to_every_verb(
    trained, in_folder, monkeypatch, capsys
):
    assert sorted(path.name for path in trained[0].iterdir()) == ["data", "log", "runs"]
    monkeypatch.chdir(in_folder / "routing")
    for given in ("..", "../../debug", "../routing/.."):
        run = open_run(given)
        assert run.workdir == in_folder.resolve() and run.name == "debug"
        assert len(run.routing.steps) == 2
    command = shlex.split(run.command)
    assert command[:2] == ["moejax", "train"] and command[-1] == "--workdir=no such/../runs/debug"
    assert main(["report", "--workdir=../../debug"]) == 0
    assert "is damaged" not in (in_folder / "report.html").read_text()


def test_a_run_that_cannot_be_written_is_said_before_any_work(in_folder, monkeypatch, capsys):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def work(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr("moejax.paths.tempfile.TemporaryFile", refuse)
    for name in (
        "train.train",
        "report.build_report",
        "report.write_comparison",
        "counterfactuals.counterfactuals",
    ):
        monkeypatch.setattr(f"moejax.cli.verbs.{name}", work)
    workdir = f"--workdir={in_folder}"
    for arguments in (
        ["train", f"--config={DEBUG}", workdir],
        ["report", workdir],
        ["report", str(in_folder), str(in_folder.parent)],
        ["counterfactuals", workdir],
        ["sweep", f"--config={DEBUG}", f"--dir={in_folder}", "moe.top_k=2,3"],
        ["sweep", "report", str(in_folder)],
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert "cannot be written" in error and "Read-only file system" in error, error
        assert error.count("\n") == 1, error


def test_eval_from_the_run_directory_gives_the_figures_of_training(trained, in_folder, capsys):
    _, _, of_training = trained
    assert main(["eval", f"--workdir={in_folder}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["step"] == 10
    for name in ("validation loss", "bits per byte"):
        assert rows[name] == pytest.approx(of_training[name], abs=2e-4)


def test_eval_opens_an_older_step_and_names_the_steps_there_are(in_folder, capsys):
    assert main(["eval", f"--workdir={in_folder}", "--step=99"]) == 2
    assert "holds no step 99; it holds [10]" in capsys.readouterr().err


def test_placement_shows_how_even_the_load_of_devices_is(trained, in_folder, capsys):
    command = ["placement", f"--workdir={in_folder}", "--devices=2"]
    assert main([*command, "--replicas=2", "--json"]) == 0
    *rows, worst = json.loads(capsys.readouterr().out)
    assert worst["layer"] == "worst" and [row["layer"] for row in rows] == ["0", "1"]
    for column in ("in order", "placed", "placed, with copies"):
        figures = [row[column] for row in rows]
        assert worst[column] == max(figures) and min(figures) >= 1
    assert worst["placed"] <= worst["in order"]
    loads = trained[2]["expert load, layer 0"]
    halves = sum(loads[:3]), sum(loads[3:])
    assert rows[0]["in order"] == pytest.approx(2 * max(halves) / sum(halves), abs=0.02)
    assert main(command) == 0
    assert "worst" in capsys.readouterr().out


def test_eval_with_experts_in_other_places_gives_the_same_figures(
    trained, in_folder, capsys, monkeypatch
):
    _, _, of_training = trained
    placed = []

    def record(model, slots):
        placed.append(slots)
        return place_experts(model, slots)

    monkeypatch.setattr("moejax.inference.evaluate.place_experts", record)
    command = ["eval", f"--workdir={in_folder}", "--mesh=data=4,expert=2", "--replicas=2", "--json"]
    assert main(command) == 0
    assert [slots.shape for slots in placed] == [(2, 6 + 2 * 2)]
    rows = json.loads(capsys.readouterr().out)
    assert rows["validation loss"] == pytest.approx(of_training["validation loss"], abs=2e-4)
    load = "expert load, layer 1"
    assert rows[load] == pytest.approx(of_training[load], abs=0.02)


def test_placement_says_where_copies_would_not_help(in_folder, monkeypatch, capsys):
    load_NE = np.array([[5.0, 7, 7, 8, 8, 3], [9, 1, 1, 1, 1, 2]])

    def newest_evaluation(workdir, step):
        return {"load": load_NE}

    monkeypatch.setattr("moejax.cli.verbs.placement.newest_evaluation", newest_evaluation)
    arguments = ["placement", f"--workdir={in_folder}", "--devices=2", "--replicas=1"]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Copies would make some layers less even (layer 0: 1.053 with, 1.000 without)" in shown
    assert main([*arguments, "--json"]) == 0
    even, skewed, _ = json.loads(capsys.readouterr().out)
    assert even["placed, with copies"] == even["in order"] == 1
    assert skewed["placed, with copies"] < skewed["placed"] <= skewed["in order"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["placement"], ["--devices=1 must be at least 2"]),
        (["placement", "--devices=4"], ["6 experts do not divide over 4 devices"]),
        (["placement", "--devices=2", "--replicas=4"], ["4 replicas", "between 0 and 3"]),
        (["placement", "--devices=2", "--step=3"], ["--step=3 was not evaluated; use one of 10"]),
        (["eval", "--mesh=data=2,expert=4"], ["moe.num_experts=6", "mesh.expert=4"]),
        (["eval", "--mesh=expert"], ["'expert' must be AXIS=SIZE"]),
        (["eval", "--replicas=1"], ["--replicas=1", "as in --mesh=expert=4"]),
    ],
)
def test_an_impossible_placement_is_an_error_that_says_why(in_folder, flags, words, capsys):
    verb, *others = flags
    assert main([verb, f"--workdir={in_folder}", *others]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_generate_streams_a_prompt_and_its_continuation(in_folder, capsys):
    assert main(["generate", f"--workdir={in_folder}", "--prompt=The ", "--max_tokens=8"]) == 0
    assert capsys.readouterr().out.startswith("The ")


def test_generate_takes_a_batch_of_prompts(in_folder, capsys):
    arguments = [
        "generate",
        f"--workdir={in_folder}",
        "--prompt=a",
        "--prompt=some words",
        "--max_tokens=4",
        "--json",
    ]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert [result["prompt"] for result in first] == ["a", "some words"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_generate_takes_prompts_that_are_no_utf8_and_fits_the_trained_length(
    in_folder, capsys, caplog
):
    arguments = [
        "generate",
        f"--workdir={in_folder}",
        "--prompt=caf\udce9 \u65e5",
        "--prompt=a",
        "--json",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() and json.loads(printed)[0]["prompt"] == "caf\ufffd \u65e5"
    replaced = "--prompt has bytes that are not UTF-8, which are replaced: caf\ufffd \u65e5"
    assert caplog.messages[0] == replaced
    assert "unknown ground" not in caplog.text
    assert main([*arguments, "--max_tokens=60"]) == 0
    assert "beyond 64 tokens" in caplog.text


def test_report_is_written_again_from_the_run_directory(in_folder, capsys):
    page = in_folder / "report.html"
    page.unlink()
    assert main(["report", f"--workdir={in_folder}"]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.stat().st_size > 10_000


MISTAKES = [
    (["trian"], "nearest is train"),
    (["train"], "--config is missing"),
    (["train", "--config=nothing.py"], "nothing.py"),
    ([*TRAIN, "--config.moe.num_expert=4"], "nearest is moe.num_experts"),
    (
        [*TRAIN, "--config.moe.num_experts=many"],
        "moe.num_experts='many' must be a whole number",
    ),
    (
        [*TRAIN, "--config.moe.num_experts=2.5"],
        "moe.num_experts='2.5' must be a whole number",
    ),
    ([*TRAIN, "--config.moe.top_k=1"], "moe.renormalize=True with moe.top_k=1"),
    ([*TRAIN, "--config.moe.top_k=9"], "moe.top_k=9 must be between 1 and moe.num_experts=4"),
    ([*TRAIN, "--config.moe.router=switsh"], "nearest is switch"),
    ([*TRAIN, "--config.mesh.tensor=3"], "mesh.tensor=3 do not fit 8 devices"),
    ([*TRAIN, "--config.train.batch_size=9"], "train.batch_size=9"),
    ([*TRAIN, "--confg.moe.top_k=2"], "confg.moe.top_k"),
    ([*TRAIN, "--config.data.source=files"], "data.files"),
    (
        [*TRAIN, "--config.data.source=files", "--config.data.files=none/*.txt"],
        "none/*.txt",
    ),
    (["eval"], "--workdir is missing"),
    (["report", "--workdir=nowhere"], "--workdir=nowhere is not a folder"),
    (["view"], "--workdir is missing"),
    (["view", "--workdir=nowhere"], "--workdir=nowhere is not a folder"),
    (["view", "--workdir=.", "--port=70000"], "port"),
    (["bench", "speed"], "start, telemetry, packed, compile, import; got speed"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    MISTAKES,
    ids=lambda value: " ".join(value[-2:])[-40:] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("moejax: ") and message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_view_names_a_port_that_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["view", f"--workdir={tmp_path}", f"--port={port}"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"moejax: --port={port} cannot be had (Address already in use)")
    assert captured.err.count("\n") == 1


def test_view_without_panel_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "panel", None)
    assert main(["view", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "pip install -e '.[view]'" in error and error.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    from moejax.config import ConfigError

    with pytest.raises(ConfigError):
        main(["train", f"--config={DEBUG}", "--config.moe.top_k=9", "--debug"])


def test_a_workdir_without_a_run_is_refused_by_every_verb_that_needs_one(tmp_path, capsys):
    for verb in ("eval", "generate", "report"):
        assert main([verb, f"--workdir={tmp_path}"]) == 2
        assert "config.json" in capsys.readouterr().err


def test_a_damaged_run_is_refused_with_the_file_named(trained, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert main(["eval", f"--workdir={tmp_path}"]) == 2
    assert re.search(r"config.json is damaged", capsys.readouterr().err)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"moejax {verb}: ") and "Flags:" in printed


def test_without_a_verb_the_verbs_are_listed(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)


def test_a_report_that_fails_does_not_hide_the_figures(tmp_path, monkeypatch, capsys, caplog):
    def fails(workdir):
        raise MemoryError("no room")

    monkeypatch.setattr(
        "moejax.cli.verbs.train.train",
        lambda *arguments, **keywords: TrainResult(7, None, None, 123.4),
    )
    monkeypatch.setattr("moejax.cli.verbs.train.build_report", fails)
    assert main(["train", f"--config={DEBUG}", f"--workdir={tmp_path}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows["steps"], rows["tokens/s"], rows["report"]) == (7, 123, None)
    assert "no report: no room" in caplog.text
