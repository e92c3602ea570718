"""A pool of processes on this machine, each of which trains packs on its own GPUs or cores."""

import dataclasses
import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.sweeps.arms import SweepError
from moejax.sweeps.store.directory import Sweep
from moejax.training.multihost.signals import StopSignals

RESTARTS = 3
"""Of processes that died, in all."""

POLL_S = 0.5
"""Seconds between two looks at the processes."""

LOGS_FOLDER = "logs"

STOPPED = os.EX_TEMPFAIL
"""The exit code of a process that was asked to stop before all arms had ended."""

log = logging.getLogger("moejax")


def work_command(directory: Path, cores: Sequence[int] = ()) -> list[str]:
    """Returns the command of a process of a pool, or of a job of a cluster."""
    command = [sys.executable, "-m", "moejax", "sweep", "work", f"--dir={directory}"]
    if cores:
        numbers = ",".join(map(str, cores))
        command.append(f"--cores={numbers}")
    return command


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process of a pool trains on.

    Attributes:
      cores: numbers of cores, if it trains on CPU.
      gpus: as `CUDA_VISIBLE_DEVICES` names them.
    """

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that differ from those of this process."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return {"JAX_PLATFORMS": "cpu"}


def share_out(processes: int, gpus: int) -> list[Share]:
    """Divides this machine into shares that are as even as possible.

    Each has one GPU or core at least.

    Args:
      processes: the number of shares.
      gpus: the number of GPUs to divide, of those that this process may use; with 0 its cores are
        divided.

    Raises:
      SweepError: no processes, or more than there are GPUs or cores; more GPUs than are visible.
    """
    if gpus < 0:
        raise SweepError(f"--gpus={gpus} must be at least 0; 0 trains on CPU")
    if gpus:
        parts = shares(_visible_gpus(gpus), processes)
        return [Share(gpus=tuple(part)) for part in parts]
    parts = shares(usable_cores(), processes)
    return [Share(cores=tuple(part)) for part in parts]


def usable_cores() -> list[int]:
    """Returns the numbers of the cores that this process may use.

    Where the system does not say (macOS, Windows), those are all cores of the machine.
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _visible_gpus(number: int) -> list[str]:
    """Returns the first `number` GPUs that this process may use, as its environment names them."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return [str(gpu) for gpu in range(number)]
    known = []
    for gpu in map(str.strip, variable.split(",")):
        if gpu in ("", "-1"):  # CUDA ignores what comes after such an entry
            break
        known.append(gpu)
    if number > len(known):
        raise SweepError(
            f"--gpus={number} must be at most {len(known)}, "
            f"as CUDA_VISIBLE_DEVICES={variable} has no more"
        )
    return known[:number]


def shares(items: Sequence[Any], number: int) -> list[list[Any]]:
    """Divides items into parts that are as even as possible, each of one item at least."""
    if not 1 <= number <= len(items):
        raise SweepError(
            f"--processes={number} must be at most {len(items)}, one for each core or GPU, "
            "and at least 1"
        )
    edges = [i * len(items) // number for i in range(number + 1)]
    return [list(items[low:high]) for low, high in itertools.pairwise(edges)]


def run_pool(sweep: Sweep, parts: Sequence[Share], stop: StopSignals) -> bool:
    """Trains a sweep in processes of its own, and waits for them.

    A process that dies is started again, and its pack continues from its newest checkpoint in the
    process that takes it.

    Args:
      sweep: planned.
      parts: what each process gets, from `share_out`.
      stop: passed on as SIGTERM, on which the processes save.

    Returns:
      Whether all arms have ended.

    Raises:
      SweepError: too many of them died.
    """
    (sweep.directory / LOGS_FOLDER).mkdir(exist_ok=True)
    pool = _Pool(sweep, parts)
    is_stopping = False
    num_ended = -1
    try:
        while pool.running:
            if stop and not is_stopping:
                is_stopping = True
                pool.terminate()
            pool.restart_dead(stop)
            now_ended = len(sweep.arms) - len(sweep.open_arms())
            if now_ended != num_ended:
                num_ended = now_ended
                log.info("%d of %d arms have ended", num_ended, len(sweep.arms))
            time.sleep(POLL_S)
    finally:
        pool.terminate()
        for process in pool.running.values():
            process.wait()
    return not sweep.open_arms()


class _Pool:
    """The running processes, by number.

    Args:
      sweep: planned.
      parts: what each process gets.
    """

    def __init__(self, sweep: Sweep, parts: Sequence[Share]):
        self._sweep = sweep
        self._parts = parts
        self._num_died = 0
        self.running = {number: self._start(number) for number in range(len(parts))}

    def terminate(self) -> None:
        """Sends SIGTERM to all processes."""
        for process in self.running.values():
            process.terminate()

    def restart_dead(self, stop: StopSignals) -> None:
        """Removes the processes that have ended, and starts those again that a signal has ended.

        A process that ended by itself has logged what is wrong. None is started again after a stop,
        or when all arms have ended.
        """
        for number, process in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[number]
            is_killed = code < 0
            if is_killed and not stop and self._sweep.open_arms():
                self._count_death(number, -code)
                self.running[number] = self._start(number)

    def _count_death(self, number: int, signal: int) -> None:
        self._num_died += 1
        log.warning(
            "process %d of the pool was ended by signal %d; starting it again", number, signal
        )
        if self._num_died > RESTARTS:
            raise SweepError(
                f"{self._num_died} processes of the pool died; "
                f"{self._sweep.directory / LOGS_FOLDER} says more; the same command goes on"
            )

    def _start(self, number: int) -> subprocess.Popen:
        share = self._parts[number]
        log_file = self._sweep.directory / LOGS_FOLDER / f"process{number}.log"
        with log_file.open("a") as output:
            return subprocess.Popen(
                work_command(self._sweep.directory, share.cores),
                env=os.environ | share.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
