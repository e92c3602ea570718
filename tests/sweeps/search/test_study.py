"""Searches: points and pruning are reproducible, and workers lose nothing and run nothing twice."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState

from cases.postgres import postgres_server
from cases.search_worker import arm_of
from moejax.sweeps import Choice, Range
from moejax.sweeps.search.definition import Axis, Definition, StudyError, search_axes
from moejax.sweeps.search.liveness import Watch
from moejax.sweeps.search.storage_address import show_storage
from moejax.sweeps.search.study import create_study, dashboard_command, open_study, serve_dashboard
from moejax.sweeps.search.trials import best, successor_of, trials_table
from moejax.sweeps.search.worker import Outcome, TrialLostError, work

ROOT = Path(__file__).parents[3]
RATE = Axis("optimizer.peak_lr", (), 1e-3, 1.0, True)
DEFINITION = Definition(
    recipe="configs/tiny_moe.py",
    base={"optimizer": {"peak_lr": 1e-3}},
    axes=(RATE, Axis("moe.router", ("top_k", "expert_choice")), Axis("moe.num_experts", (), 4, 64)),
    sampler="random",
    pruner="none",
    seed=0,
    trials=6,
    fractions=(0.25, 0.5, 0.75, 1.0),
    is_filtered=False,
)


def between(key, low, high, is_log=False):
    return Range(key, low, high, is_log)


def new_definition(**changes):
    return dataclasses.replace(DEFINITION, **changes)


@pytest.fixture(scope="module")
def postgres():
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request, tmp_path):
    """A storage of each kind, without studies."""
    if request.param != "postgresql":
        yield str(tmp_path / ("study.journal" if request.param == "journal" else "study.db"))
        return
    url = request.getfixturevalue("postgres")
    yield url
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name="s", storage=url)


def evaluate(study, run_arm=None, **options):
    """Runs a worker in this process; an arm's loss is lowest at a learning rate of 0.3."""
    settings = {
        "arm_of": arm_of, "worker_id": "w", "should_stop": lambda: False, "beat_s": 1.0,
        "poll_s": 0.02,
    }  # fmt: skip
    return work(study, run_arm or run_quadratic, **{**settings, **options})


def journal_study(tmp_path, **changes):
    """Makes a study in a journal."""
    return create_study(str(tmp_path / "a.journal"), "s", new_definition(**changes))


def loss_of(point):
    return (point["optimizer.peak_lr"] - 0.3) ** 2


def run_quadratic(point, arm, report):
    for step in range(1, 5):
        if report(step, step / 4, loss_of(point) + 1 / step):
            return Outcome("pruned")
    return Outcome("done", loss_of(point))


def wait_until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


def num_done_by(worker, study):
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return len([trial for trial in done if trial.user_attrs["worker"] == worker])


# Points and pruning


def search(folder, **changes):
    folder.mkdir(exist_ok=True)
    study = create_study(str(folder / "study.journal"), "s", new_definition(**changes))
    evaluate(study)
    return trials_table(study)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_one_worker_draws_the_same_points_from_the_same_seed(tmp_path, sampler):
    def draw_points(name, seed):
        rows = search(tmp_path / name, sampler=sampler, seed=seed, trials=14)
        return [row["params"] for row in rows]

    one, other = draw_points("one", 5), draw_points("other", 6)
    assert one == draw_points("again", 5)
    assert len({json.dumps(params) for params in one}) == 14
    assert not [params for params in one if params in other]


def test_a_restarted_worker_draws_the_points_it_would_have_drawn(tmp_path):
    undisturbed = search(tmp_path / "undisturbed", sampler="tpe", trials=14)
    storage = str(tmp_path / "study.journal")
    study = create_study(storage, "s", new_definition(sampler="tpe", trials=14))
    assert evaluate(study, should_stop=lambda: num_done_by("w", study) >= 11) == 11
    assert evaluate(open_study(storage, "s")) == 3
    expected = [row["params"] for row in undisturbed]
    assert [row["params"] for row in trials_table(study)] == expected


def test_tpe_comes_closer_to_the_optimum_than_its_random_start(tmp_path):
    values = [row["value"] for row in search(tmp_path / "tpe", sampler="tpe", trials=30)]
    assert min(values[10:]) < min(values[:10])


