"""Searches when something goes wrong: signals, deaths, errors, takeovers, other studies.

Training is a stub.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from cases.sweeps import EVAL_EVERY, LOG_EVERY, STEPS, write_run
from cases.training import SMALL
from moejax.cli import main
from moejax.config import ConfigError, resolve, to_dict
from moejax.sweeps.search.definition import Axis, Definition, StudyError, objective_of
from moejax.sweeps.search.progress import Outcome, Report, TrialLostError
from moejax.sweeps.search.study import create_study, open_study
from moejax.sweeps.search.trial import Trials, common_fractions
from moejax.sweeps.search.trials import MAX_RETRIES, trials_table, untrained
from moejax.sweeps.search.worker import work
from moejax.sweeps.store.directory import claimed
from moejax.training.evaluation import Evaluation
from moejax.training.health.alarms import AlarmError
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.multihost.signals import StopSignals
from moejax.training.run import TrainResult

RATE = "optimizer.learning_rate"
BITS = 1.25  # per byte, of every evaluation
RATES = (1e-3, 2e-3, 3e-3, 4e-3)
BASE = SMALL | {
    "train": {"batch_size": 8, "num_steps": STEPS, "eval_every": EVAL_EVERY, "log_every": LOG_EVERY}
}


def new_definition(**changes):
    settings = {
        "recipe": "r.py", "base": BASE, "axes": (Axis(RATE, RATES),), "sampler": "random",
        "pruner": "none", "seed": 0, "trials": 2, "fractions": (0.25, 0.5, 0.75, 1.0),
        "is_filtered": False,
    }  # fmt: skip
    return Definition(**settings | changes)


class Trainer:
    """Stands in for `train`: the loss falls to the learning rate.

    There is a checkpoint after each evaluation.

    Attributes:
      happens: called with the step before it is evaluated, and with 0 when training begins.
      after: called with the step after it was evaluated.
      began: run directories with the step that they went on from.
    """

    def __init__(self, happens, after):
        self.happens = happens
        self.after = after
        self.began = []

    def __call__(self, config, workdir, *, command, stop, on_evaluation):
        workdir = Path(workdir)
        every, planned = config.train.eval_every, config.train.num_steps
        checkpoints = workdir / "checkpoints"
        first = max((int(path.name) for path in checkpoints.glob("*")), default=0)
        self.began.append((workdir.name, first))
        entry = {"config": to_dict(config), "params_total": 1, "params_active": 1}
        with stop:
            self.happens(0)
            for step in range(first + every, planned + 1, every):
                self.happens(step)
                loss = config.optimizer.learning_rate + 1 - step / planned
                write_run(workdir, entry, loss=config.optimizer.learning_rate, end=step)
                facts = json.loads((workdir / "config.json").read_text()) | {"command": command}
                (workdir / "config.json").write_text(json.dumps(facts))
                on_evaluation(step, Evaluation(loss, 1.0, BITS, 1, None))
                self.after(step)
                (checkpoints / str(step)).mkdir(parents=True)
                if stop and step < planned:
                    return TrainResult(step, stop.received, None, None)
            return TrainResult(planned, stop.received, Evaluation(loss, 1.0, BITS, 1, None), None)


@pytest.fixture
def train_with(monkeypatch):
    def put(happens=lambda step: None, after=lambda step: None):
        trainer = Trainer(happens, after)
        monkeypatch.setattr("moejax.sweeps.search.trial.train", trainer)
        return trainer

    return put


def evaluate(study, trials, **options):
    settings = {
        "arm_of": trials.arm_of, "worker_id": "w", "should_stop": lambda: bool(trials.stop),
        "beat_s": 1.0, "poll_s": 0.02,
    }  # fmt: skip
    return work(study, options.pop("run_arm", trials.run), **settings | options)


def trials_in(directory, study, **more):
    definition = Definition.from_json(study.user_attrs["moejax"])
    return Trials(directory, definition, "moejax sweep", StopSignals(), **more)


def search(directory, name="s", **changes):
    """Makes a study in a directory, and works on it until it ends."""
    study = create_study(str(directory / "study.journal"), name, new_definition(**changes))
    trials = trials_in(directory, study)
    evaluate(study, trials)
    return study


def records(directory):
    return {
        path.parent.name: json.loads(path.read_text())
        for path in directory.glob("arms/*/record.json")
    }


class Quiet(Report):
    """A report that reaches no study."""

    def __init__(self, stop=lambda: False, is_lost=lambda: False, prunes=False):
        self.stop = stop
        self.is_lost = is_lost
        self.prunes = prunes

    def __call__(self, step, fraction, loss):
        self.check()
        return self.prunes

    def should_stop(self):
        self.check()
        return self.stop()

    def check(self):
        if self.is_lost():
            raise TrialLostError


@pytest.fixture
def run_one(tmp_path):
    """Runs one arm of a worker, and returns its outcome and the worker's stop."""

    def run(report=None, stop=None):
        trials = Trials(tmp_path, new_definition(), "moejax sweep", stop or StopSignals())
        point = {RATE: 1e-3}
        with trials.stop:
            return trials.run(point, trials.arm_of(point), report or Quiet()), trials.stop

    return run


