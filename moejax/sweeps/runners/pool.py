"""A pool of processes on this machine, each of which trains packs on devices or cores of its own."""

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

RESTARTS = 3  # of processes that died, in all
POLL_S = 0.5
LOGS_FOLDER = "logs"

STOPPED = os.EX_TEMPFAIL
"""The exit code of a process that was told to stop while arms were open."""

log = logging.getLogger("moejax")


def work_command(directory: Path, cores: Sequence[int] = ()) -> list[str]:
    """What a process of a pool, or a job of a cluster, runs."""
    command = [sys.executable, "-m", "moejax", "sweep", "work", f"--dir={directory}"]
    return [*command, f"--cores={','.join(map(str, cores))}"] if cores else command


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process of a pool trains on: GPUs, as `CUDA_VISIBLE_DEVICES` names them, or else cores."""

    cores: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """What the process finds set otherwise than this one does."""
        return (
            {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {"JAX_PLATFORMS": "cpu"}
        )


def share_out(processes: int, gpus: int) -> list[Share]:
    """As even shares of this machine as there can be, each of one GPU or core at least.

    Args:
      processes: how many.
      gpus: to share out, of those that this process may use; 0: its cores are.

    Raises:
      SweepError: more processes than there is to share out, or none; more GPUs than there
        are to be seen.
    """
    if gpus < 0:
        raise SweepError(f"--gpus={gpus} must be at least 0; 0 trains on CPU")
    if gpus:
        return [Share(gpus=tuple(part)) for part in shares(_visible_gpus(gpus), processes)]
    return [Share(cores=tuple(part)) for part in shares(usable_cores(), processes)]


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may use; all of the machine where it cannot be asked (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _visible_gpus(number: int) -> list[str]:
    """So many of the GPUs that this process may use: numbers, or whatever its environment calls them."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return [str(gpu) for gpu in range(number)]
    known = list(
        itertools.takewhile(lambda gpu: gpu not in ("", "-1"), map(str.strip, variable.split(",")))
    )
    if number > len(known):
        raise SweepError(
            f"--gpus={number} must be at most {len(known)}, as CUDA_VISIBLE_DEVICES={variable} has no more"
        )
    return known[:number]


def shares(items: Sequence[Any], number: int) -> list[list[Any]]:
    """As even parts of what there is, each of one at least."""
    if not 1 <= number <= len(items):
        raise SweepError(
            f"--processes={number} must be at most {len(items)}, one for each core or GPU, and at least 1"
        )
    edges = [i * len(items) // number for i in range(number + 1)]
    return [list(items[low:high]) for low, high in itertools.pairwise(edges)]


def run_pool(sweep: Sweep, parts: Sequence[Share], stop: StopSignals) -> bool:
    """Trains a sweep in processes of its own, and waits for them.

    One that dies is started again, and its pack continues from its newest checkpoint in whichever
    process takes it.

    Args:
      sweep: planned.
      parts: what each process gets, from `share_out`.
      stop: passed on as SIGTERM, which saves.

    Returns:
      Whether all arms have ended.

    Raises:
      SweepError: too many of them died.
    """
    (sweep.directory / LOGS_FOLDER).mkdir(exist_ok=True)
    running = {number: _start(sweep, number, part) for number, part in enumerate(parts)}
    died, told, ended = 0, False, -1
    try:
        while running:
            if stop and not told:
                told = True
                for process in running.values():
                    process.terminate()
            for number, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[number]
                if (
                    code < 0 and not stop and sweep.open_arms()
                ):  # by a signal; others have said what is wrong
                    died += 1
                    log.warning(
                        "process %d of the pool was ended by signal %d; starting it again",
                        number,
                        -code,
                    )
                    if died > RESTARTS:
                        raise SweepError(
                            f"{died} processes of the pool died; {sweep.directory / LOGS_FOLDER} says more; the same "
                            "command goes on"
                        )
                    running[number] = _start(sweep, number, parts[number])
            now_ended = len(sweep.arms) - len(sweep.open_arms())
            if now_ended != ended:
                ended = now_ended
                log.info("%d of %d arms have ended", ended, len(sweep.arms))
            time.sleep(POLL_S)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return not sweep.open_arms()


def _start(sweep: Sweep, number: int, share: Share) -> subprocess.Popen:
    with (sweep.directory / LOGS_FOLDER / f"process{number}.log").open("a") as output:
        return subprocess.Popen(
            work_command(sweep.directory, share.cores),
            env=os.environ | share.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
