"""A run that was stopped, damaged and continued: it is refused in one line, or goes on exactly.

The fixture stops a run within a logging interval. Each test continues copies of it in this process;
its programs are compiled once.
"""

import itertools
import json
import logging
import re
import shutil
import threading

import jax
import numpy as np
import pytest

from cases.damage import copy_run, damage, kind_of, ways
from cases.training import make, replace, share_programs, small_config
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
from moejax.training.run_directory.changes import log_changes
from moejax.training.run_directory.evaluation_log import Evaluations
from moejax.training.run_directory.layout import warn_of_lost_checkpoints
from moejax.training.run_directory.line_file import is_as_noted
from moejax.training.run_directory.routing_log import read_routing

STOP = 5
KINDS = {
    "config.json",
    "metrics.jsonl",
    "alarms.jsonl",
    "tokenizer.json",
    "tensorboard/*",
    "routing/zarr.json",
    "routing/counts/zarr.json",
    "routing/step/c/*",
    "routing/evaluations/*.npz",
    "checkpoints/*/meta/metadata",
    "checkpoints/*/_CHECKPOINT_METADATA",
    "checkpoints/*/model/manifest.ocdbt",
    "checkpoints/*/model/ocdbt.process_0/d/*",
    "checkpoints/*/optimizer/ocdbt.process_0/d/*",
}
"""Some of the kinds of files that must be there, so that the test damages what it is about."""


@pytest.fixture(scope="module")
def programs():
    """Makes `train` compile its programs once for all calls within this file, for one device."""
    patch = pytest.MonkeyPatch()
    share_programs(patch, {})
    patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    yield
    patch.undo()


def train_to(config, workdir, step):
    """Trains until a signal comes during a step."""
    stop = StopSignals()
    begin = loop.Watchdog.step

    def begin_and_signal(self, number):
        begin(self, number)
        if number >= step:
            stop.request("SIGTERM")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Watchdog, "step", begin_and_signal)
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
    train(config, folder / "straight")
    return config, folder / "stopped", folder / "straight"


def lines(workdir):
    """Metrics without times."""
    text = (workdir / "metrics.jsonl").read_text()
    return [without_times(json.loads(line)) for line in text.splitlines()]


def without_times(line):
    return {key: value for key, value in line.items() if not key.startswith("perf/")}


