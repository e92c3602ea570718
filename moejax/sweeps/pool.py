"""A pool of processes on this machine, each of which trains packs on devices or cores of its own."""

import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moejax.sweeps.arms import SweepError
from moejax.sweeps.directory import Sweep
from moejax.training.signals import StopSignals

RESTARTS = 3  # of processes that died, in all
POLL_S = 0.5
LOGS_FOLDER = "logs"

log = logging.getLogger("moejax")


def work_command(directory: Path, cores: Sequence[int] = ()) -> list[str]:
    """What a process of a pool, or a job of a cluster, runs."""
    command = [sys.executable, "-m", "moejax", "sweep", "work", f"--dir={directory}"]
    return [*command, f"--cores={','.join(map(str, cores))}"] if cores else command


def shares(items: Sequence[int], number: int) -> list[list[int]]:
    """As even parts of what there is, each of one at least."""
    if number > len(items):
        raise SweepError(f"--processes={number} must be at most {len(items)}, one for each core or GPU")
    edges = [i * len(items) // number for i in range(number + 1)]
    return [list(items[low:high]) for low, high in itertools.pairwise(edges)]


def run_pool(sweep: Sweep, processes: int, gpus: Sequence[int], stop: StopSignals) -> bool:
    """Trains a sweep in processes of its own, and waits for them.

    One that dies is started again, and its pack continues from its newest checkpoint in whichever process takes it.

    Args:
      sweep: planned.
      processes: how many.
      gpus: to share out; empty: the cores of this machine are.
      stop: passed on as SIGTERM, which saves.

    Returns:
      Whether all arms have ended.

    Raises:
      SweepError: more processes than there is to share out, or too many of them died.
    """
    parts = shares(gpus or sorted(os.sched_getaffinity(0)), processes)
    (sweep.directory / LOGS_FOLDER).mkdir(exist_ok=True)
    running = {number: _start(sweep, number, part, is_gpu=bool(gpus)) for number, part in enumerate(parts)}
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
                if code < 0 and not stop and sweep.open_arms():  # by a signal; others have said what is wrong
                    died += 1
                    log.warning("process %d of the pool was ended by signal %d; starting it again", number, -code)
                    if died > RESTARTS:
                        raise SweepError(
                            f"{died} processes of the pool died; {sweep.directory / LOGS_FOLDER} says more; the same "
                            "command goes on"
                        )
                    running[number] = _start(sweep, number, parts[number], is_gpu=bool(gpus))
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


def _start(sweep: Sweep, number: int, part: Sequence[int], *, is_gpu: bool) -> subprocess.Popen:
    names = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, part))} if is_gpu else {}
    with (sweep.directory / LOGS_FOLDER / f"process{number}.log").open("a") as output:
        return subprocess.Popen(
            work_command(sweep.directory, () if is_gpu else part),
            env=os.environ | names,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
