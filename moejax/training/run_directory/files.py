"""What a run leaves as it trains: metrics, routing, alarms and evaluations, and checkpoints with what belongs to them.

Alone (`loop`) or in a pack (`packed_loop`), a run writes the same.
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
from moejax.training.health.progress import StepProgress
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
    """The files of a run, open from a step on: what they hold of later steps is dropped. Process 0 alone writes them.

    Args:
      workdir: the run directory.
      config: of the run.
      checkpoints: of the run, from which `start_step` was restored unless it is 0.
      start_step: steps done.
      progress: shown every finished step.
      name: of the run, in the log; "" where there is but one.
      num_arms: among which the time of a step is to be shared out.

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
        progress: StepProgress,
        name: str = "",
        num_arms: int = 1,
    ):
        self._config = config
        self._checkpoints = checkpoints
        self._metrics: MetricsFile | None = None
        self._evaluations: EvaluationLog | None = None
        self._alarms: AlarmLog | None = None
        routing: RoutingLog | None = None
        carried: list[TimedOutput] = []
        with (
            ExitStack() as opened
        ):  # of one that cannot be opened the others are closed: they write in threads
            if is_first():
                notes = checkpoints.notes(start_step) if start_step else {}
                carried = _carried(notes)
                after_step = start_step - len(
                    carried
                )  # what a stop has cut is written again, as a whole
                self._metrics = opened.enter_context(
                    MetricsFile(workdir, after_step, notes.get("tokens"), notes.get("metrics"))
                )
                if config.num_moe_layers:
                    self._evaluations = EvaluationLog(workdir, start_step, notes.get("evaluations"))
                    routing = RoutingLog(
                        workdir, config.moe_layers, config.moe.num_choices, LAYER_METRICS
                    )
                    routing.truncate(after_step, notes.get("routing"))
                    self._alarms = opened.enter_context(
                        closing(
                            AlarmLog(
                                workdir,
                                after_step,
                                config,
                                notes.get("alarms"),
                                name=name,
                                noted=notes.get("alarms_file"),
                            )
                        )
                    )
            self._corpus = recorded_corpus(workdir) if is_first() else None
            utilisation = utilisation_of_token(config) if num_arms == 1 else None
            self.recorder = Recorder(
                self._metrics,
                routing,
                progress,
                start_step,
                self._alarms,
                num_arms,
                utilisation,
                carried,
            )
            self.is_evaluated = self._metrics is not None and self._metrics.is_evaluated(start_step)
            self._opened = opened.pop_all()

    def note(self, step: int, evaluation: Evaluation) -> None:
        """Writes an evaluation."""
        if self._metrics:
            check_held(self._metrics.path)
            of_routing = self._evaluations.append(step, evaluation) if self._evaluations else {}
            self._metrics.write(step, evaluation.scalars() | of_routing)

    def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Adds an evaluation, which a signal had cut off, to the checkpoint of its step."""
        if math.isfinite(evaluation.loss):
            self._checkpoints.add_metrics(step, {"eval/loss": evaluation.loss})

    def save(self, state: TrainState, evaluation: Evaluation | None) -> None:
        """Starts to save the state, with its evaluation if it has one, and what a continued run must know besides.

        All steps before it must be written (`Recorder.flush`). A stop may cut an interval short:
        then a continued run writes it again, as a whole.
        """
        is_known = evaluation is not None and math.isfinite(evaluation.loss)
        metrics = {"eval/loss": evaluation.loss} if evaluation and is_known else None
        step = int(state.step)
        is_whole = self._config.train.is_saved(step) or step % self._config.train.log_every == 0
        notes = self.recorder.notes() if is_whole or not self.recorder.cut else self.recorder.cut
        if self._evaluations:
            notes = notes | {"evaluations": self._evaluations.steps}
        self._checkpoints.save(state, metrics, notes | {"corpus": self._corpus})

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()


def _carried(notes: Mapping[str, Any]) -> list[TimedOutput]:
    """The steps of the interval that a stop has cut."""
    if "interval" not in notes:
        return []
    try:
        return unpack_steps(notes["interval"])
    except ValueError as error:
        log.warning("the logging interval that the last stop has cut stays so: %s", error)
        return []
