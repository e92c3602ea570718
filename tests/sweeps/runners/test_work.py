"""Which process trains which arms: packs that are taken, fail and are recorded, and pools.

Nothing is trained.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import threading
import types

import jax
import pytest

from cases.sweeps import write_run
from cases.training import SMALL
from moejax.locks import LockedError
from moejax.sweeps.arms import SweepError, plan_arms
from moejax.sweeps.runners import packs as run
from moejax.sweeps.runners import pool
from moejax.sweeps.runners.packs import record_arm, run_sweep, train_pack, training_seconds, work
from moejax.sweeps.runners.pool import RESTARTS, STOPPED, Share, run_pool, share_out, shares
from moejax.sweeps.store import directory
from moejax.sweeps.store.directory import claimed, locked, open_sweep, write_sweep
from moejax.sweeps.store.records import read_record, read_records, write_record
from moejax.training.health.alarms import AlarmError
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.multihost.signals import StopSignals
from moejax.training.run import TrainResult

DONE = TrainResult(4, None, None)


def new_sweep(directory, number=4, largest_pack=2):
    plan = plan_arms(SMALL, [{"train.seed": seed} for seed in range(number)])
    return write_sweep(
        directory, plan, largest_pack=largest_pack, recipe="r.py", match="", command="c"
    )


@pytest.fixture
def trained(monkeypatch):
    """The packs that `train_packed` got, as lists of seeds.

    `trained.ends` says how an arm ends, by its seed.
    """

    class Trained(list):
        def __init__(self):
            self.ends = {}

    seen = Trained()

    def train_packed(configs, workdirs, *, command, stop, on_end):
        seeds = [config.train.seed for config in configs]
        seen.append(seeds)
        if len(seen) > 9:
            pytest.fail("packs are trained again and again")
        results = []
        for index, seed in enumerate(seeds):
            end = seen.ends.get(seed, DONE)
            if isinstance(end, BaseException):
                raise end
            if end.error is not None:
                on_end(index, end)
            results.append(end)
        return results

    monkeypatch.setattr(run, "train_packed", train_packed)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return seen


def status_of(sweep):
    rows = [read_record(sweep.workdir(arm_id)) for arm_id in sweep.arms]
    return [row and row["status"] for row in rows]


# Packs
# --------------------------------------------------------------------------------------------------


def test_a_pack_that_fails_leaves_no_record_and_the_others_go_on(trained, tmp_path, caplog):
    sweep = new_sweep(tmp_path)
    trained.ends[1] = RuntimeError("out of memory")
    assert not work(sweep, StopSignals())
    assert trained == [[0, 1], [2, 3]]  # and it is not tried again by this process
    assert status_of(sweep) == [None, None, "done", "done"]
    assert "pack 0" in caplog.text and "out of memory" in caplog.text
    with pytest.raises(SweepError, match=f"2 of 4 arms have not ended .{sweep.packs[0][0]}"):
        run.check_open(sweep)
    trained.ends.clear()
    assert work(sweep, StopSignals()) and status_of(sweep) == ["done"] * 4


def test_a_failed_pack_and_a_stop_have_exit_codes_of_their_own(monkeypatch, tmp_path, capsys):
    from moejax.cli import main
    from moejax.cli.verbs import sweep as verb

    new_sweep(tmp_path)
    monkeypatch.setattr(verb, "prepare_devices", lambda packs: None)
    monkeypatch.setattr(verb, "work", lambda sweep, stop: False)
    assert main(["sweep", "work", f"--dir={tmp_path}"]) == 2
    assert "4 of 4 arms have not ended" in capsys.readouterr().err
    monkeypatch.setattr(verb, "work", lambda sweep, stop: stop.request("SIGTERM"))
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "work", f"--dir={tmp_path}"])
    assert stopped.value.code == STOPPED and STOPPED not in (0, 1, 2, 3, 130)
    # A stop after all arms have ended is no failure.
    monkeypatch.setattr(verb, "work", lambda sweep, stop: stop.request("SIGTERM") or True)
    monkeypatch.setattr(verb, "check_open", lambda sweep: None)
    assert main(["sweep", "work", f"--dir={tmp_path}"]) == 0


def test_how_an_arm_ended_is_in_its_record(trained, tmp_path):
    sweep = new_sweep(tmp_path, number=4, largest_pack=4)
    trained.ends[1] = TrainResult(2, None, None, error=AlarmError("drops in layer 0"))
    trained.ends[2] = TrainResult(2, None, None, error=NonFiniteError("loss is nan"))
    trained.ends[3] = TrainResult(2, "SIGTERM", None)
    train_pack(sweep, sweep.packs[0], StopSignals())
    assert status_of(sweep) == ["done", "stopped", "failed", None]
    rows = [read_record(sweep.workdir(arm_id)) for arm_id in sweep.packs[0]]
    assert rows[1]["error"] == "drops in layer 0"
    assert rows[0]["error"] is None and rows[0]["packed"] == 4
    assert list(read_records(tmp_path)["status"]) == ["done", "stopped", "failed"]


def test_an_arm_that_ends_early_has_its_record_before_the_others_end(trained, tmp_path):
    sweep = new_sweep(tmp_path, number=2)
    trained.ends[0] = TrainResult(2, None, None, error=AlarmError("drops in layer 0"))
    trained.ends[1] = KeyboardInterrupt()  # or a kill: nothing comes back from the pack
    with pytest.raises(KeyboardInterrupt):
        train_pack(sweep, sweep.packs[0], StopSignals())
    assert status_of(sweep) == ["stopped", None]
    workdir = sweep.workdir(sweep.packs[0][0])
    first = read_record(workdir)
    trained.ends.clear()
    assert work(sweep, StopSignals()) and trained[-1] == [1]
    assert read_record(workdir) == first and status_of(sweep) == ["stopped", "done"]


def test_damaged_files_of_an_arm_do_not_affect_records_of_its_pack(trained, tmp_path, caplog):
    sweep = new_sweep(tmp_path, number=4, largest_pack=4)
    trained.ends[3] = TrainResult(2, None, None, error=NonFiniteError("loss is nan"))
    for arm in (1, 3):
        workdir = sweep.workdir(sweep.packs[0][arm])
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text("{")
    assert not work(sweep, StopSignals())
    assert status_of(sweep) == ["done", None, "done", "failed"]
    assert list(read_records(tmp_path)["status"]) == ["done", "done", "failed"]
    assert f"arm {sweep.packs[0][1]} is trained to its end and has no record: " in caplog.text
    assert "Traceback" not in caplog.text
    error = read_record(sweep.workdir(sweep.packs[0][3]))["error"]
    assert error.startswith("loss is nan; what it logged is not in its record: ")


def test_a_lock_that_cannot_be_made_ends_the_work_and_is_not_waited_for(trained, tmp_path):
    sweep = new_sweep(tmp_path)
    shutil.rmtree(tmp_path / "claims")
    (tmp_path / "claims").touch()
    with pytest.raises(LockedError, match="cannot be locked for writing"):
        work(sweep, StopSignals())
    with pytest.raises(SweepError, match="cannot be written: Not a directory; use another folder"):
        new_sweep(tmp_path)
    assert trained == []


def test_an_arm_that_another_process_has_taken_over_is_not_written(tmp_path):
    sweep = new_sweep(tmp_path)
    arm_id = sweep.packs[0][0]
    taken = {
        "pid": 7, "host": "node9", "boot": "b", "since": "then", "does": "trains", "nonce": "n",
        "beat": 1,
    }  # fmt: skip
    by_another = "was taken over by process 7 on node9"
    with claimed(tmp_path, arm_id), locked(tmp_path, "definition"):
        for name in (arm_id, "definition"):
            (tmp_path / "claims" / name / ".lock").write_text(json.dumps(taken))
        before = (tmp_path / "sweep.json").read_bytes()
        with pytest.raises(LockedError, match=f"claims/{arm_id} {by_another}"):
            record_arm(sweep.workdir(arm_id), sweep.arms[arm_id], "done", None, packed=1)
        with pytest.raises(LockedError, match=f"claims/definition {by_another}"):
            directory._write(sweep, "r.py", "", is_search=False)
    assert read_record(sweep.workdir(arm_id)) is None
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_work_waits_for_packs_that_another_process_holds(trained, tmp_path, monkeypatch):
    sweep = new_sweep(tmp_path)
    others = sweep.packs[1]

    def end_theirs(seconds):
        for arm_id in others:
            write_record(sweep.workdir(arm_id), {"arm": arm_id, "status": "done"})

    monkeypatch.setattr(run.time, "sleep", end_theirs)
    # As the sweep was planned before.
    regrouped = dataclasses.replace(sweep, packs=(others, sweep.packs[0]))
    with regrouped.claim(regrouped.packs[0]):
        assert work(sweep, StopSignals())
    assert trained == [[0, 1]]


def test_a_sweep_from_a_notebook_continues_after_a_kill(trained, tmp_path):
    points = [{"train.seed": seed} for seed in range(2)]
    frame = run_sweep(SMALL, points, tmp_path)
    assert list(frame["override/train.seed"]) == [0, 1] and trained == [[0, 1]]
    assert list(open_sweep(tmp_path).arms) == list(frame["arm"])
    # Killed after its records were written, and before they were joined.
    for name in ("records.jsonl", "records.parquet"):
        (tmp_path / name).unlink()
    assert run_sweep(SMALL, points, tmp_path).equals(frame) and len(trained) == 1
    grown = run_sweep(SMALL, [point | {"moe.z_weight": 0.01} for point in points], tmp_path)
    assert list(grown["override/moe.z_weight"]) == [0.01, 0.01] and len(trained) == 1
    trained.ends[2] = RuntimeError("no")
    with pytest.raises(SweepError, match="1 of 3 arms have not ended"):
        run_sweep(SMALL, [*points, {"train.seed": 2}], tmp_path)


def test_joint_files_are_written_by_one_process_at_a_time(trained, tmp_path):
    sweep = new_sweep(tmp_path, number=1)
    with locked(tmp_path, "records"):
        thread = threading.Thread(target=run.join_records, args=(sweep.directory,))
        thread.start()
        thread.join(0.2)
        assert not (tmp_path / "records.jsonl").exists()
    thread.join()
    assert (tmp_path / "records.jsonl").exists()


def test_a_sweep_that_does_not_fit_the_devices_leaves_its_directory_free(trained, tmp_path):
    base = SMALL | {"mesh": {"data": 16}, "train": SMALL["train"] | {"batch_size": 16}}
    with pytest.raises(ValueError, match=r"arm \w{10} \(train.seed=0\): .*do not fit 8 devices"):
        run_sweep(base, [{"train.seed": 0}], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


# Seconds
# --------------------------------------------------------------------------------------------------


def write_lines(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_seconds_of_training_are_those_of_the_logged_intervals(tmp_path):
    lines = [
        {"step": 10, "tokens": 100, "perf/tokens_per_s": 50.0},
        {"step": 10, "eval/loss": 3.0},
        {"step": 20, "tokens": 200, "perf/tokens_per_s": 25.0},
        {"step": 22, "tokens": 220, "perf/tokens_per_s": 20.0},
    ]
    write_lines(tmp_path, lines)
    assert training_seconds(tmp_path) == (2 + 4 + 1, 0.4, 1)
    assert training_seconds(tmp_path / "nothing") is None
    write_lines(tmp_path, [{"step": 10, "eval/loss": 3.0}])
    assert training_seconds(tmp_path) is None


def test_lines_that_say_nothing_about_time_are_skipped(tmp_path):
    lines = [
        {"step": 10, "tokens": 100, "perf/tokens_per_s": 50.0},
        {"step": 20, "tokens": 100, "perf/tokens_per_s": 0.0},  # an interval without a target
        {"step": 30, "tokens": 200, "perf/tokens_per_s": 25.0},
        {"step": 40, "tokens": "many", "perf/tokens_per_s": 25.0},
        {"step": 40, "tokens": 300, "perf/tokens_per_s": None},
        {"step": 30, "tokens": 300, "perf/tokens_per_s": 25.0},
    ]
    write_lines(tmp_path, lines)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n\x00\n{"step": 50, "tok')
    assert training_seconds(tmp_path) == (2 + 4, pytest.approx(0.3), 1)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert training_seconds(tmp_path) is None


def test_an_arm_has_its_share_of_each_pack_it_was_in(tmp_path):
    lines = [
        {"step": 10, "tokens": 100, "perf/tokens_per_s": 25.0, "perf/arms": 4},
        {"step": 20, "tokens": 200, "perf/tokens_per_s": 50.0, "perf/arms": 2},
        {"step": 30, "tokens": 300, "perf/tokens_per_s": 50.0},
        {"step": 40, "tokens": 400, "perf/tokens_per_s": 10.0, "perf/arms": 2},
    ]
    write_lines(tmp_path, lines)
    assert training_seconds(tmp_path) == (1 + 1 + 2 + 5, pytest.approx(0.15), 2)


def test_a_record_has_the_size_of_the_pack_from_the_log(trained, tmp_path):
    sweep = new_sweep(tmp_path, number=1)
    arm_id = sweep.packs[0][0]
    entry = sweep.arms[arm_id].to_json()
    write_run(sweep.workdir(arm_id), entry, end=10)
    metrics = sweep.workdir(arm_id) / "metrics.jsonl"
    line = json.loads(metrics.read_text().splitlines()[-1]) | {"perf/arms": 8}
    metrics.write_text(json.dumps(line) + "\n")
    train_pack(sweep, sweep.packs[0], StopSignals())
    row = read_record(sweep.workdir(arm_id))
    assert trained == [[0]]
    assert (row["packed"], row["wall_s"]) == (8, line["tokens"] / 1000 / 8)


# The pool
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "number", "parts"),
    [([0, 1, 2], 2, [[0], [1, 2]]), ([4, 5], 2, [[4], [5]]), ([1, 2, 3], 1, [[1, 2, 3]])],
)
def test_devices_are_divided_evenly(items, number, parts):
    assert shares(items, number) == parts
    for wrong in (len(items) + 1, 0, -1):
        message = f"--processes={wrong} must be at most {len(items)}.*and at least 1"
        with pytest.raises(SweepError, match=message):
            shares(items, wrong)


@pytest.mark.parametrize(
    ("visible", "gpus", "given"),
    [
        (None, 2, ["0", "1"]),
        ("4,5", 2, ["4", "5"]),
        ("GPU-8932f937, GPU-d7f8a1c2,7", 2, ["GPU-8932f937", "GPU-d7f8a1c2"]),
        ("2,3,4,5", 4, ["2,3", "4,5"]),
    ],
)
def test_processes_get_gpus_of_those_that_the_pool_may_use(visible, gpus, given, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    parts = share_out(2, gpus)
    expected = [{"CUDA_VISIBLE_DEVICES": names} for names in given]
    assert [part.environment for part in parts] == expected
    assert all(part.cores == () for part in parts)


def test_missing_gpus_are_refused_and_without_gpus_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,-1,6")
    message = "--gpus=3 must be at most 2, as CUDA_VISIBLE_DEVICES=4,5,-1,6 has no more"
    with pytest.raises(SweepError, match=message):
        share_out(2, 3)
    with pytest.raises(SweepError, match="--gpus=-1 must be at least 0"):
        share_out(2, -1)
    parts = share_out(2, 0)
    assert [part.cores for part in parts] == [(1,), (2, 3)]
    assert [part.environment for part in parts] == [{"JAX_PLATFORMS": "cpu"}] * 2


class Processes(list):
    """Stands in for `subprocess.Popen`: each process ends with the next of `codes`.

    One with the code None does not end.
    """

    def __init__(self, *codes):
        super().__init__()
        self.codes = list(codes)

    def __call__(self, command, env, **streams):
        process = Process(command, env, self.codes.pop(0) if self.codes else 0)
        self.append(process)
        return process


class Process(subprocess.Popen):
    def __init__(self, command, env, code):
        self.command, self.env, self.code, self.terminated = command, env, code, 0
        self.polls = 0

    def poll(self):
        self.polls += 1
        assert self.polls < 100, "the pool waits for a process that does not end"
        return self.code

    def terminate(self):
        self.terminated += 1
        self.code = STOPPED if self.code is None else self.code

    def wait(self, timeout=None):
        assert self.code is not None
        return self.code


@pytest.fixture
def processes(monkeypatch):
    found = Processes()
    monkeypatch.setattr(
        pool, "subprocess", types.SimpleNamespace(Popen=found, STDOUT=-2, DEVNULL=-3)
    )
    monkeypatch.setattr(pool, "POLL_S", 0.0)
    return found


def test_a_dead_process_is_started_again_and_too_many_deaths_end_the_pool(processes, tmp_path):
    sweep = new_sweep(tmp_path)
    parts = [Share(gpus=("4",)), Share(gpus=("5",))]
    processes.codes = [-signal.SIGKILL, 0, 0]
    assert not run_pool(sweep, parts, StopSignals())  # nothing was trained
    assert [process.env["CUDA_VISIBLE_DEVICES"] for process in processes] == ["4", "5", "4"]
    assert all(process.command[-1] == f"--dir={tmp_path}" for process in processes)
    processes.clear()
    processes.codes = [-signal.SIGSEGV, None] + [-signal.SIGSEGV] * 2 * RESTARTS
    message = f"{RESTARTS + 1} processes of the pool died; .*logs says more"
    with pytest.raises(SweepError, match=message):
        run_pool(sweep, parts, StopSignals())
    assert len(processes) == 2 + RESTARTS
    assert processes[1].terminated == 1  # the one that still runs does not outlive the pool


def test_a_process_that_ends_by_itself_is_not_started_again(processes, tmp_path):
    sweep = new_sweep(tmp_path)
    processes.codes = [2, 1]
    assert not run_pool(sweep, [Share(cores=(0,)), Share(cores=(1,))], StopSignals())
    assert [process.command[-1] for process in processes] == ["--cores=0", "--cores=1"]
    for arm_id in sweep.arms:
        write_record(sweep.workdir(arm_id), {"arm": arm_id, "status": "done"})
    processes.clear()
    processes.codes = [-signal.SIGKILL]  # when nothing was left to do
    assert run_pool(sweep, [Share(cores=(0,))], StopSignals()) and len(processes) == 1


def test_a_stop_is_passed_on_once_and_no_process_is_started_again(processes, tmp_path):
    sweep, stop = new_sweep(tmp_path), StopSignals()
    processes.codes = [None, -signal.SIGKILL]
    stop.request("SIGTERM")
    assert not run_pool(sweep, [Share(cores=(0,)), Share(cores=(1,))], stop)
    assert len(processes) == 2 and processes[0].terminated == 1


# Compiled programs
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache_options(monkeypatch):
    found = {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


def test_nothing_is_loaded_from_a_sweeps_directory(cache_options, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run.prepare_devices(new_sweep(tmp_path / "sweep").packs)
    assert not any(str(tmp_path / "sweep") in str(value) for value in cache_options.values())
    assert cache_options["jax_num_cpu_devices"] == len(pool.usable_cores())


def test_all_cores_may_be_used_where_the_system_does_not_say(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert pool.usable_cores() == [0, 1, 2]