# Pruning at an equal fraction


def fractions_of(num_steps, eval_every, *axes):
    train = BASE["train"] | {"num_steps": num_steps, "eval_every": eval_every}
    return common_fractions(resolve(BASE | {"train": train}), axes)


def test_arms_of_different_lengths_share_evaluations_at_equal_fractions():
    assert fractions_of(1000, 250) == (0.25, 0.5, 0.75, 1.0)
    assert fractions_of(1000, 300) == (0.3, 0.6, 0.9, 1.0)
    assert fractions_of(300, 100, Axis("train.num_steps", (200, 1000))) == (0.5, 1.0)
    assert fractions_of(300, 100, Axis("train.num_steps", (200, 300))) == (1.0,)
    assert fractions_of(600, 50, Axis("train.eval_every", (100, 150))) == (0.5, 1.0)
    assert fractions_of(20, 0) == (1.0,)


@pytest.mark.parametrize("parts", [6, 7, 15, 24])
def test_halving_prunes_only_at_the_first_second_and_fourth_evaluation(tmp_path, parts):
    """Each arm is worse than the one before, so that it is pruned at its first rung."""
    fractions = tuple(part / parts for part in range(1, parts + 1))
    definition = new_definition(
        axes=(Axis(RATE, (), 1e-4, 1e-2),), fractions=fractions, pruner="halving", trials=4
    )
    study = create_study(str(tmp_path / "a.journal"), "s", definition)
    ended = []

    def run_arm(point, arm, report):
        worse_from = 2 ** (3 - len(ended)) if ended else parts + 1
        for part in range(1, parts + 1):
            loss = float(len(ended) if part >= worse_from else -len(ended))
            if report(part, part / parts, loss):
                ended.append(part)
                return Outcome("pruned")
        ended.append(parts)
        return Outcome("done", 0.0)

    evaluate(study, trials_in(tmp_path, study), run_arm=run_arm)
    assert ended == [parts, 4, 2, 1]


def test_halving_compares_long_and_short_arms_where_both_are_evaluated(tmp_path):
    """A short arm is first evaluated at half of its schedule, where losses are already low."""
    lengths = Axis("train.num_steps", (200, 1000))
    definition = new_definition(
        axes=(lengths, Axis(RATE, (), 1e-4, 1e-2)),
        fractions=fractions_of(1000, 100, lengths),
        pruner="halving",
        trials=8,
    )
    study = create_study(str(tmp_path / "a.journal"), "s", definition)
    pruned_at = set()

    def run_arm(point, arm, report):
        steps = point["train.num_steps"]
        for step in range(100, steps + 1, 100):
            if report(step, step / steps, point[RATE] + 1 - step / steps):
                pruned_at.add(step / steps)
                return Outcome("pruned")
        return Outcome("done", point[RATE])

    evaluate(study, trials_in(tmp_path, study), run_arm=run_arm)
    rows = trials_table(study)
    assert pruned_at == {0.5}
    assert {row["params"]["train.num_steps"] for row in rows} == {200, 1000}
    best = min(rows, key=lambda row: row["params"][RATE])
    assert best["state"] == "done"


def test_a_later_evaluation_does_not_stand_for_one_that_was_missed(tmp_path):
    definition = new_definition(axes=(Axis(RATE, (), 1e-4, 1e-2),), pruner="halving")
    study = create_study(str(tmp_path / "a.journal"), "s", definition)
    begun = []

    def run_arm(point, arm, report):
        begun.append(arm)
        for part in (1, 2, 3, 4):
            is_missing = len(begun) == 2 and part == 1
            loss = float("nan") if is_missing else float(len(begun))
            if report(part, part / 4, loss):
                return Outcome("pruned")
        return Outcome("done", 1.0)

    evaluate(study, trials_in(tmp_path, study), run_arm=run_arm)
    assert [row["state"] for row in trials_table(study)] == ["done", "done"]


