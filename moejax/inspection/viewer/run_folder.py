"""Runs that may still be training, below a folder: found again at each poll.

What is wrong with a run is text for whoever looks, not an exception: the others are shown all the
same. The folders may be anyone's: what is read of them are regular files inside them
(`moejax.inspection.runs.paths`). Nothing here needs a server.
"""

import collections
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from moejax.inspection.figures.colors import RunColors
from moejax.inspection.figures.style import BLUE
from moejax.inspection.runs.names import ArmNames
from moejax.inspection.runs.paths import RunPathError, check_file, leads_out
from moejax.inspection.runs.run import Run, open_run
from moejax.inspection.viewer.metrics_reader import MetricsReader
from moejax.training.health import alarms
from moejax.training.health.speed import SPEED, median_speed

CONFIG, METRICS = "config.json", "metrics.jsonl"
MAX_DEPTH = 3  # folders below the one that is viewed: a sweep's runs are in a folder of their own
MAX_BYTES = 2**21  # read at one poll: half a second at most
AGES = ((172_800, 86_400, "days"), (7200, 3600, "h"), (60, 60, "min"))
"""Units of `age`, in seconds: from when on each is used, how long it is, and its name."""


@dataclasses.dataclass(frozen=True)
class RunState:
    """A row of the list of runs.

    Attributes:
      steps: done.
      num_steps: that the run is to do; None if its configuration cannot be read.
      written: when metrics were last written, in seconds since the epoch; None before the first.
      eval_loss: last, in nats per token; None before the first.
      bits_per_byte: last; None before the first.
      tokens_per_s: of the run, as `median_speed` says; None before the first.
      alarms: those that are on, each a rule and its layers.
      problem: why the run cannot be shown in full, and the remedy; empty if it can.
    """

    steps: int
    num_steps: int | None
    written: float | None
    eval_loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None
    alarms: tuple[str, ...]
    problem: str


class LiveRun:
    """A run directory that is polled while the run trains.

    Args:
      workdir: the run directory.
      name: of the run; by default that of its directory.
      color: of its curves.

    Attributes:
      metrics: what was read of `metrics.jsonl`.
      run: its record; None while `config.json` cannot be read.
      num_experts: width of the router; 0 if it is dense or not known.
      version: grows with each poll that found something new.
    """

    def __init__(self, workdir: Path, name: str = "", color: str = BLUE):
        self.workdir = workdir
        self.name = name or workdir.name
        self.color = color
        self.metrics = MetricsReader(workdir / METRICS)
        self.run: Run | None = None
        self.num_experts = 0
        self.version = 0
        self._num_steps: int | None = None
        self._alarms: tuple[str, ...] = ()
        self._problems: dict[str, str] = {}
        self._seen: dict[str, tuple[int, ...]] = {}

    def poll(self, max_bytes: int = MAX_BYTES) -> int:
        """Reads what has changed since the last poll; returns how many bytes of metrics that were.

        Args:
          max_bytes: of metrics to read at most.
        """
        before = dict(self._problems)
        has_new_config = self._read_config()
        has_new_alarms = self._read_alarms()
        num_bytes = self._read_metrics(max_bytes)
        has_new_problem = before != self._problems
        if has_new_config or has_new_alarms or num_bytes or has_new_problem:
            self.version += 1
        return num_bytes

    def _read_metrics(self, max_bytes: int) -> int:
        num_bytes = 0
        problem = ""
        try:
            num_bytes = self.metrics.read_on(max_bytes)
            problem = self.metrics.problem
        except FileNotFoundError:
            pass  # not written yet, or gone, which the missing configuration shows
        except OSError as error:
            problem = f"{error.filename} cannot be read: {error.strerror}"
        except RunPathError as error:
            problem = str(error)
        self._problems[METRICS] = problem
        return num_bytes

    @property
    def has_curves(self) -> bool:
        """Whether anything was read of its metrics, or is still to be read."""
        return bool(self.metrics.series) or self.metrics.is_behind

    @property
    def state(self) -> RunState:
        """The run's row as of the last poll."""
        last = self.metrics.last
        problems = dict.fromkeys(problem for problem in self._problems.values() if problem)
        return RunState(
            steps=self.metrics.last_step,
            num_steps=self._num_steps,
            written=self._written(),
            eval_loss=last("eval/loss"),
            bits_per_byte=last("eval/bits_per_byte"),
            tokens_per_s=median_speed(self.metrics.points(SPEED)[1]),
            alarms=self._alarms,
            problem="; ".join(problems),
        )

    def _read_config(self) -> bool:
        if not self._has_changed(CONFIG):
            return False
        try:
            if os.path.lexists(self.workdir / CONFIG):
                check_file(self.workdir, CONFIG)
            run = open_run(self.workdir)
            num_steps = run.config.get("train", {}).get("num_steps")
            self.num_experts = int(run.num_choices)
            self._num_steps = num_steps if type(num_steps) is int else None
            self.run = run
            self._problems[CONFIG] = ""
        except (ValueError, OSError, RecursionError) as error:
            self.run = None
            is_there = self.workdir.is_dir()
            self._problems[CONFIG] = str(error) if is_there else f"{self.workdir} is gone"
        except (TypeError, OverflowError):
            path = self.workdir / CONFIG
            self._problems[CONFIG] = f"{path} holds numbers of experts that are none; restore it"
        return True

    def _read_alarms(self) -> bool:
        if not self._has_changed(alarms.FILE):
            return False
        try:
            if os.path.lexists(self.workdir / alarms.FILE):
                check_file(self.workdir, alarms.FILE)
            self._alarms = _alarms_in_words(self.workdir)
            self._problems[alarms.FILE] = ""
        except (ValueError, OSError, TypeError, RecursionError) as error:
            self._problems[alarms.FILE] = str(error)
        return True

    def _has_changed(self, name: str) -> bool:
        """Returns whether a file differs from that of the last poll, or is new to it."""
        try:
            info = os.stat(self.workdir / name)
            now: tuple[int, ...] = (info.st_ino, info.st_size, info.st_mtime_ns)
        except OSError:
            now = ()
        before = self._seen.get(name)
        self._seen[name] = now
        return now != before

    def _written(self) -> float | None:
        try:
            return os.stat(self.workdir / METRICS).st_mtime
        except OSError:
            return None