def warnings_of(caplog):
    return [
        record.message
        for record in caplog.records
        if record.name == "moejax" and record.levelno >= logging.WARNING
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


def test_a_stop_within_a_logging_interval_changes_no_file(runs, tmp_path):
    config, stopped, straight = runs
    assert lines(stopped)[-1]["step"] == STOP  # the cut interval can be seen until the run goes on
    copy = copy_run(stopped, tmp_path / "run")
    train(config, copy)
    assert lines(copy) == lines(straight)
    assert read_alarms(copy) == read_alarms(straight) != []
    assert_same(routing(copy), routing(straight))
    for found, expected in zip(state(config, copy), state(config, straight), strict=True):
        np.testing.assert_array_equal(found, expected)


def largest_file_of_each_kind(workdir):
    """A file of each kind, by kind; those of the older checkpoint are left out."""
    files = {}
    for path in sorted(workdir.rglob("*")):
        if not path.is_file() or path.name == ".lock" or f"checkpoints/{STOP - 1}" in str(path):
            continue
        kind = kind_of(path, workdir)
        if kind not in files or path.stat().st_size > files[kind].stat().st_size:
            files[kind] = path
    return files


@pytest.mark.parametrize("offset", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_any_damage_gives_one_line_or_an_exact_continuation(runs, tmp_path, caplog, offset):
    config, stopped, straight = runs
    expected = state(config, straight)
    rng = np.random.default_rng(0)
    files = largest_file_of_each_kind(stopped)
    assert set(files) >= KINDS, KINDS - set(files)
    outcomes = {}
    for turn, (kind, path) in enumerate(sorted(files.items())):
        how = ways()[(turn + offset) % len(ways())]
        copy = copy_run(stopped, tmp_path / "run")
        if damage(copy / path.relative_to(stopped), how, rng):
            caplog.clear()
            outcomes[kind, how] = continued(config, copy, straight, expected, caplog)
    allowed = {"refused", "exact", "warned"}
    wrong = {case: outcome for case, outcome in outcomes.items() if outcome not in allowed}
    assert not wrong
    assert allowed == set(outcomes.values())


def continued(config, workdir, straight, expected, caplog):
    """How a damaged run goes on: `refused`, `exact`, `warned`, or what is wrong.

    A run that is `warned` is exact except for history that is lost.
    """
    try:
        train(config, workdir)
    except Exception as error:  # of any kind: the test shows which
        is_ours = type(error).__module__.startswith("moejax.") and isinstance(error, ValueError)
        if is_ours and "\n" not in str(error):
            return "refused"
        return f"{type(error).__name__}: {error}"
    for found, expected_array in zip(state(config, workdir), expected, strict=True):
        if not np.array_equal(found, expected_array):
            return "another state"
    warnings = warnings_of(caplog)
    wrong = wrong_history(workdir, straight, warnings)
    if wrong:
        return wrong
    is_warned = any(str(workdir) in message for message in warnings)
    try:
        assert_same(routing(workdir), routing(straight))
    except (AssertionError, ValueError):
        return "warned" if is_warned else "other routing"
    return "warned" if is_warned else "exact"


def wrong_history(workdir, straight, warnings):
    """What of metrics and alarms differs without a warning; empty if nothing does."""
    found, wanted = lines(workdir), lines(straight)
    if any("and the next has no churn" in message for message in warnings):
        wanted[-1].pop("eval/routing_churn")
    if found != wanted and not any("metrics.jsonl" in message for message in warnings):
        return "other metrics"
    if found[-2:] != wanted[-2:]:
        return "other metrics after the checkpoint"
    has_alarms = read_alarms(workdir) == read_alarms(straight)
    if not has_alarms and not any("alarms.jsonl" in message for message in warnings):
        return "other alarms"
    return ""


def damaged_copies(workdir, folder, tmp_path, seed):
    """Copies of a run, each with one file of a folder damaged: (copy, file, how)."""
    rng = np.random.default_rng(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path, how in itertools.product(files, ways()):
        copy = copy_run(workdir, tmp_path / "run")
        if damage(copy / path.relative_to(workdir), how, rng):
            yield copy, path, how


def read_or_refused(read, workdir, case):
    """What is read of a run; None if it is refused in a message that says so, or is not there."""
    try:
        return read(workdir) if read_routing(workdir) is not None else None
    except ValueError as error:
        assert re.fullmatch(r".*(is damaged|cannot be read).*", str(error)), case
        return None


def test_a_routing_log_damaged_in_any_way_is_read_exactly_or_refused(runs, tmp_path):
    _, stopped, _ = runs
    expected = routing(stopped)
    for copy, path, how in damaged_copies(stopped, stopped / "routing", tmp_path, seed=1):
        if "evaluations" in str(path):
            continue
        found = read_or_refused(routing, copy, (path, how))
        if found is not None and len(found["step"]) == len(expected["step"]):
            assert_same(found, expected)


def test_an_evaluation_damaged_in_any_way_is_read_exactly_or_refused(runs, tmp_path):
    _, stopped, _ = runs
    expected = evaluations(stopped)
    folder = stopped / "routing/evaluations"
    for copy, path, how in damaged_copies(stopped, folder, tmp_path, seed=1):
        found = read_or_refused(evaluations, copy, (path, how))
        for step, step_arrays in (found or {}).items():
            assert_same(step_arrays, expected[step])


def test_lost_metrics_are_reported_once_and_counters_come_from_the_save(runs, tmp_path, caplog):
    config, stopped, straight = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "metrics.jsonl").write_text("")
    train(config, copy)
    lost = "metrics.jsonl is not what was written up to step 4"
    assert sum(lost in record.message for record in caplog.records) == 1
    assert lines(copy) == [
        line for line in lines(straight) if line["step"] > 4
    ]  # `tokens` included
    caplog.clear()
    train(config, copy)
    assert not any("metrics.jsonl" in record.message for record in caplog.records)


def test_lines_that_are_not_metrics_are_left_out_with_a_warning(runs, tmp_path, caplog):
    config, stopped, straight = runs
    deep = '{"step": 2, "tokens": ' + "[" * 100_000 + "]" * 100_000 + "}"
    damaged = ['{"step": 2, "tokens": "many"}', '{"step": 2, "tokens": null}', deep, "[1]", "\x00"]
    for line in damaged:
        copy = copy_run(stopped, tmp_path / "run")
        path = copy / "metrics.jsonl"
        path.write_text(line + "\n" + path.read_text())
        caplog.clear()
        train(config, copy)
        assert lines(copy) == lines(straight)
        assert "metrics.jsonl is not what was written" in caplog.text


def test_a_lost_routing_group_file_is_written_again(runs, tmp_path, caplog):
    config, stopped, straight = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "routing/zarr.json").unlink()
    train(config, copy)
    assert_same(routing(copy), routing(straight))
    assert "routing/zarr.json is lost and is written again" in caplog.text


def test_a_lost_evaluation_is_reported_and_is_no_reference_for_churn(runs, tmp_path, caplog):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "routing/evaluations/4.npz").unlink()
    train(config, copy)
    assert "lacks the evaluations of step 4, and the next has no churn" in caplog.text
    assert "churn" not in Evaluations(copy).read(6)


