"""A run that was stopped, damaged and continued: one line says what is wrong, or all goes on exactly.

The fixture stops a run within a logging interval. Each test continues copies of it in this process;
what is compiled is compiled once.
"""

import json
import logging
import re
import shutil
import threading

import jax
import numpy as np
import pytest

from cases.damage import copy_run, damage, kind_of, ways
from cases.training import make, replace, small_config
from moejax import paths
from moejax.config import ConfigError
from moejax.inspection.runs.run import open_run
from moejax.locks import FolderLock, LockedError
from moejax.sharding import make_mesh
from moejax.training import loop
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.checkpoints.meta import add_metrics, read_meta, saved_steps
from moejax.training.health.alarms import read_alarms
from moejax.training.loop import train
from moejax.training.multihost.signals import StopSignals
from moejax.training.run_directory import metrics
from moejax.training.run_directory.evaluation_log import Evaluations
from moejax.training.run_directory.layout import log_changes, warn_of_lost_checkpoints
from moejax.training.run_directory.line_file import is_as_noted
from moejax.training.run_directory.routing_log import read_routing

STOP = 5
KINDS = {
    "config.json", "metrics.jsonl", "alarms.jsonl", "tokenizer.json", "tensorboard/*",
    "routing/zarr.json", "routing/counts/zarr.json", "routing/step/c/*", "routing/evaluations/*.npz",
    "checkpoints/*/meta/metadata", "checkpoints/*/_CHECKPOINT_METADATA", "checkpoints/*/model/manifest.ocdbt",
    "checkpoints/*/model/ocdbt.process_0/d/*", "checkpoints/*/optimizer/ocdbt.process_0/d/*",
}  # fmt: skip
"""Some of those that must be there, so that the test does not pass over what it is about."""


@pytest.fixture(scope="module")
def programs():
    """Makes `train` compile its programs once for all calls within this file, for one device."""
    patch = pytest.MonkeyPatch()
    known = {}

    def once(name, function):
        def cached(*arguments, **keywords):
            if name not in known:
                known[name] = function(*arguments, **keywords)
            return known[name]

        return cached

    patch.setattr(loop._Loop, "_compile", once("step", loop._Loop._compile))
    patch.setattr(loop, "make_eval_step", once("eval", loop.make_eval_step))
    patch.setattr(loop, "make_train_setup", once("setup", loop.make_train_setup))
    patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    yield
    patch.undo()


def train_to(config, workdir, step):
    """Trains until a signal comes during a step."""
    stop = StopSignals()
    add = metrics.Recorder.add

    def add_and_signal(self, output):
        finished = add(self, output)
        if finished.step >= step - 1:  # that of the step before
            stop.request("SIGTERM")
        return finished

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Recorder, "add", add_and_signal)
        return train(config, workdir, stop=stop)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, programs):
    """(config, a run stopped at step 5, the same run without a stop)."""
    folder = tmp_path_factory.mktemp("damage")
    config = small_config(
        train={"num_steps": 6, "log_every": 2, "eval_every": 4, "checkpoint_every": 4},
        data={"directory": str(folder / "data")},
        optimizer={"learning_rate": 1e-2},
        alarms={"collapse": 0.01, "dead_experts": 1},
    )
    result = train_to(config, folder / "stopped", STOP)
    assert (result.step, result.stopped_by) == (STOP, "SIGTERM")
    (folder / "stopped/report.html").write_text("<html></html>")
    train(config, folder / "whole")
    return config, folder / "stopped", folder / "whole"