def _alarms_in_words(workdir: Path) -> tuple[str, ...]:
    """Returns each rule that is on, with its layers."""
    layers_by_rule: dict[str, list[int]] = {}
    lines = alarms.read_alarms(workdir)
    for rule, layer in alarms.active(lines):
        layers_by_rule.setdefault(rule, []).append(layer)
    found = []
    for rule, layers in layers_by_rule.items():
        where = alarms.name_layers(sorted(layers))
        found.append(f"{rule} in {where}")
    return tuple(found)


class RunFolder:
    """The runs below a folder, or the one that the folder is.

    Args:
      folder: that is viewed.

    Attributes:
      runs: by path below the folder; a run stays when its directory vanishes.
      links: folders below that are not searched, for they are links that lead out of it.
      is_behind: whether the last poll left something unread.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, LiveRun] = {}
        self.links: list[str] = []
        self.is_behind = False
        self._colors = RunColors()
        self._arms = ArmNames()

    def poll(self, max_bytes: int = MAX_BYTES) -> None:
        """Finds new runs, and reads what the runs have written since the last poll.

        Args:
          max_bytes: of metrics to read at most, of all runs together.
        """
        self._find_runs()
        num_left = max_bytes
        self.is_behind = False
        for run in self.runs.values():
            num_left -= run.poll(max(num_left, 0))
            self.is_behind |= run.metrics.is_behind

    def _find_runs(self) -> None:
        """Adds runs that are new, and names all of them."""
        found, self.links = find_runs(self.folder)
        for path, workdir in found.items():
            if path not in self.runs:
                color = self._colors.color_of(path)
                self.runs[path] = LiveRun(workdir, path, color)
            run = self.runs[path]
            run.name = self._arms.name_of(workdir, path)
        # Runs that share their name are told apart by their paths.
        names = [run.name for run in self.runs.values()]
        num_runs = collections.Counter(names)
        for path, run in self.runs.items():
            name = run.name
            if num_runs[name] > 1:
                run.name = f"{name} ({path})"

    def newest(self, count: int, paths: Iterable[str] | None = None) -> list[str]:
        """Returns the runs that were written last; those without a curve only if all are.

        Args:
          count: how many at most.
          paths: of the runs to choose from; None: all.
        """
        runs = self.runs
        known = list(runs if paths is None else paths)
        with_curves = [path for path in known if runs[path].has_curves]

        def written(path: str) -> float:
            state = runs[path].state
            return state.written or 0

        chosen = with_curves or known
        chosen.sort(key=written, reverse=True)
        return chosen[:count]


def find_runs(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Finds run directories: the folder itself, or those below it, `MAX_DEPTH` deep, sorted.

    A run is a folder with a `config.json` or a `metrics.jsonl`; none is searched for inside another
    or in hidden folders.

    Returns:
      The runs by name, and the paths of links that lead out of the folder and are not followed.
    """
    if _is_run(folder):
        name = folder.resolve().name
        return {name: folder}, []
    links: list[str] = []
    paths = list(_below(folder, folder, MAX_DEPTH, links))
    runs = {}
    for path in sorted(paths):
        name = path.relative_to(folder).as_posix()
        runs[name] = path
    return runs, sorted(links)


def _below(folder: Path, root: Path, depth: int, links: list[str]) -> Iterator[Path]:
    """Yields the runs below a folder; notes in `links` those links that lead out of `root`."""
    folders = []
    try:
        for entry in os.scandir(folder):
            is_hidden = entry.name.startswith(".")
            if not is_hidden and entry.is_dir():
                folders.append(Path(entry.path))
    except OSError:  # not ours to read, or gone meanwhile
        return
    for path in folders:
        if path.is_symlink() and leads_out(path, root):
            links.append(path.relative_to(root).as_posix())
        elif _is_run(path):
            yield path
        elif depth > 1:
            yield from _below(path, root, depth - 1, links)


def _is_run(folder: Path) -> bool:
    return os.path.isfile(folder / CONFIG) or os.path.isfile(folder / METRICS)


def age(written: float | None) -> str:
    """Says roughly how long ago something was written: `just now`, `3 min ago`, `5 days ago`."""
    if written is None:
        return "never"
    seconds = time.time() - written
    for least, size, unit in AGES:
        if seconds >= least:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
