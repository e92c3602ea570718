"""Tries moejax out for an hour.

Runs are killed, bits are flipped, two processes write one run, commands have mistakes, and random
configurations are compared on eight devices and on one.

  python tests/soak/run.py --minutes=60

Each trial follows from its number, so that one that went wrong can be repeated: `--only=flips
--first=17 --trials=1`. The exit code is 1 if anything was wrong.
"""

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of trial.

    Attributes:
      what: what is tried, in words.
      trials: of a full soak.
      short: trials of the short form.
      each: how often it is tried in one trial.
    """

    what: str
    trials: int
    short: int
    each: int = 1


KINDS = {
    "kills": Kind("kills of a training run", trials=50, short=1, each=4),
    "flips": Kind("flipped bits in files of a run", trials=300, short=5),
    "inputs": Kind("mistakes on the command line", trials=1000, short=60),
    "writers": Kind("two trainings in one folder", trials=50, short=1),
    "partners": Kind("deaths of one of two processes", trials=20, short=1),
    "configurations": Kind("random configurations, eight devices against one", trials=20, short=1),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One trial: its kind and its number."""

    kind: str
    seed: int


def main(argv: list[str] | None = None) -> int:
    """Runs trials until all are done or the time is over; prints the table."""
    options = _options(argv)
    with tempfile.TemporaryDirectory(prefix="moejax-soak-") as folder:
        tasks = list(_tasks(options))
        wrong, done = _run_all(tasks, Path(folder), options)
    _print(done, wrong, len(tasks))
    return 1 if wrong or not done else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins after this")
    parser.add_argument(
        "--only", default="", help=f"kinds, separated by commas, of {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--trials", type=int, default=0, help="of each kind; default as many as a full soak has"
    )
    parser.add_argument("--short", action="store_true", help="a few trials of each kind")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first trial of each kind"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="trials at the same time"
    )
    options = parser.parse_args(argv)
    options.kinds = options.only.split(",") if options.only else list(KINDS)
    unknown = [kind for kind in options.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"--only={options.only}: {unknown[0]} must be one of {', '.join(KINDS)}")
    return options


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Yields the trials of all kinds, mixed evenly.

    Whenever the time is over, each kind has had its share.
    """
    places = []
    for kind in options.kinds:
        usual = KINDS[kind].short if options.short else KINDS[kind].trials
        total = options.trials or usual
        places += [(number / total, kind, number) for number in range(total)]
    for _, kind, number in sorted(places):
        yield Task(kind, options.first + number)


def _run_all(
    tasks: list[Task], folder: Path, options: argparse.Namespace
) -> tuple[list[tuple[Task, str]], dict[str, int]]:
    """Runs trials; returns what was wrong, and how many trials of each kind were done."""
    from soak.field import make_field

    deadline = time.monotonic() + 60 * options.minutes
    print("training the undisturbed runs", file=sys.stderr)
    make_field(folder)
    context = multiprocessing.get_context("spawn")
    todo, results = context.Queue(), context.Queue()
    for task in tasks:
        todo.put(task)
    workers = [
        context.Process(target=_work, args=(todo, results, folder, deadline))
        for _ in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    wrong: list[tuple[Task, str]] = []
    done: dict[str, int] = dict.fromkeys(options.kinds, 0)
    while any(worker.is_alive() for worker in workers) or not results.empty():
        try:
            task, problem = results.get(timeout=1.0)
        except queue.Empty:
            continue
        done[task.kind] += 1
        if problem:
            wrong.append((task, problem))
            print(f"WRONG {task.kind} {task.seed}: {problem}", file=sys.stderr)
        total = sum(done.values())
        if total % 50 == 0:
            print(f"{total} of {len(tasks)} trials done, {len(wrong)} wrong", file=sys.stderr)
    crashed = [worker.exitcode for worker in workers if worker.exitcode]
    if crashed:
        wrong.append((Task("worker", 0), f"a worker ended with exit code {crashed[0]}"))
    for worker in workers:
        worker.join()
    return wrong, done


def _work(todo: Any, results: Any, folder: Path, deadline: float) -> None:
    """Takes trials until none is left or the time is over."""
    prepare_process(folder)
    from soak.field import Field

    field = Field(folder)
    while time.monotonic() < deadline:
        try:
            task = todo.get(timeout=1.0)
        except queue.Empty:
            break
        results.put((task, run_trial(task.kind, field, task.seed)))
    todo.cancel_join_thread()


def prepare_process(folder: Path) -> None:
    """Lets this process find the modules, and what is compiled already."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.chdir(TESTS.parent)
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run_trial(kind: str, field: Any, seed: int) -> str:
    """Runs a trial; returns what was wrong, which may be an exception."""
    try:
        return importlib.import_module(f"soak.{kind}").trial(field, seed)
    except Exception as error:
        return f"the trial itself failed: {type(error).__name__}: {error}"


def _print(done: dict[str, int], wrong: list[tuple[Task, str]], total: int) -> None:
    print(f"{'what':<55}{'tried':>8}{'wrong':>8}")
    for name, num_trials in done.items():
        kind = KINDS[name]
        num_tried = num_trials * kind.each
        num_wrong = sum(task.kind == name for task, _ in wrong)
        print(f"{kind.what:<55}{num_tried:>8}{num_wrong:>8}")
    num_done = sum(done.values())
    if num_done < total:
        print(f"The time was over after {num_done} of {total} trials.")


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    sys.exit(main())
