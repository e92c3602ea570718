"""Runs that may still be training: found again at each look, and read only where they grew.

`metrics.jsonl` of a long run has millions of lines, so a look reads from where the last one ended,
and no more bytes than it is allowed; the rest waits for the next look. Nothing here needs a server.
What is wrong with a run is text for whoever looks, not an exception: the others are shown all the
same. The folders may be anyone's: what is read of them are regular files inside of them
(`moejax.inspection.runs.paths`).
"""

import collections
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from moejax.inspection.figures.colors import RunColors
from moejax.inspection.figures.style import BLUE
from moejax.inspection.runs.names import ArmNames
from moejax.inspection.runs.paths import RunPathError, check_file, leads_out, open_file
from moejax.inspection.runs.run import Run, Series, add_values, open_run
from moejax.training.health import alarms
from moejax.training.health.speed import SPEED, median_speed
from moejax.training.run_directory.line_file import decode_line

CONFIG, METRICS = "config.json", "metrics.jsonl"
MAX_DEPTH = 3  # folders below the one that is viewed: a sweep's runs lie in a folder of their own
MAX_BYTES = 2**21  # read at one look: half a second at most
MAX_LINE = 2**20  # bytes: what is longer is no line of metrics
TAIL_BYTES = 128  # compared to tell a file that grew from one that was written anew


class MetricsReader:
    """The lines of a `metrics.jsonl`, read as they are appended.

    Args:
      path: of the file.

    Attributes:
      series: steps and values of each metric; see `Run.series` for steps that come again.
      problem: the first damaged line and the remedy; empty if there is none.
      is_behind: whether the last look left out some of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.series: Series = {}
        self.problem = ""
        self.is_behind = False
        self._offset = 0  # behind the last whole line that was read
        self._num_lines = 0
        self._tail = b""  # the end of what was read
        self._seen: tuple[int, ...] = ()

    def read_on(self, max_bytes: int) -> int:
        """Reads what was appended; all of it again if a resumed run has written the file anew.

        A last line without its end is left for the next look.

        Args:
          max_bytes: to read at most.

        Returns:
          How many bytes were read; 0 if nothing has changed.

        Raises:
          OSError: the file cannot be read.
          RunPathError: it is no regular file of the run.
        """
        info = os.stat(self._path)
        now = (info.st_ino, info.st_size, info.st_mtime_ns)
        if now == self._seen and not self.is_behind:
            return 0
        with open_file(self._path.parent, self._path.name) as file:
            if self._seen and (info.st_ino != self._seen[0] or not self._is_continued(file)):
                self._forget()
            file.seek(self._offset)
            block = file.read(max_bytes)
            self.is_behind = len(block) == max_bytes and len(file.read(1)) == 1
        end = block.rfind(b"\n") + 1
        if self.is_behind and not end and len(block) >= MAX_LINE:
            self._note(f"has no end within {len(block):,} bytes")
            self.is_behind = False
        self._seen = now
        for line in block[:end].splitlines():
            self._num_lines += 1
            self._add(line)
        self._offset += end
        self._tail = (self._tail + block[:end])[-TAIL_BYTES:]
        return len(block)

    def last(self, key: str) -> float | None:
        """The newest value of a metric; None if no line has it."""
        _, values = self.series.get(key, ((), ()))
        return float(values[-1]) if values else None

    def points(self, key: str) -> tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]:
        """Steps and values of a metric; both empty if no line has it."""
        steps, values = self.series.get(key, ((), ()))
        return np.array(steps, np.int64), np.array(values, np.float64)

    @property
    def last_step(self) -> int:
        """The last step with a metric; 0 before the first."""
        return max((steps[-1] for steps, _ in self.series.values()), default=0)

    def _is_continued(self, file: Any) -> bool:
        """Whether the file still ends, up to where it was read, in what was read."""
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _add(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            values = decode_line(line)
            if values is None:
                raise ValueError("no integer `step`")
            add_values(self.series, values, self._path)
        except (ValueError, RecursionError) as error:
            self._note(f"is damaged ({error})")

    def _note(self, what: str) -> None:
        self.problem = (
            self.problem or f"{self._path}: line {max(self._num_lines, 1)} {what}; delete that line"
        )


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
    """A run directory that is looked at again and again.

    Args:
      workdir: the run directory.
      name: of the run; by default that of its directory.
      color: of its curves.

    Attributes:
      metrics: what was read of `metrics.jsonl`.
      run: its record; None while `config.json` cannot be read.
      num_experts: width of the router; 0 if it is dense or not known.
      version: grows with each look that saw something new.
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

    def look(self, max_bytes: int = MAX_BYTES) -> int:
        """Reads what has changed since the last look; returns how many bytes of metrics that were."""
        before = dict(self._problems)
        is_new = self._look_at_config() | self._look_at_alarms()
        num_bytes = 0
        try:
            num_bytes = self.metrics.read_on(max_bytes)
            self._problems[METRICS] = self.metrics.problem
        except FileNotFoundError:
            self._problems[METRICS] = (
                ""  # not written yet, or gone, which the missing configuration tells
            )
        except OSError as error:
            self._problems[METRICS] = f"{error.filename} cannot be read: {error.strerror}"
        except RunPathError as error:
            self._problems[METRICS] = str(error)
        if is_new or num_bytes or before != self._problems:
            self.version += 1
        return num_bytes

    @property
    def has_curves(self) -> bool:
        """Whether anything was read of its metrics, or is still to be read."""
        return bool(self.metrics.series) or self.metrics.is_behind

    @property
    def state(self) -> RunState:
        """As of the last look."""
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

    def _look_at_config(self) -> bool:
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
            self._problems[CONFIG] = (
                str(error) if self.workdir.is_dir() else f"{self.workdir} is gone"
            )
        except (TypeError, OverflowError):
            self._problems[CONFIG] = (
                f"{self.workdir / CONFIG} holds numbers of experts that are none; restore it"
            )
        return True

    def _look_at_alarms(self) -> bool:
        if not self._has_changed(alarms.FILE):
            return False
        try:
            if os.path.lexists(self.workdir / alarms.FILE):
                check_file(self.workdir, alarms.FILE)
            places = alarms.active(alarms.read_alarms(self.workdir))
            by_rule = {
                rule: [layer for other, layer in places if other == rule] for rule, _ in places
            }
            self._alarms = tuple(
                f"{rule} in {alarms.name_layers(sorted(at))}" for rule, at in by_rule.items()
            )
            self._problems[alarms.FILE] = ""
        except (ValueError, OSError, TypeError, RecursionError) as error:
            self._problems[alarms.FILE] = str(error)
        return True

    def _has_changed(self, name: str) -> bool:
        """Whether a file differs from the last look's, or was not looked for before."""
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