def lines(workdir):
    """Metrics without times."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("perf/")} for line in found
    ]


def routing(workdir):
    history = read_routing(workdir)
    return {name: history.read(name) for name in history.names} | {"step": history.steps}


def evaluations(workdir):
    found = Evaluations(workdir)
    return {step: found.read(step) for step in found.steps}


def state(config, workdir):
    checkpoints = Checkpoints(workdir, make(config), read_only=True)
    return [np.asarray(x) for x in jax.tree.leaves(checkpoints.restore(config.train.num_steps))]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_stop_within_a_logging_interval_changes_neither_metrics_nor_routing_nor_alarms(
    runs, tmp_path
):
    config, stopped, whole = runs
    assert lines(stopped)[-1]["step"] == STOP  # the cut interval can be seen until the run goes on
    copy = copy_run(stopped, tmp_path / "run")
    train(config, copy)
    assert lines(copy) == lines(whole)
    assert read_alarms(copy) == read_alarms(whole) != []
    assert_same(routing(copy), routing(whole))
    for a, b in zip(state(config, copy), state(config, whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_file_damaged_in_any_way_gives_one_line_or_an_exact_continuation(runs, tmp_path, caplog):
    config, stopped, whole = runs
    expected = state(config, whole)
    rng = np.random.default_rng(0)
    files = {}
    for path in sorted(stopped.rglob("*")):
        if path.is_file() and path.name != ".lock" and f"checkpoints/{STOP - 1}" not in str(path):
            kind = kind_of(path, stopped)
            if kind not in files or path.stat().st_size > files[kind].stat().st_size:
                files[kind] = path
    assert set(files) >= KINDS, KINDS - set(files)
    outcomes = {}
    for turn, (kind, path) in enumerate(sorted(files.items())):
        for how in [ways()[(turn + offset) % len(ways())] for offset in (0, 4)]:
            copy = copy_run(stopped, tmp_path / "run")
            if damage(copy / path.relative_to(stopped), how, rng):
                caplog.clear()
                outcomes[kind, how] = continued(config, copy, whole, expected, caplog)
    wrong = {
        case: outcome
        for case, outcome in outcomes.items()
        if outcome not in ("refused", "exact", "warned")
    }
    assert not wrong
    assert {"refused", "exact", "warned"} == set(outcomes.values())


def continued(config, workdir, whole, expected, caplog):
    """How a damaged run goes on: `refused`, `exact`, `warned` (exact but for lost history), or what is wrong."""
    try:
        train(config, workdir)
    except Exception as error:  # whatever it is, it is looked at
        is_ours = type(error).__module__.startswith("moejax.") and isinstance(error, ValueError)
        return (
            "refused" if is_ours and "\n" not in str(error) else f"{type(error).__name__}: {error}"
        )
    for a, b in zip(state(config, workdir), expected, strict=True):
        if not np.array_equal(a, b):
            return "another state"
    warnings = [
        r.message for r in caplog.records if r.name == "moejax" and r.levelno >= logging.WARNING
    ]
    is_warned = any(str(workdir) in message for message in warnings)
    found, wanted = lines(workdir), lines(whole)
    if any("and the next has no churn" in message for message in warnings):
        wanted[-1].pop("eval/routing_churn")
    if found != wanted and not any("metrics.jsonl" in message for message in warnings):
        return "other metrics"
    if found[-2:] != wanted[-2:]:
        return "other metrics after the checkpoint"
    if read_alarms(workdir) != read_alarms(whole) and not any(
        "alarms.jsonl" in message for message in warnings
    ):
        return "other alarms"
    try:
        assert_same(routing(workdir), routing(whole))
    except (AssertionError, ValueError):
        return "warned" if is_warned else "other routing"
    return "warned" if is_warned else "exact"


def test_a_file_damaged_in_any_way_is_read_exactly_or_refused(runs, tmp_path):
    _, stopped, _ = runs
    rng = np.random.default_rng(1)
    expected = {
        "routing": routing(stopped),
        **{f"eval {k}": v for k, v in evaluations(stopped).items()},
    }
    files = [path for path in sorted((stopped / "routing").rglob("*")) if path.is_file()]
    for path in files:
        for how in ways():
            copy = copy_run(stopped, tmp_path / "run")
            if not damage(copy / path.relative_to(stopped), how, rng):
                continue
            for name, read in {"routing": routing, "eval": evaluations}.items():
                if ("evaluations" in str(path)) != (name == "eval"):
                    continue
                try:
                    found = read(copy) if read_routing(copy) is not None else None
                except ValueError as error:
                    assert re.fullmatch(r".*(is damaged|cannot be read).*", str(error)), (path, how)
                    continue
                if name == "eval":
                    for step, arrays in (found or {}).items():
                        assert_same(arrays, expected[f"eval {step}"])
                elif found is not None and len(found["step"]) == len(expected["routing"]["step"]):
                    assert_same(found, expected["routing"])


def test_lost_metrics_are_said_once_and_counters_come_from_the_checkpoint(runs, tmp_path, caplog):
    config, stopped, whole = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "metrics.jsonl").write_text("")
    train(config, copy)
    assert (
        sum(
            "metrics.jsonl is not what was written up to step 4" in r.message
            for r in caplog.records
        )
        == 1
    )
    assert lines(copy) == [line for line in lines(whole) if line["step"] > 4]  # `tokens` included
    caplog.clear()
    train(config, copy)
    assert not any("metrics.jsonl" in record.message for record in caplog.records)


def test_lines_that_are_no_metrics_are_left_out_and_that_is_said(runs, tmp_path, caplog):
    config, stopped, whole = runs
    deep = '{"step": 2, "tokens": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for line in (
        '{"step": 2, "tokens": "many"}',
        '{"step": 2, "tokens": null}',
        deep,
        "[1]",
        "\x00",
    ):
        copy = copy_run(stopped, tmp_path / "run")
        path = copy / "metrics.jsonl"
        path.write_text(line + "\n" + path.read_text())
        caplog.clear()
        train(config, copy)
        assert lines(copy) == lines(whole)
        assert any(
            "metrics.jsonl is not what was written" in record.message for record in caplog.records
        )


def test_a_lost_routing_group_file_is_written_again(runs, tmp_path, caplog):
    config, stopped, whole = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "routing/zarr.json").unlink()
    train(config, copy)
    assert_same(routing(copy), routing(whole))
    assert any(
        "routing/zarr.json is lost and is written again" in record.message
        for record in caplog.records
    )


def test_a_lost_evaluation_is_said_and_is_no_reference_for_churn(runs, tmp_path, caplog):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "routing/evaluations/4.npz").unlink()
    train(config, copy)
    assert any(
        "lacks the evaluations of step 4, and the next has no churn" in r.message
        for r in caplog.records
    )
    assert "churn" not in Evaluations(copy).read(6)


@pytest.mark.parametrize("change", ["none", "digit", "line", "cut"])
def test_who_looks_at_a_run_learns_that_its_metrics_were_changed(runs, tmp_path, caplog, change):
    copy = copy_run(runs[2], tmp_path / "run")
    content = (copy / "metrics.jsonl").read_bytes()
    rows = content.splitlines(keepends=True)
    place = content.index(b'"loss/lm": ') + len(b'"loss/lm": ')
    digit = b"%d" % ((int(content[place : place + 1]) + 1) % 10)
    changed = {
        "none": content,
        "digit": content[:place] + digit + content[place + 1 :],
        "line": b"".join(rows[1:]),
        "cut": b"".join(rows[:-1]),
    }
    (copy / "metrics.jsonl").write_bytes(changed[change])
    run = open_run(copy)
    assert run.keys and run.last("loss/lm") is not None
    said = [
        record.getMessage()
        for record in caplog.records
        if "is not what was written" in record.getMessage()
    ]
    assert len(said) == (change != "none")
    expected = f"{copy / 'metrics.jsonl'} is not what was written up to step 6: a part of it is lost or changed"
    assert all(line.startswith(expected) for line in said)


@pytest.mark.parametrize(
    "noted",
    [
        [],
        {"bytes": "9", "digest": ""},
        {"bytes": -1, "digest": ""},
        {"bytes": 2**80, "digest": ["x"]},
        "x",
    ],
)
def test_what_a_checkpoint_notes_of_a_file_may_be_anything(tmp_path, noted):
    (tmp_path / "metrics.jsonl").write_bytes(b"{}")
    assert not is_as_noted(tmp_path / "metrics.jsonl", noted)


def test_an_evaluation_that_a_signal_cut_off_is_made_up_for_as_if_it_had_not_been(
    runs, tmp_path, caplog, monkeypatch
):
    config, _, whole = runs
    copy = tmp_path / "run"
    stop = StopSignals()

    def cut_off(*arguments, **keywords):
        stop.request("SIGTERM")
        return evaluate(*arguments, **keywords)

    evaluate = loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", cut_off)
        assert train(config, copy, stop=stop).step == 4
    assert read_meta(copy / "checkpoints/4")["metrics"] is None
    for _ in range(2):  # the second finds the line that the first has added
        assert train_to(config, copy, 1).step == 5
        for later in (5, 6):
            shutil.rmtree(copy / f"checkpoints/{later}", ignore_errors=True)
    assert (
        read_meta(copy / "checkpoints/4")["metrics"]
        == read_meta(whole / "checkpoints/4")["metrics"]
    )
    train(config, copy)
    assert "is not what was written" not in caplog.text
    assert lines(copy) == lines(whole)
    with Checkpoints(copy, make(config, 1), read_only=True) as found:
        losses = {step: found._manager.metrics(step) for step in found.steps()}
    assert (
        losses == {step: read_meta(whole / f"checkpoints/{step}")["metrics"] for step in losses}
        and losses[4]
    )


def test_numbers_that_moejax_does_not_write_are_no_steps(runs, tmp_path):
    copy = copy_run(runs[1], tmp_path / "run")
    for name in ("checkpoints/²", "checkpoints/٣"):
        (copy / name).mkdir()
    (copy / "routing/evaluations/².npz").write_bytes(b"")
    run = open_run(copy)
    assert run.checkpoints == tuple(saved_steps(copy)) == (4, STOP)
    assert run.evaluations.steps == (4,)


def test_facts_of_another_kind_than_what_is_written_are_named(runs, tmp_path):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    facts = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(facts | {"numerics": ["x"]}))
    with pytest.raises(
        ConfigError, match=r"config\.json is damaged: numerics=\['x'\] must be an object"
    ):
        train(config, copy)


def test_a_kill_while_an_evaluation_is_added_leaves_a_whole_checkpoint(runs, tmp_path, monkeypatch):
    _, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    folder = copy / f"checkpoints/{STOP}"
    assert read_meta(folder)["metrics"] is None
    replaced = paths.os.replace

    def killed(source, target):
        if "meta" in str(target):
            raise KeyboardInterrupt
        replaced(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paths.os, "replace", killed)
        add_metrics(folder, {"eval/loss": 1.0})
    assert read_meta(folder)["metrics"] is None
    add_metrics(folder, {"eval/loss": 2.0})
    assert read_meta(folder)["metrics"] == {"eval/loss": 2.0}


def test_after_a_refusal_nothing_goes_on_writing(runs, tmp_path):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "routing/zarr.json").write_text("{}")
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="routing is damaged"):
        train(config, copy)
    writers = [
        thread
        for thread in set(threading.enumerate()) - before
        if "tensorboardX" in type(thread).__module__
    ]
    assert not writers


def test_a_second_training_of_a_run_is_told_who_trains_it(runs, tmp_path):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    before = (copy / "metrics.jsonl").read_bytes()
    with (
        FolderLock(copy, "train"),
        pytest.raises(LockedError, match=r"run is being written by process \d+ on .*train"),
    ):
        train(config, copy)
    assert (copy / "metrics.jsonl").read_bytes() == before
    open_run(copy)  # looking at it needs no lock


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_run_that_another_process_has_taken_over_writes_nothing_more(
    runs, tmp_path, monkeypatch, is_saved
):
    config, _, _ = runs
    if not is_saved:  # the next that is written is a line of metrics
        monkeypatch.setattr(Checkpoints, "save", lambda *_: True)
    record = {
        "pid": 7,
        "host": "node9",
        "boot": "b",
        "since": "then",
        "does": "train",
        "nonce": "n",
        "beat": 1,
    }
    contents = []

    def take_over(step, _):
        if step == 4:
            (tmp_path / "run/.lock").write_text(json.dumps(record))
            contents.append((tmp_path / "run/metrics.jsonl").read_bytes())

    with pytest.raises(
        LockedError, match=r"run was taken over by process 7 on node9 \(train, since then\)"
    ):
        train(config, tmp_path / "run", on_evaluation=take_over)
    assert [(tmp_path / "run/metrics.jsonl").read_bytes()] == contents
    assert not [path for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()]
    assert json.loads((tmp_path / "run/.lock").read_text()) == record


def test_without_config_json_a_run_goes_on_under_its_own_configuration_alone(runs, tmp_path):
    config, stopped, whole = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"optimizer.learning_rate=0.01, not 0.5"):
        train(replace(config, "optimizer", learning_rate=0.5), copy)
    assert not (copy / "config.json").exists()
    train(config, copy)
    assert lines(copy) == lines(whole)


def test_a_run_continued_with_other_steps_is_told_what_that_means(runs, caplog):
    config, _, _ = runs
    caplog.set_level(logging.INFO, logger="moejax")
    for num_steps, step, said in (
        (12, 6, r"continuing with train.num_steps=12 \(was 6\)"),
        (12, 6, "train.num_steps=12 stretches the schedules: the learning rate goes on at 0.00"),
        (3, 6, "train.num_steps=3: the run is already at step 6, and nothing is trained"),
    ):
        caplog.clear()
        log_changes(config, replace(config, "train", num_steps=num_steps), step)
        assert any(re.search(said, record.message) for record in caplog.records), said
    caplog.clear()
    log_changes(config, config, 4)
    assert not caplog.records


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again_in_silence(runs, tmp_path, caplog):
    _, stopped, _ = runs
    warn_of_lost_checkpoints(stopped)
    assert "has metrics and no checkpoint: the run begins at step 0" in caplog.text
    caplog.clear()
    warn_of_lost_checkpoints(tmp_path)
    assert not caplog.records


def test_a_lowered_number_of_steps_trains_nothing_and_loses_nothing(runs, tmp_path, monkeypatch):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    before = lines(copy)
    lowered = replace(config, "train", num_steps=4)
    monkeypatch.setattr(loop, "make_train_setup", lambda config, mesh: make(config))
    assert train(lowered, copy).step == STOP
    assert lines(copy) == before