def test_a_successor_is_not_compared_again_at_a_rung_it_has_passed(tmp_path):
    """Its evaluations are much worse than that of the rung; they count for later rungs only."""
    definition = new_definition(axes=(Axis(RATE, (), 1e-4, 1e-2),), pruner="halving", trials=2)
    study = create_study(str(tmp_path / "a.journal"), "s", definition)
    begun = []

    def run_arm(point, arm, report):
        begun.append(arm)
        if len(begun) == 1:
            return Outcome("pruned") if report(1, 0.25, 2.0) else Outcome("done", 1.0)
        if len(begun) == 2:
            assert not report(1, 0.25, 1.0)
            raise RuntimeError("out of memory")
        for part in (2, 3):
            assert not report(part, part / 4, 3.0)
        return Outcome("done", 3.0)

    evaluate(study, trials_in(tmp_path, study), run_arm=run_arm)
    assert [row["state"] for row in trials_table(study)] == ["done", "continued", "done"]


# Signals


@pytest.mark.parametrize("step", [0, EVAL_EVERY, STEPS])
def test_a_stop_signal_at_any_step_of_an_arm_reaches_the_worker(train_with, run_one, step):
    train_with(lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None)
    outcome, stop = run_one()
    assert stop.received == "SIGTERM"
    assert outcome.status == ("done" if step == STEPS else "stopped")


@pytest.mark.parametrize(
    "error", [AlarmError("moe/entropy"), NonFiniteError("nan"), ConfigError("mesh")]
)
def test_a_stop_signal_before_an_error_reaches_the_worker(train_with, run_one, error):
    def happens(step):
        if step:
            os.kill(os.getpid(), signal.SIGINT)
            raise error

    train_with(happens)
    outcome, stop = run_one()
    assert (outcome.status, stop.received) == ("failed", "SIGINT")


def test_a_stop_signal_after_an_arm_was_pruned_reaches_the_worker(train_with, run_one):
    train_with(after=lambda step: os.kill(os.getpid(), signal.SIGTERM))
    outcome, stop = run_one(Quiet(prunes=True))
    assert (outcome.status, stop.received) == ("pruned", "SIGTERM")


def test_a_worker_that_was_stopped_begins_no_other_arm(train_with, tmp_path):
    def stop_at_end(step):
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = train_with(stop_at_end)
    study = search(tmp_path)
    assert len(trainer.began) == 1
    assert [row["state"] for row in trials_table(study)] == ["done"]


# Takeovers


def test_a_successor_waits_until_a_worker_taken_for_dead_has_left(train_with, run_one, tmp_path):
    trainer = train_with()
    arm = Trials(tmp_path, new_definition(), "", StopSignals()).arm_of({RATE: 1e-3})
    asked = []

    def lost_while_it_is_held():
        asked.append(len(trainer.began))
        if len(asked) == 3:
            holder.close()  # the other has left
        return False

    with contextlib.ExitStack() as holder:
        assert holder.enter_context(claimed(tmp_path, arm))
        outcome, _ = run_one(Quiet(is_lost=lost_while_it_is_held))
    assert outcome.status == "done" and asked[:3] == [0, 0, 0] and trainer.began == [(arm, 0)]


def test_a_successor_that_waits_ends_on_a_stop(train_with, run_one, tmp_path):
    trainer = train_with()
    arm = Trials(tmp_path, new_definition(), "", StopSignals()).arm_of({RATE: 1e-3})
    looks = iter([False, False, True])
    with claimed(tmp_path, arm):
        outcome, _ = run_one(Quiet(stop=lambda: next(looks)))
    assert outcome.status == "stopped" and not trainer.began


@pytest.mark.parametrize("ending", [None, AlarmError("moe/entropy"), NonFiniteError("nan")])
def test_a_worker_whose_trial_was_taken_over_writes_no_record(
    train_with, run_one, tmp_path, ending
):
    lost = []

    def after(step):
        if step == STEPS:
            lost.append(True)
            if ending is not None:
                raise ending

    train_with(after=after)
    with pytest.raises(TrialLostError):
        run_one(Quiet(is_lost=lambda: bool(lost)))
    assert not records(tmp_path)


def test_a_successor_uses_the_record_of_the_worker_it_waited_for(train_with, run_one, tmp_path):
    trainer = train_with()
    outcome, _ = run_one()
    assert run_one()[0] == Outcome("done", pytest.approx(outcome.loss)) and len(trainer.began) == 1