def test_ranges_and_choices_are_drawn_as_they_were_given(tmp_path):
    space = [
        Choice("moe.layers", ([0, 1], [2])),
        between("moe.num_experts", 4, 8),
        between("optimizer.peak_lr", 0.5, 1),
        between("train.weight", 1e-6, 1.0, True),
    ]
    points = []

    def remember(point, arm, report):
        points.append(point)
        return Outcome("done", 1.0)

    definition = new_definition(axes=search_axes(space), trials=20)
    evaluate(create_study(str(tmp_path / "a.log"), "s", definition), remember)
    assert {json.dumps(point["moe.layers"]) for point in points} == {"[0, 1]", "[2]"}
    assert {point["moe.num_experts"] for point in points} <= {4, 5, 6, 7, 8}
    assert all(isinstance(point["moe.num_experts"], int) for point in points)
    assert all(0.5 <= point["optimizer.peak_lr"] <= 1 for point in points)
    # Evenly in the logarithm.
    assert 4 <= sum(point["train.weight"] < 1e-3 for point in points) <= 16


@pytest.mark.parametrize(("pruner", "trials"), [("median", 16), ("halving", 16)])
def test_a_pruner_ends_bad_arms_early_and_the_best_is_trained_fully(tmp_path, pruner, trials):
    rows = search(tmp_path / pruner, pruner=pruner, trials=trials)
    done = [row for row in rows if row["state"] == "done"]
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert len(done) >= 3 and len(pruned) >= 3 and len(done) + len(pruned) == trials
    assert all(row["fraction"] < 1 for row in pruned) and all(row["fraction"] == 1 for row in done)
    best_pruned = min(loss_of(row["params"]) for row in pruned)
    assert min(loss_of(row["params"]) for row in done) <= best_pruned


