"""A worker process for tests of searches, whose loss is quadratic.

An arm has four evaluations, and saves a checkpoint after each.

    python search_worker.py STORAGE DIR WORKER GRACE_S [hold | meet]

With `hold` it stops in the middle of its first arm until it is ended; with `meet`, until another
worker has begun one.
"""

import hashlib
import json
import signal
import sys
import time
from pathlib import Path

from moejax.sweeps.search.study import open_study
from moejax.sweeps.search.worker import Outcome, work

STEPS = 4


def arm_of(point):
    text = json.dumps(point, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def loss_of(point):
    return (point["optimizer.peak_lr"] - 0.3) ** 2


def note(directory, worker, *words):
    with (directory / f"{worker}.log").open("a") as log:
        log.write(" ".join(map(str, words)) + "\n")


def main(storage, directory, worker, grace_s, manner=""):
    directory = Path(directory)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))

    def is_held():
        has_begun_alone = len(list(directory.glob("*.log"))) < 2
        return manner == "hold" or (manner == "meet" and has_begun_alone)

    def run_arm(point, arm, report):
        checkpoint = directory / arm
        first = int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1
        note(directory, worker, "begins", arm, first)
        for step in range(first, STEPS + 1):
            report(step, step / STEPS, loss_of(point) + 1 / step)
            checkpoint.write_text(str(step))
            if step == 2:
                (directory / f"{worker}.halfway").touch()
                while is_held() and not report.should_stop():
                    time.sleep(0.02)
            if report.should_stop():
                return Outcome("stopped")
        note(directory, worker, "ends", arm, STEPS)
        return Outcome("done", loss_of(point))

    work(
        open_study(storage, "s"),
        run_arm,
        arm_of=arm_of,
        worker_id=worker,
        should_stop=lambda: bool(stopped),
        beat_s=min(1.0, float(grace_s) / 10),
        grace_s=float(grace_s),
        poll_s=0.1,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
