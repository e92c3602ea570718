"""The metrics of a run that may still be training, read only where the file grew.

`metrics.jsonl` of a long run has millions of lines, so each poll reads from where the last one
ended, and no more bytes than it is allowed; the rest waits for the next poll.
"""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from moejax.inspection.runs.errors import RunError
from moejax.inspection.runs.metrics_file import Series, add_values
from moejax.inspection.runs.paths import open_file
from moejax.training.run_directory.line_file import Line, read_lines

MAX_LINE = 2**20  # bytes: what is longer is no line of metrics
TAIL_BYTES = 128  # compared to tell a file that grew from one that was written again


class MetricsReader:
    """The lines of a `metrics.jsonl`, read as they are appended.

    Args:
      path: of the file.

    Attributes:
      series: steps and values of each metric; see `Run.series` for steps that come again.
      problem: the first damaged line and the remedy; empty if there is none.
      is_behind: whether the last poll left out some of the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.series: Series = {}
        self.problem = ""
        self.is_behind = False
        self._offset = 0  # after the last complete line that was read
        self._num_lines = 0
        self._tail = b""  # the end of what was read
        self._seen: tuple[int, ...] = ()

    def read_on(self, max_bytes: int) -> int:
        """Reads what was appended; all of it again if a resumed run has written the file again.

        A last line that is not complete is left for the next poll, see `read_lines`.

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
            if not self._is_continued(file, info.st_ino):
                self._forget()
            file.seek(self._offset)
            block = file.read(max_bytes)
            self.is_behind = len(block) == max_bytes and len(file.read(1)) == 1
        num_bytes = len(block)
        end = self._add_lines(block)
        if self.is_behind and not end and num_bytes >= MAX_LINE:
            self._note(1, f"has no end within {num_bytes:,} bytes")
            self.is_behind = False
        self._seen = now
        self._offset += end
        read = self._tail + block[:end]
        self._tail = read[-TAIL_BYTES:]
        return num_bytes

    def _add_lines(self, block: bytes) -> int:
        """Reads what was appended; returns the end of the last line that is complete."""
        num_lines = end = 0
        for line in read_lines(io.BytesIO(block)):
            self._add(line)
            num_lines, end = line.number, line.end
        self._num_lines += num_lines
        return end

    def last(self, key: str) -> float | None:
        """Returns the newest value of a metric; None if no line has it."""
        _, values = self.series.get(key, ((), ()))
        return float(values[-1]) if values else None

    def points(self, key: str) -> tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]:
        """Returns steps and values of a metric; both empty if no line has it."""
        steps, values = self.series.get(key, ((), ()))
        return np.array(steps, np.int64), np.array(values, np.float64)

    @property
    def last_step(self) -> int:
        """The last step with a metric; 0 before the first."""
        return max((steps[-1] for steps, _ in self.series.values()), default=0)

    def _is_continued(self, file: Any, inode: int) -> bool:
        """Returns whether the file, up to where it was read, still ends in what was read."""
        if not self._seen:
            return True
        seen_inode, _, _ = self._seen
        if inode != seen_inode:
            return False
        num_bytes = len(self._tail)
        file.seek(self._offset - num_bytes)
        return file.read(num_bytes) == self._tail

    def _add(self, line: Line) -> None:
        fault = line.fault
        if line.values is not None:
            try:
                add_values(self.series, line.values, self._path)
            except RunError as error:
                fault = str(error)
        if fault:
            self._note(line.number, f"is damaged ({fault})")

    def _note(self, number: int, what: str) -> None:
        """Keeps what is wrong with the first damaged line.

        Args:
          number: of the line, among those after the last that was read.
          what: is wrong.
        """
        if not self.problem:
            line = self._num_lines + number
            self.problem = f"{self._path}: line {line} {what}; delete that line"