# What is minimised


def test_a_search_over_tokenizers_minimises_bits_per_byte_and_prunes_by_them(train_with, tmp_path):
    train_with()
    of_tokens = Axis("data.tokenizer", ("bytes", "bpe"))
    assert objective_of([of_tokens]) == "eval/bits_per_byte"
    assert objective_of([Axis("data.seq_len", (8,))]) == "eval/loss"
    reported = []

    class Remembering(Quiet):
        def __call__(self, step, fraction, loss):
            reported.append(loss)
            return False

    definition = new_definition(axes=(of_tokens,), objective="eval/bits_per_byte")
    trials = Trials(tmp_path, definition, "", StopSignals())
    arm = trials.arm_of({"data.tokenizer": "bytes"})
    outcome = trials.run({"data.tokenizer": "bytes"}, arm, Remembering())
    assert reported == [BITS] * 4 and outcome == Outcome("done", loss=BITS)
    path = tmp_path / "arms" / arm / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final/eval/bits_per_byte": 1.5}))
    assert trials.known(arm).loss == 1.5  # of the record, for another study
    in_nats = Trials(tmp_path, new_definition(), "", StopSignals()).known(arm)
    assert in_nats.loss == pytest.approx(3e-3)


def test_a_study_from_before_there_was_an_objective_keeps_its_loss(tmp_path):
    definition = new_definition(axes=(Axis("data.tokenizer", ("bytes", "bpe")),))
    content = definition.to_json()
    del content["objective"]
    assert Definition.from_json(content) == definition
    storage = str(tmp_path / "study.journal")
    create_study(storage, "s", definition)
    with pytest.raises(StudyError, match="has another objective; choose another --study"):
        create_study(storage, "s", dataclasses.replace(definition, objective="eval/bits_per_byte"))


# Arms of other studies in the directory


def test_an_arm_that_another_study_finished_is_not_trained_again(train_with, tmp_path):
    trainer = train_with()
    search(tmp_path, "one", trials=4)
    began = len(trainer.began)
    study = search(tmp_path, "two", trials=4)
    assert len(trainer.began) == began == len(records(tmp_path))
    rows = trials_table(study)
    assert len(rows) == 4
    for row in rows:
        assert row["value"] == pytest.approx(row["params"][RATE])


def test_an_arm_that_another_study_pruned_is_continued(train_with, run_one, tmp_path):
    trainer = train_with()
    assert run_one(Quiet(prunes=True))[0].status == "pruned"
    (arm,) = records(tmp_path)
    assert records(tmp_path)[arm]["status"] == "pruned"
    stopped, _ = run_one(Quiet(stop=iter([False, True, True]).__next__))
    assert stopped.status == "stopped" and not records(tmp_path)  # it has not ended
    study = search(tmp_path, "two", axes=(Axis(RATE, (1e-3,)),), trials=1)
    assert trainer.began == [(arm, 0), (arm, 25), (arm, 50)]
    assert [row["state"] for row in trials_table(study)] == ["done"]
    assert records(tmp_path)[arm]["status"] == "done"


def test_a_point_that_the_space_leaves_out_is_not_trained(train_with, tmp_path):
    train_with()
    study = create_study(str(tmp_path / "a.journal"), "s", new_definition(trials=4))
    trials = trials_in(tmp_path, study, allows=lambda point: point[RATE] > 2e-3)
    evaluate(study, trials)
    rates = [row["params"][RATE] for row in trials_table(study)]
    assert len(rates) == 4 and min(rates) > 2e-3 and len(study.trials) > 4


# Errors


def failing(error):
    def happens(step):
        raise error

    return happens


@pytest.mark.parametrize(
    ("error", "status"),
    [(AlarmError("moe/entropy is low"), "stopped"), (NonFiniteError("loss is nan"), "failed")],
)
def test_an_arm_that_an_alarm_or_nonfinite_values_end_is_a_result(
    train_with, tmp_path, error, status
):
    train_with(failing(error))
    study = search(tmp_path, trials=1)
    (row,), (record,) = trials_table(study), records(tmp_path).values()
    assert (row["state"], row["error"], untrained(study)) == ("failed", str(error), [])
    assert (record["status"], record["error"]) == (status, str(error))