def test_arms_of_different_lengths_are_compared_at_an_equal_fraction(tmp_path):
    """By steps the long arms would be pruned: at their step 4 they are worse than short ones."""

    def run_arm(point, arm, report):
        steps = 16 if len(lengths) % 2 else 4
        lengths.append(steps)
        for part in (1, 2, 3, 4):
            if report(part * steps // 4, part / 4, 1 / part - len(lengths) * 1e-3):
                return Outcome("pruned")
        return Outcome("done", 0.25)

    lengths = []
    study = journal_study(tmp_path, pruner="median", trials=12)
    evaluate(study, run_arm)
    assert {row["state"] for row in trials_table(study)} == {"done"}


def test_points_that_are_not_allowed_do_not_count_and_are_not_run(tmp_path):
    def only_few_experts(point):
        if point["moe.num_experts"] > 40:
            raise ValueError(f"moe.num_experts={point['moe.num_experts']} must be at most 40")
        return arm_of(point)

    study = create_study(str(tmp_path / "a.journal"), "s", new_definition(trials=10))
    assert evaluate(study, arm_of=only_few_experts) == 10
    rows = trials_table(study)
    assert len(rows) == 10 < len(study.trials)
    assert all(row["params"]["moe.num_experts"] <= 40 for row in rows)


def test_a_space_that_allows_hardly_any_point_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("moejax.sweeps.search.worker.MAX_REFUSED", 10)

    def nothing(point):
        raise ValueError("moe.num_experts must be 3")

    study = create_study(str(tmp_path / "a.journal"), "s", DEFINITION)
    with pytest.raises(StudyError, match=r"10 points in a row are not allowed.*must be 3"):
        evaluate(study, arm_of=nothing)


# Outcomes


def test_an_arm_that_is_not_finite_fails_and_the_study_goes_on(tmp_path):
    def run_arm(point, arm, report):
        report(1, 0.25, float("nan"))
        if point["optimizer.peak_lr"] > 0.1:
            return Outcome("done", float("inf"))
        return run_quadratic(point, arm, report)

    study = create_study(str(tmp_path / "a.journal"), "s", DEFINITION)
    assert evaluate(study, run_arm) == DEFINITION.trials
    rows = trials_table(study)
    assert {row["state"] for row in rows} == {"done", "failed"}
    assert all("inf" in row["error"] for row in rows if row["state"] == "failed")
    assert best(study)["value"] == min(row["value"] for row in rows if row["value"] is not None)


def test_a_point_drawn_again_counts_and_is_run_once(tmp_path):
    study = journal_study(tmp_path, axes=(Axis("optimizer.peak_lr", (0.1, 0.2)),))
    ran = []
    evaluate(study, lambda point, arm, report: ran.append(arm) or Outcome("done", loss_of(point)))
    rows = trials_table(study)
    assert sorted(ran) == sorted({row["arm"] for row in rows}) and len(ran) == 2
    assert [row["state"] for row in rows] == ["done"] * DEFINITION.trials
    assert all(row["value"] == loss_of(row["params"]) for row in rows)


# Workers


def test_a_heartbeat_that_does_not_change_for_the_grace_period_is_dead():
    """The observer's clock decides, whatever the worker's says."""
    now = [0.0]
    watch = Watch(60, clock=lambda: now[0])

    def dead(beat):
        trial = SimpleNamespace(number=0, state=TrialState.RUNNING, user_attrs={"beat": beat})
        return len(watch.observe([trial]))

    assert not dead(-1e9)  # a machine whose clock is wrong
    now[0] = 59
    assert not dead(-1e9)
    now[0] = 61
    assert dead(-1e9) and not dead(-1e9 + 1)
    now[0] = 122
    assert dead(-1e9 + 1)


def test_of_several_workers_exactly_one_ends_a_trial(storage):
    """SQLite's driver would let two through: see `moejax.sweeps.search.study._lock_on_begin`."""
    rounds, won = 12, []
    create_study(storage, "s", DEFINITION)
    handles = [open_study(storage, "s") for _ in range(2)]
    trials = [handles[0].ask().number for _ in range(rounds)]
    barrier = threading.Barrier(2, timeout=30)

    def race(study, state, values):
        ids = {trial.number: trial._trial_id for trial in study.trials}
        for number in trials:
            barrier.wait()
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                study._storage.set_trial_state_values(ids[number], state, values)
                won.append(number)

    results = [(TrialState.FAIL, None), (TrialState.COMPLETE, [1.0])]
    threads = [threading.Thread(target=race, args=(handles[n], *results[n])) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == trials


def test_workers_that_race_run_exactly_the_trials_and_each_arm_once(tmp_path):
    storage, ran = str(tmp_path / "a.journal"), []
    rates = Axis("optimizer.peak_lr", (0.1, 0.2, 0.3, 0.4))
    axes = (rates, Axis("moe.num_experts", (4, 8)))
    create_study(storage, "s", new_definition(axes=axes, trials=12))

    def run_arm(point, arm, report):
        ran.append(arm)
        return run_quadratic(point, arm, report)

    threads = []
    for n in range(4):
        arguments = (open_study(storage, "s"), run_arm)
        name = {"worker_id": f"w{n}"}
        threads.append(threading.Thread(target=evaluate, args=arguments, kwargs=name))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = trials_table(open_study(storage, "s"))
    assert [row["state"] for row in rows] == ["done"] * 12
    assert sorted(ran) == sorted({row["arm"] for row in rows})


def test_a_worker_waits_for_the_point_of_an_earlier_trial(tmp_path):
    storage, ran = str(tmp_path / "a.journal"), []
    axes = (Axis("optimizer.peak_lr", (0.1,)),)
    study = create_study(storage, "s", new_definition(axes=axes, trials=2))
    earlier = study.ask()  # of another worker, which is drawing

    def has_point():
        return len(study.trials) > 1 and "arm" in study.trials[1].user_attrs

    def run_arm(point, arm, report):
        ran.append(arm)
        return run_quadratic(point, arm, report)

    thread = threading.Thread(target=evaluate, args=(open_study(storage, "s"), run_arm))
    thread.start()
    wait_until(has_point, "the later trial's point")
    time.sleep(0.2)
    earlier.set_user_attr("arm", study.trials[1].user_attrs["arm"])
    study.tell(earlier, 1.0)
    thread.join()
    assert ran == []
    assert [row["value"] for row in trials_table(study)] == [1.0, 1.0]


def test_of_two_successors_of_a_dead_trial_one_is_run(tmp_path):
    study = create_study(str(tmp_path / "a.journal"), "s", new_definition(trials=2))
    trial = study.ask()
    trial.set_user_attr("arm", arm_of(DEFINITION.draw(study, trial)))
    study.tell(trial, state=TrialState.FAIL)
    for _ in range(2):  # two workers noticed it at once
        study.add_trial(successor_of(study.trials[0]))
    ran = []
    evaluate(study, lambda point, arm, report: ran.append(arm) or Outcome("done", 1.0))
    assert len(ran) == len(set(ran)) == 2
    assert [row["state"] for row in trials_table(study)] == ["continued", "done", "done"]


def test_successors_whose_workers_die_at_once_keep_the_point(tmp_path):
    study = create_study(str(tmp_path / "a.journal"), "s", new_definition(trials=2))
    trial = study.ask()
    trial.set_user_attr("arm", arm_of(DEFINITION.draw(study, trial)))
    study.tell(trial, state=TrialState.FAIL)
    for _ in range(2):
        study.add_trial(successor_of(study.trials[0]))
    for duplicate in [study.ask(), study.ask()]:  # neither has its parameters yet
        study.tell(duplicate, state=TrialState.FAIL)
    ran = []
    evaluate(study, lambda point, arm, report: ran.append(arm) or Outcome("done", 1.0))
    assert len(ran) == len(set(ran)) == 2 and study.trials[0].user_attrs["arm"] in ran
    assert [row["state"] for row in trials_table(study)].count("done") == 2


def test_a_trial_too_many_whose_worker_died_does_not_remain(tmp_path):
    study = create_study(str(tmp_path / "a.journal"), "s", new_definition(trials=2))
    evaluate(study)
    trial = study.ask()  # by a worker that died before it saw that the study was full
    trial.set_user_attr("arm", arm_of(DEFINITION.draw(study, trial)))
    study.tell(trial, state=TrialState.FAIL)
    assert evaluate(study) == 0
    assert [row["state"] for row in trials_table(study)] == ["done", "done", "continued"]
    assert not study.get_trials(states=(TrialState.WAITING,))


def test_a_slow_worker_whose_trial_was_taken_over_goes_on_with_another(storage):
    create_study(storage, "s", new_definition(trials=3))
    refused, ran = [], []

    def run(point, arm, report):
        ran.append(arm)
        # Longer than the grace period of the other worker, which sees no heartbeat meanwhile.
        time.sleep(0.5)
        return run_quadratic(point, arm, report)

    def slow(point, arm, report):
        if not refused:  # no heartbeat, while another worker does this trial and one more
            quick = {"beat_s": 0.1, "grace_s": 0.3}
            quick["should_stop"] = lambda: num_done_by("w2", study) >= 2
            evaluate(open_study(storage, "s"), run, worker_id="w2", **quick)
            try:
                report(1, 0.25, 1.0)
            except TrialLostError:
                refused.append(arm)
                raise
        return run(point, arm, report)

    study = open_study(storage, "s")
    assert evaluate(study, slow, beat_s=1000, grace_s=3000) == 1
    assert len(refused) == 1 and refused[0] in ran and len(ran) == len(set(ran)) == 3
    workers = [row["worker"] for row in trials_table(study) if row["state"] == "done"]
    assert sorted(workers) == ["w", "w2", "w2"]


def test_an_arm_learns_of_a_takeover_between_its_evaluations(tmp_path):
    study = create_study(str(tmp_path / "a.journal"), "s", new_definition(trials=2))
    lost = []

    def run_arm(point, arm, report):
        if lost:
            return run_quadratic(point, arm, report)
        study.tell(0, state=TrialState.FAIL)  # as another worker does
        with pytest.raises(TrialLostError):
            wait_until(report.should_stop, "the next heartbeat")
        lost.append(arm)
        raise TrialLostError

    assert evaluate(study, run_arm, beat_s=0.1) == 2
    assert [row["state"] for row in trials_table(study)] == ["continued", "done", "done"]


def start_worker(storage, directory, worker, grace_s, manner=""):
    script = "tests/cases/search_worker.py"
    command = [sys.executable, script, storage, str(directory), worker, str(grace_s), manner]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def lines(directory, worker, verb):
    found = [line.split() for line in (directory / f"{worker}.log").read_text().splitlines()]
    return [(arm, int(step)) for word, arm, step in found if word == verb]


def kill_outside_of_a_write(process, storage):
    """Kills a process, but not while it holds a journal's lock.

    The others would wait for a quarter of a minute until the lock counts as left.
    """
    while True:
        os.kill(process.pid, signal.SIGSTOP)
        if not os.path.lexists(f"{storage}.lock"):
            break
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=30)


def test_a_killed_workers_trial_is_continued_from_its_checkpoint(storage, tmp_path):
    study = create_study(storage, "s", new_definition(trials=3))
    victim = start_worker(storage, tmp_path, "victim", 60, "hold")
    try:
        wait_until((tmp_path / "victim.halfway").exists, "the first worker's trial")
    finally:
        kill_outside_of_a_write(victim, storage)
    assert [row["state"] for row in trials_table(study)] == ["running"]
    finish(start_worker(storage, tmp_path, "successor", 1.5))
    arm = lines(tmp_path, "victim", "begins")[0][0]
    assert (arm, 3) in lines(tmp_path, "successor", "begins")  # its second step was saved
    rows = trials_table(study)
    assert sorted(row["state"] for row in rows) == ["continued", "done", "done", "done"]
    ended = [arm for arm, _ in lines(tmp_path, "successor", "ends")]
    assert sorted(ended) == sorted(row["arm"] for row in rows if row["state"] == "done")
    assert arm in ended
    continued = next(trial for trial in study.trials if trial.user_attrs.get("retried_from") == 0)
    assert sorted(continued.intermediate_values) == [1, 2, 3, 4]


def test_a_worker_that_is_stopped_leaves_its_trial_to_others_at_once(tmp_path):
    storage = str(tmp_path / "study.journal")
    study = create_study(storage, "s", new_definition(trials=2))
    stopped = start_worker(storage, tmp_path, "stopped", 60, "hold")
    try:
        wait_until((tmp_path / "stopped.halfway").exists, "the first worker's trial")
    finally:
        stopped.terminate()
    finish(stopped)
    assert [row["state"] for row in trials_table(study)] == ["continued", "waiting"]
    began = time.monotonic()
    assert evaluate(study) == 2
    assert time.monotonic() - began < 30  # and not after the grace period of a minute
    assert study.trials[1].user_attrs["retries"] == 0  # a stop is no death


def test_two_worker_processes_share_a_study_on_a_server(postgres, tmp_path):
    study = create_study(postgres, "s", new_definition(trials=8))
    try:
        workers = [start_worker(postgres, tmp_path, name, 60, "meet") for name in ("one", "two")]
        for worker in workers:
            finish(worker)
        ended = {name: [arm for arm, _ in lines(tmp_path, name, "ends")] for name in ("one", "two")}
        rows = trials_table(study)
        assert [row["state"] for row in rows] == ["done"] * 8
        assert all(ended.values())
        assert sorted(ended["one"] + ended["two"]) == sorted({row["arm"] for row in rows})
        assert all(row["arm"] in ended[row["worker"]] for row in rows)
    finally:
        optuna.delete_study(study_name="s", storage=postgres)


# Storages and definitions


def test_a_study_holds_all_that_its_workers_need_as_json(storage):
    create_study(storage, "s", DEFINITION)
    assert Definition.from_json(open_study(storage, "s").user_attrs["moejax"]) == DEFINITION


def test_a_journal_is_json_and_nothing_is_pickled(tmp_path):
    search(tmp_path / "a")
    lines = (tmp_path / "a" / "study.journal").read_text().splitlines()
    assert [json.loads(line) for line in lines]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["study.journal"]


def test_a_study_of_another_space_is_refused(storage):
    create_study(storage, "s", DEFINITION)
    assert create_study(storage, "s", DEFINITION).study_name == "s"
    message = r"study 's' in .* has another axes; choose another --study"
    with pytest.raises(StudyError, match=message):
        create_study(storage, "s", new_definition(axes=(RATE,)))


def test_a_study_that_is_missing_is_named_and_not_made(storage, tmp_path):
    with pytest.raises(StudyError, match="there is no study 's' in"):
        open_study(storage, "s")
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_is_missing_is_not_taken_for_a_missing_study(postgres):
    storage = postgres.replace("/postgres?", "/elsewhere?")
    message = r'cannot be used \(.*database "elsewhere" does not exist'
    with pytest.raises(StudyError, match=message):
        create_study(storage, "s", DEFINITION)
    with pytest.raises(StudyError, match=message):
        open_study(storage, "s")


def test_a_study_of_something_else_is_refused(tmp_path):
    path = tmp_path / "a.db"
    optuna.create_study(study_name="s", storage=f"sqlite:///{path}")
    with pytest.raises(StudyError, match="not made by moejax"):
        open_study(str(path), "s")


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study", r"'study' must end in .journal, .log or .db, or be a URL"),
        ("/proc/none/a.journal", r"/proc/none/a.journal cannot be opened|no study 's'"),
        ("/proc/none/a.db", r"/proc/none/a.db cannot be made|no study 's'"),
        ("cassandra://h/d", r"cassandra:// is of no known kind; use postgresql"),
        (
            "mysql+mysqldb://u:secret@h/d",
            r"mysqldb://u:\*\*\*@h/d needs a driver .*comes with extra sweeps",
        ),
        (
            "postgresql+psycopg://u:secret@h:port/d",
            r"is no URL of the form postgresql\+psycopg://user@host/name",
        ),
        (
            "postgresql+psycopg://u:sec{ret@127.0.0.1:1/d",
            r"u:\*\*\*@127.0.0.1:1/d cannot be used \(.*refused",
        ),
        (
            "postgresql+psycopg://u@127.0.0.1:1/d?password=secret",
            r"127.0.0.1:1/d.* cannot be used \(.*refused",
        ),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_without_a_password(storage, message):
    for attempt in (
        lambda: create_study(storage, "s", DEFINITION),
        lambda: open_study(storage, "s"),
    ):
        with pytest.raises(StudyError, match=message) as caught:
            attempt()
        error = str(caught.value)
        assert "\n" not in error and "sec" not in error.replace("seconds", "")


def test_a_search_without_optuna_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(StudyError, match=r"needs Optuna .*pip install -e '.\[sweeps\]'"):
        create_study(str(tmp_path / "a.journal"), "s", DEFINITION)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "at least one axis"),
        ([Choice("train.seed", (1, 2))], "train.seed cannot be an axis of a search"),
        ([Choice("a", ())], "axis a has no values"),
        ([Choice("a", (1,)), between("a", 0, 1)], "axis a is given 2 times"),
        ([Choice("a", (object(),))], "axis a: its values must be JSON"),
        ([between("a", 2, 1)], "axis a goes from 2 to 1"),
        ([between("a", 0, 1, True)], "axis a is logarithmic from 0"),
    ],
)
def test_axes_that_cannot_be_searched_are_refused(axes, message):
    with pytest.raises(StudyError, match=message):
        search_axes(axes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "grid"}, "sampler=grid is unknown; use one of random, tpe"),
        ({"pruner": "best"}, "pruner=best is unknown"),
        ({"trials": 0}, "trials=0"),
        ({"seed": -1}, "seed=-1"),
        ({"fractions": (0.5, 0.5)}, "must ascend"),
        (
            {"fractions": (1.0,), "pruner": "median"},
            "pruner=median has nothing to compare.*train.eval_every",
        ),
    ],
)
def test_a_definition_that_cannot_work_is_refused(changes, message):
    with pytest.raises(StudyError, match=message):
        new_definition(**changes)


