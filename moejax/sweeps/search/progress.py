"""What an arm of a search reports to its worker: its evaluations, and how it ended."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from moejax.sweeps.search.liveness import Heartbeat

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Trial


class TrialLostError(Exception):
    """Another worker has taken the trial over: training must end without a result.

    It is no error of the user's.
    """


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an arm ended: its final loss, or why it has none.

    Attributes:
      status: "done", "pruned", "failed" (not finite, an error), or "stopped" early, for another
        worker to go on.
      loss: of an arm that is done: the last value of what the study minimises.
      error: of an arm that failed, one line.
      is_result: False if the arm failed without being trained, so that nothing is known
        of its point.
    """

    status: Literal["done", "pruned", "failed", "stopped"]
    loss: float | None = None
    error: str | None = None
    is_result: bool = True


class Report:
    """What an arm calls at its evaluations, and asks between steps whether to end.

    Args:
      trial: of the arm.
      heartbeat: of the trial.
      should_stop: whether the worker was asked to stop.
      place: the number of the evaluation at a fraction of the schedule, among those of all arms.
      reported: the numbers of the evaluations that the storage has already.
    """

    def __init__(
        self,
        trial: "Trial",
        heartbeat: Heartbeat,
        should_stop: Callable[[], bool],
        place: Callable[[float], int | None],
        reported: set[int],
    ):
        self._trial = trial
        self._heartbeat = heartbeat
        self._should_stop = should_stop
        self._place = place
        self._reported = reported

    def __call__(self, step: int, fraction: float, loss: float) -> bool:
        """Reports an evaluation.

        Args:
          step: after which it was.
          fraction: of the schedule, in ]0, 1].
          loss: what the study minimises.

        Returns:
          Whether to end the arm now, as pruned. Never at the end of the schedule, while the storage
          is away, at an evaluation that other arms lack, nor after one was missed: successive
          halving would take the next one for that of the missed rung.

        Raises:
          TrialLostError: the trial is another worker's by now.
        """
        import optuna

        self.check()
        place = self._place(fraction)
        if place in self._reported or not math.isfinite(loss):
            return False
        try:
            self._trial.set_user_attr("reached", {"step": step, "fraction": fraction})
            if place is None:
                return False
            self._trial.report(loss, place)
            self._reported.add(place)
            has_missed_none = len(self._reported) == place
            return fraction < 1 and has_missed_none and bool(self._trial.should_prune())
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise TrialLostError from error
        except optuna.exceptions.StorageInternalError:
            return False

    def should_stop(self) -> bool:
        """Whether this worker was asked to stop.

        The arm is then left to another worker, with the status "stopped".

        Raises:
          TrialLostError: the trial is another worker's by now.
        """
        self.check()
        return self._should_stop()

    def check(self) -> None:
        """Raises `TrialLostError` if the trial is another worker's by now."""
        if self._heartbeat.is_lost.is_set():
            raise TrialLostError
