"""What a run leaves as it trains: metrics, routing, alarms and evaluations, and checkpoints with what belongs to them.

Alone (`loop`) or in a pack (`packed_loop`), a run writes the same.
"""

import math
from pathlib import Path

from moejax.config import Config
from moejax.planning.devices import utilisation_of_token
from moejax.training.alarms import AlarmLog
from moejax.training.checkpoint import Checkpoints
from moejax.training.evaluation import Evaluation
from moejax.training.evaluation_log import EvaluationLog
from moejax.training.metrics import MetricsFile, Recorder
from moejax.training.processes import is_first
from moejax.training.progress import StepProgress
from moejax.training.routing_log import RoutingLog
from moejax.training.state import TrainState
from moejax.training.telemetry import LAYER_METRICS


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
        self._checkpoints = checkpoints
        self._metrics = MetricsFile(workdir, after_step=start_step) if is_first() else None
        self._evaluations: EvaluationLog | None = None
        self._alarms: AlarmLog | None = None
        routing: RoutingLog | None = None
        if config.num_moe_layers and is_first():
            self._evaluations = EvaluationLog(workdir, after_step=start_step)
            routing = RoutingLog(workdir, config.moe_layers, config.moe.num_choices, LAYER_METRICS)
            routing.truncate(start_step)
            counts = checkpoints.notes(start_step).get("alarms") if start_step else None
            self._alarms = AlarmLog(workdir, start_step, config, counts, name)
        utilisation = utilisation_of_token(config) if num_arms == 1 else None
        self.recorder = Recorder(self._metrics, routing, progress, start_step, self._alarms, num_arms, utilisation)
        self.is_evaluated = self._metrics is not None and self._metrics.is_evaluated

    def note(self, step: int, evaluation: Evaluation) -> None:
        """Writes an evaluation."""
        if self._metrics:
            of_routing = self._evaluations.append(step, evaluation) if self._evaluations else {}
            self._metrics.write(step, evaluation.scalars() | of_routing)

    def save(self, state: TrainState, evaluation: Evaluation | None) -> None:
        """Starts to save the state, with its evaluation if it has one, and what the alarms have counted."""
        is_known = evaluation is not None and math.isfinite(evaluation.loss)
        metrics = {"eval/loss": evaluation.loss} if evaluation and is_known else None
        self._checkpoints.save(state, metrics, {"alarms": self._alarms.counts} if self._alarms else None)

    def __enter__(self) -> "RunFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._metrics:
            self._metrics.close()
