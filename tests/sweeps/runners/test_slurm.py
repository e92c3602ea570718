"""Jobs of a cluster, with submitit's local executor.

They are processes of this machine that are interrupted and queued again.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import submitit

from cases.training import SMALL
from moejax.sweeps.arms import plan_arms
from moejax.sweeps.runners import slurm
from moejax.sweeps.runners.pool import STOPPED
from moejax.sweeps.runners.slurm import Jobs, Work, check_jobs, submit
from moejax.sweeps.store.directory import write_sweep

SCRIPT = f"""
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if (folder / "begun").exists():
    (folder / "ended").write_text((folder / "saved").read_text())
    sys.exit(0)
def save(*_):
    (folder / "saved").write_text("at step 7")
    sys.exit({STOPPED})
signal.signal(signal.SIGTERM, save)
(folder / "begun.tmp").write_text(f"{{os.getppid()}} {{os.getpid()}}")
(folder / "begun.tmp").rename(folder / "begun")
time.sleep(120)
"""
"""What `moejax sweep work` does when it is asked to stop."""


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the job got nowhere"
        time.sleep(0.05)


@pytest.mark.parametrize("first", [signal.SIGUSR2, signal.SIGTERM])
def test_an_interrupted_job_saves_is_queued_again_and_goes_on(first, tmp_path):
    """SLURM signals all processes of a job.

    SIGUSR2 comes before its time is up, SIGTERM when it is preempted.
    """
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Work([sys.executable, "-c", SCRIPT, str(tmp_path)]))
    try:
        wait_for((tmp_path / "begun").exists)
        job_pid, command_pid = map(int, (tmp_path / "begun").read_text().split())
        os.kill(command_pid, first)
        if first == signal.SIGTERM:
            os.kill(job_pid, first)
            wait_for((tmp_path / "saved").exists)
        time.sleep(0.3)
        assert not job.done()
        assert (tmp_path / "saved").exists() == (first == signal.SIGTERM)
        os.kill(job_pid, signal.SIGUSR2)
        wait_for((tmp_path / "ended").exists)
        job.wait()
        assert job.exception() is None
    finally:
        job.cancel()
    assert (tmp_path / "ended").read_text() == "at step 7"


@pytest.mark.parametrize("code", [STOPPED, -signal.SIGTERM])
def test_a_stopped_job_that_is_not_queued_again_fails(code, monkeypatch):
    monkeypatch.setattr(slurm, "SAVE_S", 0.01)
    end = f"raise SystemExit({code})"
    if code < 0:
        end = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    with pytest.raises(subprocess.CalledProcessError) as error:
        Work([sys.executable, "-c", end])()
    assert error.value.returncode == code


def test_a_job_is_queued_again_whether_or_not_its_process_has_ended():
    work = Work(["true"])
    assert work.checkpoint().function.command == ["true"]  # before it began
    work._process = subprocess.Popen(["true"])
    os.waitpid(work._process.pid, 0)  # its exit code has been taken, though Popen does not know yet
    assert slurm._has_ended(work._process.pid)
    assert work.checkpoint().function.command == ["true"]


def test_the_exit_code_of_a_job_that_fails_is_reported(tmp_path):
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Work([sys.executable, "-c", "raise SystemExit(3)"]))
    assert "exit status 3" in str(job.exception())


def test_a_pickled_job_holds_a_list_of_words():
    work = pickle.loads(pickle.dumps(Work(["moejax", "sweep"])))
    assert vars(work) == {"command": ["moejax", "sweep"]}
    work._process = subprocess.Popen(["true"])
    work._process.wait()
    assert vars(pickle.loads(pickle.dumps(work))) == {"command": ["moejax", "sweep"]}


def test_the_jobs_of_a_sweep_are_an_array_that_can_be_queued_again(tmp_path, monkeypatch):
    plan = plan_arms(SMALL, [{"train.seed": seed} for seed in range(4)])
    sweep = write_sweep(
        tmp_path / "grid", plan, largest_pack=2, recipe="r.py", match="", command="c"
    )
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("srun", "sbatch"):  # a cluster that only notes what it is asked for
        script = bin_folder / name
        script.write_text(
            f'#!/bin/bash\ncp "${{@: -1}}" {tmp_path}/submitted.sh\necho "Submitted batch job 42"\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    wanted = Jobs(number=2, gpus=1, cpus=4, minutes=60, partition="fast", account="lab")
    jobs = submit(sweep, wanted)
    assert [job.job_id for job in jobs] == ["42_0", "42_1"]
    text = (tmp_path / "submitted.sh").read_text()
    for words in (
        "#SBATCH --array=0-1%2", "#SBATCH --gpus-per-node=1", "#SBATCH --cpus-per-task=4",
        "#SBATCH --time=60", "#SBATCH --requeue", "#SBATCH --signal=USR2@120",
        "#SBATCH --partition=fast", "#SBATCH --account=lab", "#SBATCH --job-name=moejax-grid",
    ):  # fmt: skip
        assert words in text, text
    # Time is up as often as it takes.
    assert jobs[0].submission()._timeout_countdown > 10_000
    # Both jobs run the same: they take packs as they find them free.
    definition = json.loads((tmp_path / "grid/sweep.json").read_text())
    assert definition["packs"] == [list(pack) for pack in sweep.packs]


@pytest.mark.parametrize("minutes", [1, 4])
def test_a_job_must_have_time_to_start_and_to_save(minutes, tmp_path):
    sweep = write_sweep(
        tmp_path, plan_arms(SMALL, [{}]), largest_pack=1, recipe="r.py", match="", command="c"
    )
    for ask in (
        lambda: submit(sweep, Jobs(minutes=minutes)),
        lambda: check_jobs(Jobs(minutes=minutes)),
    ):
        with pytest.raises(ValueError, match=f"--minutes={minutes} must be more than 4"):
            ask()