def test_only_the_arm_that_does_not_fit_the_devices_fails_without_a_record(train_with, tmp_path):
    def happens(step):
        if len(trainer.began) == 1:
            raise ConfigError("mesh.expert=3 must divide 8 devices")

    trainer = train_with(happens)
    study = search(tmp_path, axes=(Axis(RATE, (), 1e-4, 1e-2),))
    assert [row["state"] for row in trials_table(study)] == ["failed", "done"]
    assert [row["error"] for row in untrained(study)] == ["mesh.expert=3 must divide 8 devices"]
    assert len(records(tmp_path)) == 1


def test_a_point_whose_training_raises_is_retried_and_the_worker_goes_on(
    train_with, tmp_path, caplog
):
    def happens(step):
        if trainer.began[-1] == trainer.began[0]:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nwhile allocating")

    trainer = train_with(happens)
    study = search(tmp_path, axes=(Axis(RATE, (), 1e-4, 1e-2),))
    ended = [row for row in trials_table(study) if row["state"] != "continued"]
    assert [row["state"] for row in ended] == ["failed", "done"]
    assert len(trainer.began) == 1 + MAX_RETRIES + 1
    errors = [row["error"] for row in untrained(study)]
    assert errors == ["RuntimeError: RESOURCE_EXHAUSTED: out of memory"]
    assert caplog.text.count("while allocating") > MAX_RETRIES


