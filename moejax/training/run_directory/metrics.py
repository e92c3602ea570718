"""Metrics leave the device one logging interval late and go to files, one JSON object per line.

`Recorder.add` keeps references to a step's outputs; at the end of an interval it fetches those of
the previous interval, which have long been computed, so that reading never makes the device wait.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moejax.locks import check_held
from moejax.planning.devices import peak_memory_bytes
from moejax.training.health.alarm_rules import Alarm
from moejax.training.health.alarms import AlarmLog
from moejax.training.health.speed import ARMS, MEMORY, MFU, SECONDS, SPEED
from moejax.training.health.telemetry import RoutingInterval, summarize_routing
from moejax.training.run_directory.intervals import TimedOutput, pack_steps
from moejax.training.run_directory.line_file import LineFile
from moejax.training.run_directory.routing_log import RoutingLog
from moejax.training.step import StepOutput

SUMMED = ("num_targets",)
"""Scalars of which an interval has the sum; of all others but those in `LAST` it has the mean."""

LAST = ("skipped_steps", "learning_rate")
"""Scalars of which an interval has the last value."""


class MetricsFile:
    """Writes `workdir/metrics.jsonl` and the same scalars for TensorBoard.

    Args:
      workdir: the run directory.
      after_step: lines beyond this step are dropped: a resumed run writes them again.
      tokens: targets trained on up to that step, from its checkpoint; None takes the file's number.
      noted: `state` at that step, from its checkpoint.

    Attributes:
      path: of the file of scalars.
      tokens: targets trained on so far.

    Raises:
      LineFileError: the file cannot be read or written.
    """

    def __init__(
        self,
        workdir: str | Path,
        after_step: int,
        tokens: int | None = None,
        noted: Mapping[str, Any] | None = None,
    ):
        from tensorboardX import SummaryWriter

        self.path = Path(workdir) / "metrics.jsonl"
        self._file = LineFile(self.path, after_step, noted, _is_metrics)
        self.tokens = self._last_tokens() if tokens is None else tokens
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=after_step + 1)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint notes of the file."""
        return self._file.state

    def is_evaluated(self, step: int) -> bool:
        """Whether the file held an evaluation of a step when it was opened."""
        return any(line["step"] == step and "eval/loss" in line for line in self._file.lines)

    def _last_tokens(self) -> int:
        """Returns the number of tokens in the last line that has one."""
        for line in reversed(self._file.lines):
            if "tokens" in line:
                return int(line["tokens"])
        return 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line; values that are not finite are left out, since JSON has no NaN."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        line = {"step": step, **finite}
        self._file.append(line)
        for key, value in finite.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_metrics(line: Mapping[str, Any]) -> bool:
    return all(isinstance(value, int | float) for value in line.values())


@dataclasses.dataclass(frozen=True)
class FinishedStep:
    """The values that are read of every step, once it is done."""

    step: int
    skipped_in_row: int
    loss: float


