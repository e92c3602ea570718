"""The files that a run writes as it trains: metrics, routing, alarms, evaluations, checkpoints.

A run writes the same files alone and in a pack.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from moejax.config import Config
from moejax.locks import check_held
from moejax.planning.devices import utilisation_of_token
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.evaluation import Evaluation
from moejax.training.health.alarms import AlarmLog
from moejax.training.health.telemetry import LAYER_METRICS
from moejax.training.multihost.processes import is_first
from moejax.training.run_directory.evaluation_log import EvaluationLog
from moejax.training.run_directory.intervals import TimedOutput, unpack_steps
from moejax.training.run_directory.layout import recorded_corpus
from moejax.training.run_directory.metrics import MetricsFile, Recorder
from moejax.training.run_directory.routing_log import RoutingLog
from moejax.training.state import TrainState

log = logging.getLogger("moejax")


class RunFiles:
    """The open files of a run. What they hold of steps after `start_step` is dropped.

    Process 0 alone writes them.

    Args:
      workdir: the run directory.
      config: of the run.
      checkpoints: of the run.
      start_step: steps done.
      notes: of the checkpoint of `start_step`, or what a run that begins there knows of them.
      name: of the run, in the log; "" where there is only one.
      num_arms: among which the time of a step is shared out.

    Attributes:
      recorder: takes the outputs of steps.
      is_evaluated: whether an evaluation of `start_step` is written; False in other processes.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        checkpoints: Checkpoints,
        start_step: int,
        notes: Mapping[str, Any],
        *,
        name: str = "",
        num_arms: int = 1,
    ):
        self._config = config
        self._checkpoints = checkpoints
        self._corpus: str | None = None
        self._metrics: MetricsFile | None = None
        self._evaluations: EvaluationLog | None = None
        self._alarms: AlarmLog | None = None
        self._routing: RoutingLog | None = None
        carried: list[TimedOutput] = []
        # If one file cannot be opened the others are closed: they write in threads.
        with ExitStack() as opened:
            if is_first():
                carried = _carried(notes)
                self._open(workdir, start_step, len(carried), notes, name, opened)
                self._corpus = recorded_corpus(workdir)
            self.recorder = Recorder(
                self._metrics,
                self._routing,
                start_step,
                self._alarms,
                num_arms=num_arms,
                utilisation=utilisation_of_token(config) if num_arms == 1 else None,
                carried=carried,
            )
            self.is_evaluated = self._metrics is not None and self._metrics.is_evaluated(start_step)
            self._opened = opened.pop_all()

    def _open(
        self,
        workdir: Path,
        start_step: int,
        num_carried: int,
        notes: Mapping[str, Any],
        name: str,
        opened: ExitStack,
    ) -> None:
        """Opens the files of process 0, and adds to `opened` those that must be closed."""
        config = self._config
        # An interval that a stop has cut short is written again, with all of its steps.
        after_step = start_step - num_carried
        metrics = MetricsFile(workdir, after_step, notes.get("tokens"), notes.get("metrics"))
        self._metrics = opened.enter_context(metrics)
        if not config.num_moe_layers:
            return
        self._evaluations = EvaluationLog(workdir, start_step, notes.get("evaluations"))
        self._routing = RoutingLog(
            workdir, config.moe_layers, config.moe.num_choices, LAYER_METRICS
        )
        self._routing.truncate(after_step, notes.get("routing"))
        alarms = AlarmLog(
            workdir,
            after_step,
            config,
            notes.get("alarms"),
            name=name,
            noted=notes.get("alarms_file"),
        )
        self._alarms = opened.enter_context(closing(alarms))

    def note(self, step: int, evaluation: Evaluation) -> None:
        """Writes an evaluation."""
        if self._metrics is None:
            return
        check_held(self._metrics.path)
        values = evaluation.scalars()
        if self._evaluations:
            values |= self._evaluations.append(step, evaluation)
        self._metrics.write(step, values)

    def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Adds an evaluation, which a signal had cut off, to the checkpoint of its step."""
        is_saved = step in self._checkpoints.steps()
        if is_saved and math.isfinite(evaluation.loss):
            self._checkpoints.add_metrics(step, {"eval/loss": evaluation.loss})

    def save(self, state: TrainState, evaluation: Evaluation | None) -> None:
        """Starts to save the state, its evaluation if it has one, and notes for a continued run.

        All steps before it must be written (`Recorder.flush`). A stop may cut an interval short:
        then a continued run writes it again, with all of its steps.
        """
        metrics = None
        if evaluation is not None and math.isfinite(evaluation.loss):
            metrics = {"eval/loss": evaluation.loss}
        notes = self._recorder_notes(int(state.step))
        if self._evaluations:
            notes["evaluations"] = self._evaluations.steps
        notes["corpus"] = self._corpus
        self._checkpoints.save(state, metrics, notes)

    def _recorder_notes(self, step: int) -> dict[str, Any]:
        """Returns what the recorder notes, as of before an interval that a stop cuts short."""
        train = self._config.train
        is_interval_end = train.is_saved(step) or step % train.log_every == 0
        cut = self.recorder.cut
        if is_interval_end or not cut:
            return self.recorder.notes()
        return dict(cut)

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()


def _carried(notes: Mapping[str, Any]) -> list[TimedOutput]:
    """Returns the steps of the interval that the last stop has cut short."""
    if "interval" not in notes:
        return []
    try:
        return unpack_steps(notes["interval"])
    except ValueError as error:
        log.warning("the logging interval that the last stop has cut short stays so: %s", error)
        return []