def test_a_grace_period_within_two_heartbeats_is_refused(tmp_path):
    with pytest.raises(StudyError, match="must be more than two heartbeats"):
        evaluate(create_study(str(tmp_path / "a.journal"), "s", DEFINITION), beat_s=5, grace_s=10)


def test_the_search_is_imported_without_optuna():
    code = (
        "import sys, moejax.sweeps.search.worker; "
        "sys.exit(bool({'optuna', 'sqlalchemy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The dashboard


def test_the_dashboards_command_shows_no_password():
    command = "optuna-dashboard runs/study.journal --host 127.0.0.1 --port 8080"
    assert dashboard_command("runs/study.journal") == command
    sqlite_pattern = r"optuna-dashboard sqlite:////.*/runs/a.db --host .*"
    assert re.fullmatch(sqlite_pattern, dashboard_command("runs/a.db"))
    assert show_storage("postgresql+psycopg://u:secret@h/d") == "postgresql+psycopg://u:***@h/d"
    assert "secret" not in dashboard_command("postgresql+psycopg://u:secret@h/d")


def test_the_dashboard_lists_the_study_to_this_machine_only(tmp_path):
    storage = str(tmp_path / "study.journal")
    create_study(storage, "of routers", DEFINITION)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "from moejax.sweeps.search.study import serve_dashboard; "
        f"serve_dashboard({storage!r}, port={port})"
    )
    server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    names = []

    def is_listed():
        assert server.poll() is None
        with contextlib.suppress(OSError):
            address = f"http://127.0.0.1:{port}/api/studies"
            content = json.load(urllib.request.urlopen(address, timeout=5))
            names.extend(study["study_name"] for study in content["study_summaries"])
        return names

    try:
        wait_until(is_listed, "the dashboard")
    finally:
        server.kill()
        server.wait(timeout=30)
    assert names == ["of routers"]


def test_a_dashboard_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(StudyError, match=r"pip install -e '.\[sweeps\]'"):
        serve_dashboard(str(tmp_path / "a.journal"))
