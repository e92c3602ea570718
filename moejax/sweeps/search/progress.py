"""What an arm of a search tells its worker: its evaluations while it is trained, and how it ended."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from moejax.sweeps.search.liveness import Heartbeat

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Trial


class TrialLostError(Exception):
    """Another worker has taken the trial over: training must end without a result. Not a mistake of the user's."""


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
    """What an arm calls at its evaluations, and asks between steps whether to end."""

    def __init__(
        self,
        trial: "Trial",
        heart: Heartbeat,
        should_stop: Callable[[], bool],
        place: Callable[[float], int | None],
        reported: set[int],
    ):
        self._trial, self._heart, self._should_stop = trial, heart, should_stop
        self._place, self._reported = place, reported

    def __call__(self, step: int, fraction: float, loss: float) -> bool:
        """Reports an evaluation.

        Args:
          step: after which it was.
          fraction: of the schedule, in ]0, 1].
          loss: what the study minimises.

        Returns:
          Whether to end the arm now, as pruned. Never at the end of the schedule, while the storage
          is away, at an evaluation that other arms lack, nor after one was missed: what passes a
          rung of successive halving next would stand for it.

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
            return (
                fraction < 1 and len(self._reported) == place and bool(self._trial.should_prune())
            )
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise TrialLostError from error
        except optuna.exceptions.StorageInternalError:
            return False

    def should_stop(self) -> bool:
        """Whether this worker was told to stop: the arm is then left to another, with the status "stopped".

        Raises:
          TrialLostError: the trial is another worker's by now.
        """
        self.check()
        return self._should_stop()

    def check(self) -> None:
        """Raises TrialLostError if the trial is another worker's by now."""
        if self._heart.is_lost.is_set():
            raise TrialLostError