def test_a_worker_that_can_train_nothing_ends_and_does_not_spoil_the_study(
    train_with, tmp_path, monkeypatch
):
    monkeypatch.setattr("moejax.sweeps.search.worker.MAX_ERRORS", 2)
    train_with(failing(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space left"):
        search(tmp_path)
    study = open_study(str(tmp_path / "study.journal"), "s")
    assert [row["state"] for row in trials_table(study)] == ["continued", "continued", "waiting"]


# Studies


def test_a_study_of_something_else_is_not_adopted(tmp_path):
    storage = f"sqlite:///{tmp_path / 'a.db'}"
    used = optuna.create_study(study_name="used", storage=storage)
    used.add_trial(optuna.trial.create_trial(value=1.0))
    optuna.create_study(study_name="other way", storage=storage, direction="maximize")
    optuna.create_study(study_name="two aims", storage=storage, directions=["minimize", "minimize"])
    for name in ("used", "other way", "two aims"):
        message = "was not made by moejax sweep; choose another --study"
        with pytest.raises(StudyError, match=message):
            create_study(storage, name, new_definition())
    optuna.create_study(study_name="empty", storage=storage)
    assert create_study(storage, "empty", new_definition()).user_attrs["moejax"]["trials"] == 2


def test_the_number_of_trials_may_rise_even_while_workers_run(train_with, tmp_path):
    train_with()
    axes = (Axis(RATE, (), 1e-4, 1e-2),)

    def study_of(trials):
        definition = new_definition(axes=axes, trials=trials)
        return create_study(str(tmp_path / "study.journal"), "s", definition)

    study = search(tmp_path, axes=axes)
    message = r"has trials=2, which may only rise, not to 1; give --trials=2 or more"
    with pytest.raises(StudyError, match=message):
        search(tmp_path, axes=axes, trials=1)
    with pytest.raises(StudyError, match="has another sampler, trials"):
        search(tmp_path, axes=axes, trials=3, sampler="tpe")
    search(tmp_path, axes=axes, trials=3)
    assert [row["state"] for row in trials_table(study)] == ["done"] * 3

    def run_arm(point, arm, report):
        study_of(trials=5)  # by someone else
        return Outcome("done", 1.0)

    trials = trials_in(tmp_path, study_of(trials=4))
    assert evaluate(study, trials, run_arm=run_arm) == 2
    assert len(trials_table(study)) == 5


# The command


@pytest.fixture
def moejax(monkeypatch, tmp_path, capsys):
    """Runs `moejax sweep` with these arguments on the debug recipe in DIR.

    Returns its exit code and the last line of its errors.
    """
    settings = [f"--config.train.{key}={value}" for key, value in BASE["train"].items()]

    def run(*arguments, config="configs/debug.py"):
        arguments = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
        recipe = [] if arguments[0] == "worker" else [f"--config={config}", *settings]
        arguments = ["sweep", *recipe, *arguments]
        monkeypatch.setattr(sys, "argv", ["moejax", *arguments])
        code = main(arguments)
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    # Tests have a compilation cache of their own.
    monkeypatch.setattr("moejax.cli.sweep.search.keep_compilation_cache", lambda: None)
    return run


RATE_AXIS = f"{RATE}=0.001,0.002,0.003,0.004"
SEARCH = (RATE_AXIS, "--search=random", "--trials=2", "--dir=DIR", "--study=s")


@pytest.mark.parametrize("form", ["--storage={}", "--storage {}", "-storage={}"])
def test_neither_files_nor_the_log_hold_the_password_of_a_storage(
    moejax, train_with, tmp_path, monkeypatch, caplog, form
):
    caplog.set_level(logging.INFO)
    train_with()

    def create_in_journal(storage, name, definition):
        return create_study(str(tmp_path / "study.journal"), name, definition)

    monkeypatch.setattr("moejax.cli.sweep.search.create_study", create_in_journal)
    url = "postgresql+psycopg://someone:s3cret@host/d?sslpassword=s3cret"
    assert moejax(*SEARCH, *form.format(url).split())[0] == 0
    assert main(["sweep", "report", str(tmp_path)]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"report.html", "sweep.json", "records.jsonl", "config.json"} <= names
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
    assert "s3cret" not in caplog.text and "someone:***@host" in caplog.text
    assert "someone:***@host" in json.loads((tmp_path / "sweep.json").read_text())["command"]


def test_a_search_of_points_that_cannot_be_trained_exits_with_2(moejax, train_with):
    def happens(step):
        if trainer.began[-1] == trainer.began[0]:
            raise ConfigError("mesh.expert=3 must divide 8 devices")

    trainer = train_with(happens)
    code, error = moejax(*SEARCH)
    assert code == 2
    assert "could not be trained (arm " in error and "mesh.expert=3 must divide" in error
    train_with(failing(NonFiniteError("loss is nan")))  # a result
    assert moejax(*SEARCH[:-1], "--study=t", "--search_seed=3")[0] == 0


FILTERED_SPACE = f"""

def sweep():
    from moejax.sweeps import choice, product, where

    rates = where(choice("{RATE}", 0.001, 0.002), lambda point: point["{RATE}"] > 0.001)
    return product(rates, choice("moe.top_k", 1, 2))
"""


def test_a_search_with_a_predicate_is_joined_by_its_command_only(moejax, train_with, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(Path("configs/debug.py").read_text() + FILTERED_SPACE)
    trainer = train_with()
    arguments = ("--search=random", "--dir=DIR", "--study=s", "--trials=1")
    assert moejax(*arguments, config=recipe)[0] == 0
    code, error = moejax("worker", "--study=s", "--storage=DIR/study.journal", "--dir=DIR")
    assert code == 2 and "join with the command that made the study" in error
    study = open_study(str(tmp_path / "study.journal"), "s")
    study.tell(study.ask(), state=TrialState.FAIL)
    assert moejax(*arguments, config=recipe)[0] == 0
    assert len(trainer.began) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--search=random", "--runner=slurm"],
            "--runner=slurm is for sweeps of given points.*start moejax sweep worker",
        ),
        (["--search=random", "--processes=8"], "--processes=8 is for sweeps of given points"),
        (["--search=random", "--gpus=2"], "--gpus=2 is for sweeps of given points"),
        (
            ["--search=random", "--pack=2"],
            "--pack=2 goes with a sweep of given points, not with --search",
        ),
        (["--search=random", "--adjust=steps"], "--adjust=steps goes with a sweep of given points"),
        (["--trials=3"], "--trials=3 goes with a search; add --search=random or tpe"),
        (["--pruner=median"], "--pruner=median goes with a search"),
        (["--storage=a.db"], "--storage=a.db goes with a search"),
        (
            ["--storage=mysql+pymysql://u:secret@h/d"],
            r"--storage=mysql\+pymysql://u:\*\*\*@h/d goes with a search",
        ),
        (["--study=s"], "--study=s goes with a search"),
        (["--search_seed=3"], "--search_seed=3 goes with a search"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(moejax, tmp_path, arguments, message):
    code, error = moejax(f"{RATE}=0.001,0.002", "--dir=DIR", *arguments)
    assert code == 2 and re.search(message, error), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag",
    [
        "--trials=3", "--search=random", "--pack=2", "--gpus=1", "--config=configs/debug.py",
        "--port=99", "--cores=0",
    ],
)  # fmt: skip
def test_a_worker_takes_no_flag_that_the_study_decides(moejax, flag):
    code, error = moejax("worker", "--study=s", "--storage=DIR/a.journal", flag)
    message = f"moejax: {flag} is not for a worker, which does what the study says"
    assert code == 2 and error.startswith(message), error