class Recorder:
    """Collects step outputs, writes each logging interval one interval late, and keeps time.

    Args:
      metrics: where scalars go; None in a process that writes nothing.
      routing: where per-expert arrays go; None there, and for a dense model.
      start_step: steps done before this process began.
      alarms: what watches the routing; None where `routing` is.
      num_arms: of the pack, to whose steps an interval's seconds belong. It is logged with each
        interval, for an arm may continue alone.
      utilisation: model FLOPs utilisation at one token per second; None where it is not known.
      carried: the last of the steps done before, of an interval that a stop has cut short.

    Attributes:
      last: the last step that was added.
      rate: tokens per second of it.
      rates: tokens per second of each interval.
      stopping: alarms that are to stop the run, once there are any.
      cut: `notes` at the beginning of the last interval that `flush` wrote, with the steps of that
        interval.
    """

    def __init__(
        self,
        metrics: MetricsFile | None,
        routing: RoutingLog | None,
        start_step: int,
        alarms: AlarmLog | None = None,
        *,
        num_arms: int = 1,
        utilisation: float | None = None,
        carried: Sequence[TimedOutput] = (),
    ):
        self.metrics = metrics
        self.routing = routing
        self.alarms = alarms
        self._num_arms = num_arms
        self._utilisation = utilisation
        self.stopping: list[Alarm] = []
        self.rate = 0.0
        self.rates: list[float] = []
        self._written_step = start_step - len(carried)
        self.last = FinishedStep(start_step, 0, math.nan)
        self._current: list[TimedOutput] = list(carried)
        self._waiting: list[TimedOutput] = []
        self.cut: dict[str, Any] = {}
        self.resume()

    def resume(self) -> None:
        """Restarts the clock after work that is not training."""
        self._since = time.perf_counter()

    def add(self, output: StepOutput) -> FinishedStep:
        """Takes the output of a step, waits until it is done, and times it."""
        wanted = ("loss/lm", "num_targets", "skipped_in_row")
        scalars = jax.device_get({key: output.scalars[key] for key in wanted})
        now = time.perf_counter()
        seconds = now - self._since
        self._since = now
        self._current.append(TimedOutput(output, seconds))
        self.rate = float(scalars["num_targets"]) / seconds
        self.last = FinishedStep(
            step=self.last.step + 1,
            skipped_in_row=int(scalars["skipped_in_row"]),
            loss=float(scalars["loss/lm"]),
        )
        return self.last

    def end_interval(self) -> None:
        """Writes the interval before this one, whose values have long been computed."""
        previous = self._waiting
        self._waiting = self._current
        self._current = []
        self._write(previous)

    def flush(self) -> None:
        """Writes everything, waiting for it: before evaluation, saving and the end."""
        self.end_interval()
        self.cut = {}
        if self.metrics is not None and self._waiting:
            self.cut = self.notes() | {"interval": pack_steps(self._waiting)}
        self.end_interval()

    def notes(self) -> dict[str, Any]:
        """Returns what a run that continues from here must know of what was written, as JSON."""
        notes: dict[str, Any] = {}
        if self.metrics is not None:
            notes |= {"tokens": self.metrics.tokens, "metrics": self.metrics.state}
        if self.alarms is not None:
            notes |= {"alarms": self.alarms.counts, "alarms_file": self.alarms.state}
        if self.routing is not None:
            notes |= {"routing": self.routing.num_entries}
        return notes

    def _write(self, interval: Sequence[TimedOutput]) -> None:
        """Writes the scalars of an interval and its routing, and checks the alarms."""
        if not interval or self.metrics is None:
            return
        check_held(self.metrics.path)
        outputs: list[StepOutput] = jax.device_get([step.output for step in interval])
        self._written_step += len(outputs)
        values = summarize([_to_floats(output.scalars) for output in outputs])
        del values["skipped_in_row"]
        num_targets = values.pop("num_targets")
        self.metrics.tokens += int(num_targets)
        values["tokens"] = self.metrics.tokens
        values |= self._speed(num_targets, sum(step.seconds for step in interval))
        routing = summarize_routing(outputs)
        if routing is not None:
            values["moe/dead_experts"] = float((routing.counts_NE == 0).sum())
            self._write_routing(routing)
        self.metrics.write(self._written_step, values)

    def _speed(self, num_targets: float, seconds: float) -> dict[str, float]:
        """Returns the metrics of an interval's speed and memory."""
        rate = num_targets / seconds
        self.rates.append(rate)
        values = {SECONDS: seconds, SPEED: rate}
        if self._utilisation is not None:
            values[MFU] = rate * self._utilisation
        peak_bytes = peak_memory_bytes()
        if peak_bytes is not None:
            values[MEMORY] = peak_bytes
        if self._num_arms > 1:
            values[ARMS] = self._num_arms
        return values

    def _write_routing(self, routing: RoutingInterval) -> None:
        if self.routing is not None:
            self.routing.append(self._written_step, **routing.arrays())
        if self.alarms is not None:
            self.stopping = self.alarms.update(self._written_step, routing) or self.stopping


def _to_floats(scalars: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in scalars.items()}


def summarize(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns one value per key for an interval: the sum, the last value, or the mean.

    A mean is over the steps in which the value was finite.
    """
    values: dict[str, float] = {}
    for key in steps[0]:
        column = [step[key] for step in steps]
        if key in LAST:
            values[key] = column[-1]
        elif key in SUMMED:
            values[key] = sum(column)
        else:
            values[key] = _finite_mean(column)
    return values


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
