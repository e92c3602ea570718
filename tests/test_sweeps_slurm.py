"""Jobs of a cluster, tried with submitit's local executor: processes of this machine, interrupted and queued again."""

import json
import os
import pickle
import signal
import sys
import time

import pytest
import submitit

from moejax.sweeps.arms import plan_arms
from moejax.sweeps.directory import write_sweep
from moejax.sweeps.slurm import Jobs, Work, submit
from training_cases import SMALL

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
if (folder / "begun").exists():
    (folder / "ended").write_text((folder / "saved").read_text())
    sys.exit(0)
def save(*_):
    (folder / "saved").write_text("at step 7")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "begun.tmp").write_text(str(os.getppid()))
(folder / "begun.tmp").rename(folder / "begun")
time.sleep(120)
"""


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the job got nowhere"
        time.sleep(0.05)


def test_an_interrupted_job_saves_is_queued_again_and_goes_on(tmp_path):
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Work([sys.executable, "-c", SCRIPT, str(tmp_path)]))
    try:
        wait_for((tmp_path / "begun").exists)
        os.kill(int((tmp_path / "begun").read_text()), signal.SIGUSR2)  # as SLURM does before the time is up
        wait_for((tmp_path / "ended").exists)
        job.wait()
        assert job.exception() is None
    finally:
        job.cancel()
    assert (tmp_path / "ended").read_text() == "at step 7"


def test_a_job_that_fails_says_so(tmp_path):
    executor = submitit.AutoExecutor(folder=tmp_path, cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Work([sys.executable, "-c", "raise SystemExit(3)"]))
    assert "exit status 3" in str(job.exception())


def test_what_travels_to_a_job_is_a_list_of_words():
    work = pickle.loads(pickle.dumps(Work(["moejax", "sweep"])))
    assert vars(work) == {"command": ["moejax", "sweep"]}


def test_the_jobs_of_a_sweep_are_one_array_that_is_queued_again_when_it_is_preempted(tmp_path, monkeypatch):
    plan = plan_arms(SMALL, [{"train.seed": seed} for seed in range(4)])
    sweep = write_sweep(tmp_path / "grid", plan, largest_pack=2, recipe="r.py", match="", command="c")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("srun", "sbatch"):  # a cluster that only notes what it is asked for
        script = bin_folder / name
        script.write_text(f'#!/bin/bash\ncp "${{@: -1}}" {tmp_path}/submitted.sh\necho "Submitted batch job 42"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    jobs = submit(sweep, Jobs(number=2, gpus=1, cpus=4, minutes=60, partition="fast", account="lab"))
    assert [job.job_id for job in jobs] == ["42_0", "42_1"]
    text = (tmp_path / "submitted.sh").read_text()
    for words in (
        "#SBATCH --array=0-1%2", "#SBATCH --gpus-per-node=1", "#SBATCH --cpus-per-task=4", "#SBATCH --time=60",
        "#SBATCH --requeue", "#SBATCH --signal=USR2@120", "#SBATCH --partition=fast", "#SBATCH --account=lab",
        "#SBATCH --job-name=moejax-grid",
    ):  # fmt: skip
        assert words in text, text
    # Both jobs run the same: they take packs as they find them free.
    assert json.loads((tmp_path / "grid/sweep.json").read_text())["packs"] == [list(pack) for pack in sweep.packs]


@pytest.mark.parametrize("minutes", [1, 4])
def test_a_job_must_have_time_to_start_and_to_save(minutes, tmp_path):
    sweep = write_sweep(tmp_path, plan_arms(SMALL, [{}]), largest_pack=1, recipe="r.py", match="", command="c")
    with pytest.raises(ValueError, match=f"--minutes={minutes} must be more than 4"):
        submit(sweep, Jobs(minutes=minutes))
