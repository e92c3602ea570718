"""Shows a long loop's progress on standard error: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Without a terminal, at most one line in that many seconds."""

log = logging.getLogger("moejax")


class StepProgress:
    """Shows steps done, loss, tokens per second and the time left.

    Args:
      num_steps: the run's length.
      start_step: steps done before.
      is_shown: whether this process shows it.
    """

    def __init__(self, num_steps: int, start_step: int, is_shown: bool = True):
        self._num_steps = num_steps
        self._is_shown = is_shown
        self._bar: Progress | None = None
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0
        if is_shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                "train", total=num_steps, completed=start_step, loss="-", rate="-"
            )

    def __enter__(self) -> "StepProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        """Shows a finished step."""
        if self._bar:
            self._bar.update(
                self._task, completed=step, loss=f"{loss:.3f}", rate=f"{tokens_per_s:,.0f}"
            )
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
        is_early = now - self._last_line < PLAIN_SECONDS and step < self._num_steps
        if is_early or not self._is_shown:
            return
        self._last_line = now
        log.info(
            "step %d/%d  loss %.3f  %s tokens/s%s",
            step,
            self._num_steps,
            loss,
            f"{tokens_per_s:,.0f}",
            self._time_left(step, now),
        )

    def _time_left(self, step: int, now: float) -> str:
        """Formats the time left, by the steps after the first; empty at the first.

        What came before the first step, such as compiling, comes only once.
        """
        if self._first is None or step == self._first[0]:
            return ""
        first_step, since = self._first
        seconds_per_step = (now - since) / (step - first_step)
        seconds = int(seconds_per_step * (self._num_steps - step))
        return f"  {seconds // 60}:{seconds % 60:02d} left"