@pytest.mark.parametrize("change", ["none", "digit", "line", "cut"])
def test_opening_a_run_warns_that_its_metrics_were_changed(runs, tmp_path, caplog, change):
    copy = copy_run(runs[2], tmp_path / "run")
    content = (copy / "metrics.jsonl").read_bytes()
    rows = content.splitlines(keepends=True)
    place = content.index(b'"loss/lm": ') + len(b'"loss/lm": ')
    other_digit = (int(content[place : place + 1]) + 1) % 10
    digit = b"%d" % other_digit
    changed = {
        "none": content,
        "digit": content[:place] + digit + content[place + 1 :],
        "line": b"".join(rows[1:]),
        "cut": b"".join(rows[:-1]),
    }
    (copy / "metrics.jsonl").write_bytes(changed[change])
    run = open_run(copy)
    assert run.keys and run.last("loss/lm") is not None
    messages = [record.getMessage() for record in caplog.records]
    warnings = [message for message in messages if "is not what was written" in message]
    assert len(warnings) == (change != "none")
    path = copy / "metrics.jsonl"
    expected = f"{path} is not what was written up to step 6: a part of it is lost or changed"
    assert all(message.startswith(expected) for message in warnings)


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
def test_the_note_of_a_file_in_a_checkpoint_may_be_any_value(tmp_path, noted):
    (tmp_path / "metrics.jsonl").write_bytes(b"{}")
    assert not is_as_noted(tmp_path / "metrics.jsonl", noted)


def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(runs, tmp_path, caplog, monkeypatch):
    config, _, straight = runs
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
    expected = read_meta(straight / "checkpoints/4")["metrics"]
    assert read_meta(copy / "checkpoints/4")["metrics"] == expected
    train(config, copy)
    assert "is not what was written" not in caplog.text
    assert lines(copy) == lines(straight)
    with Checkpoints(copy, make(config, 1), read_only=True) as found:
        losses = {step: found._manager.metrics(step) for step in found.steps()}
    assert losses[4]
    for step, metrics_of_step in losses.items():
        assert metrics_of_step == read_meta(straight / f"checkpoints/{step}")["metrics"]


def test_numbers_that_moejax_does_not_write_are_not_steps(runs, tmp_path):
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
    message = r"config\.json is damaged: numerics=\['x'\] must be an object"
    with pytest.raises(ConfigError, match=message):
        train(config, copy)


def test_a_kill_while_an_evaluation_is_added_leaves_an_intact_checkpoint(
    runs, tmp_path, monkeypatch
):
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
    begun = set(threading.enumerate()) - before
    assert not any("tensorboardX" in type(thread).__module__ for thread in begun)


def test_a_second_training_of_a_run_is_refused_with_the_process_that_trains(runs, tmp_path):
    config, stopped, _ = runs
    copy = copy_run(stopped, tmp_path / "run")
    before = (copy / "metrics.jsonl").read_bytes()
    message = r"run is being written by process \d+ on .*train"
    with FolderLock(copy, "train"), pytest.raises(LockedError, match=message):
        train(config, copy)
    assert (copy / "metrics.jsonl").read_bytes() == before
    open_run(copy)  # looking at it needs no lock


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_run_that_was_taken_over_writes_nothing_more(runs, tmp_path, monkeypatch, is_saved):
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

    message = r"run was taken over by process 7 on node9 \(train, since then\)"
    with pytest.raises(LockedError, match=message):
        train(config, tmp_path / "run", on_evaluation=take_over)
    assert [(tmp_path / "run/metrics.jsonl").read_bytes()] == contents
    assert not saved_steps(tmp_path / "run")
    assert json.loads((tmp_path / "run/.lock").read_text()) == record


def test_without_config_json_a_run_goes_on_only_under_its_own_configuration(runs, tmp_path):
    config, stopped, straight = runs
    copy = copy_run(stopped, tmp_path / "run")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"optimizer.learning_rate=0.01, not 0.5"):
        train(replace(config, "optimizer", learning_rate=0.5), copy)
    assert not (copy / "config.json").exists()
    train(config, copy)
    assert lines(copy) == lines(straight)


def test_continuing_a_run_with_other_steps_logs_what_that_means(runs, caplog):
    config, _, _ = runs
    caplog.set_level(logging.INFO, logger="moejax")
    messages = [
        (12, "continuing with train.num_steps=12 (was 6)"),
        (12, "train.num_steps=12 stretches the schedules: the learning rate goes on at 0.00"),
        (3, "train.num_steps=3: the run is already at step 6, and nothing is trained"),
    ]
    for num_steps, message in messages:
        caplog.clear()
        log_changes(config, replace(config, "train", num_steps=num_steps), 6)
        assert message in caplog.text
    caplog.clear()
    log_changes(config, config, 4)
    assert not caplog.records


def test_a_run_whose_checkpoints_are_gone_warns_that_it_begins_again(runs, tmp_path, caplog):
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