class RunFolder:
    """The runs below a folder, or the one that the folder is.

    Args:
      folder: that is viewed.

    Attributes:
      runs: by path below the folder; a run stays when its directory vanishes.
      links: folders below that are not looked into, for they are links that lead out of it.
      is_behind: whether the last look left something unread.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs: dict[str, LiveRun] = {}
        self.links: list[str] = []
        self.is_behind = False
        self._colors = RunColors()
        self._arms = ArmNames()

    def look(self, max_bytes: int = MAX_BYTES) -> None:
        """Finds new runs, and reads what the runs have written since the last look.

        Args:
          max_bytes: of metrics to read at most, of all runs together.
        """
        found, self.links = find_runs(self.folder)
        for path, workdir in found.items():
            if path not in self.runs:
                self.runs[path] = LiveRun(workdir, path, self._colors.color_of(path))
            self.runs[path].name = self._arms.name_of(workdir, path)
        given = collections.Counter(run.name for run in self.runs.values())
        for path, run in self.runs.items():
            if given[run.name] > 1:
                run.name = f"{run.name} ({path})"
        for run in self.runs.values():
            max_bytes -= run.look(max(max_bytes, 0))
        self.is_behind = any(run.metrics.is_behind for run in self.runs.values())

    def newest(self, count: int, paths: Iterable[str] | None = None) -> list[str]:
        """Of the runs, or of some of them, those that were written last; without a curve only if all are."""
        known = list(self.runs if paths is None else paths)
        with_curves = [path for path in known if self.runs[path].has_curves]
        newest_first = sorted(
            with_curves or known, key=lambda path: self.runs[path].state.written or 0, reverse=True
        )
        return newest_first[:count]


def find_runs(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Run directories by name: the folder itself, or those below it, `MAX_DEPTH` deep, sorted.

    A run is a folder with a `config.json` or a `metrics.jsonl`; none is looked for inside of one or
    in hidden folders.

    Returns:
      The runs, and the paths of links that lead out of the folder and are not followed.
    """
    if _is_run(folder):
        return {folder.resolve().name: folder}, []
    links: list[str] = []
    runs = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(_below(folder, folder, MAX_DEPTH, links))
    }
    return runs, sorted(links)


def _below(folder: Path, root: Path, depth: int, links: list[str]) -> Iterator[Path]:
    """The runs below a folder; notes in `links` those that lead out of `root`."""
    try:
        folders = [
            Path(entry.path)
            for entry in os.scandir(folder)
            if entry.name[0] != "." and entry.is_dir()
        ]
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
    """How long ago, coarsely: `just now`, `3 min ago`, `2 h ago`, `5 days ago`."""
    if written is None:
        return "never"
    seconds = time.time() - written
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"
