"""An array of SLURM jobs, through submitit (extra `sweeps`), each of which trains packs of a sweep.

submitit hands what a job runs from process to process as a pickle in the sweep's folder `slurm`;
here that is a list of words. moejax itself reads no pickles.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.extras import how_to_install
from moejax.sweeps.arms import SweepError
from moejax.sweeps.runners.pool import STOPPED, work_command
from moejax.sweeps.store.directory import Sweep

if TYPE_CHECKING:
    from submitit import Job

SAVE_S = 120
"""Seconds that a job has to save before its time is up, or when the cluster takes its node back.

Then it is queued again.
"""

FOLDER = "slurm"

MAX_TIMEOUTS = 1_000_000
"""How often a job may be queued again after its time was up: as often as it takes."""


class Work:
    """A job: runs a command, and when it is interrupted lets it save and asks to be queued again.

    SLURM signals all processes of a job, so the command as well as this process. SIGUSR2, before
    the time is up or to preempt the job, is for this process to handle, and blocked in the command;
    SIGTERM makes the command save and end.

    Args:
      command: the words of the command.
    """

    _process: subprocess.Popen | None = None

    def __init__(self, command: list[str]):
        self.command = command

    def __call__(self) -> None:
        """Runs the command.

        Raises:
          CalledProcessError: the command failed, or was stopped and the job is not queued again.
        """
        with _blocked(signal.SIGUSR1, signal.SIGUSR2):  # submitit can be configured to use either
            self._process = subprocess.Popen(self.command)
        code = self._process.wait()
        if code in (STOPPED, -signal.SIGTERM):
            # If the job is to go on, `checkpoint` is called meanwhile, and does not return.
            time.sleep(SAVE_S)
        if code:
            raise subprocess.CalledProcessError(code, self.command)

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command}

    def checkpoint(self) -> Any:
        """Lets the command save, and returns the job to queue again.

        submitit calls this in the job's process when its time is up or it is preempted.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            deadline = time.monotonic() + SAVE_S - 10
            while not _has_ended(self._process.pid) and time.monotonic() < deadline:
                time.sleep(0.2)
            self._process.kill()
        return DelayedSubmission(Work(self.command))


@contextlib.contextmanager
def _blocked(*signals: signal.Signals) -> Iterator[None]:
    """Blocks signals in processes that start in this block; this process gets them after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_ended(pid: int) -> bool:
    """Whether a child process has ended.

    Its exit code is not collected: `__call__`, which a signal interrupted, waits for it.
    """
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # the code has been collected
        return True


@dataclasses.dataclass(frozen=True)
class Jobs:
    """What each job of the array gets.

    Attributes:
      number: of jobs, all of which work on the sweep's packs.
      gpus, cpus: of each job.
      minutes: after which it saves and is queued again.
      partition, account: of the cluster; "" for its default.
      cluster: "slurm", or "local": processes of this machine, to try it.
    """

    number: int = 1
    gpus: int = 1
    cpus: int = 8
    minutes: int = 240
    partition: str = ""
    account: str = ""
    cluster: str = "slurm"


def check_jobs(jobs: Jobs) -> None:
    """Checks that such jobs can be queued, before anything is written.

    Raises:
      SweepError: submitit is not installed, there is no SLURM, or jobs would be too short.
    """
    _executor(jobs, Path(FOLDER))


def _executor(jobs: Jobs, folder: Path):
    try:
        import submitit
    except ImportError as error:
        raise SweepError(
            f"--runner=slurm needs submitit ({error}): {how_to_install('sweeps')}"
        ) from error
    if jobs.minutes * 60 <= 2 * SAVE_S:
        raise SweepError(
            f"--minutes={jobs.minutes} must be more than {2 * SAVE_S // 60}, to start and to save"
        )
    try:
        return submitit.AutoExecutor(
            folder=folder / "%j", cluster=jobs.cluster, slurm_max_num_timeout=MAX_TIMEOUTS
        )
    except RuntimeError as error:
        raise SweepError(
            f"--runner=slurm cannot submit ({error}); run it where sbatch is"
        ) from error


def submit(sweep: Sweep, jobs: Jobs) -> "list[Job[None]]":
    """Queues the jobs.

    The sweep's folder and the environment must be on a file system that all nodes share.

    Raises:
      SweepError: see `check_jobs`.
    """
    executor = _executor(jobs, Path(sweep.directory) / FOLDER)
    executor.update_parameters(**_parameters(sweep, jobs))
    work = Work(work_command(sweep.directory.resolve()))
    with executor.batch():
        queued = [executor.submit(work) for _ in range(jobs.number)]
    return queued


def _parameters(sweep: Sweep, jobs: Jobs) -> dict[str, Any]:
    """Returns the parameters of submitit's executor."""
    parameters: dict[str, Any] = {
        "timeout_min": jobs.minutes,
        "cpus_per_task": jobs.cpus,
        "tasks_per_node": 1,
    }
    if jobs.gpus:
        parameters["gpus_per_node"] = jobs.gpus
    if jobs.cluster != "slurm":
        return parameters
    parameters |= {
        "name": f"moejax-{sweep.directory.name}",
        "nodes": 1,
        "slurm_array_parallelism": jobs.number,
        "slurm_signal_delay_s": SAVE_S,
        "slurm_additional_parameters": {"requeue": True},
    }
    if jobs.partition:
        parameters["slurm_partition"] = jobs.partition
    if jobs.account:
        parameters["slurm_account"] = jobs.account
    return parameters
