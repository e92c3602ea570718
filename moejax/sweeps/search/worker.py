"""A worker of a search, which runs points until all of the study have ended.

It draws each point, or goes on with one whose worker died. Workers share nothing but the storage,
and decide by the order of trial numbers, which every storage gives out one at a time. A trial runs
only once all earlier ones have their points, if fewer than the study's number of points count
before it and none of them has its arm. So workers that race at the end neither run too many points
nor run a point twice.

A worker that finds nothing to do waits: it may be needed for the point of one that dies. A trial
fails once, whichever workers notice that its worker is dead, and of two successors only the earlier
runs. A worker that was only slow is refused when it reports, and goes on with another point.

Optuna has heartbeats (`RDBStorage(heartbeat_interval=...)`), retries (`fail_stale_trials`,
`RetryHeartbeatStaleTrialCallback`) and a limit (`MaxTrialsCallback`) of its own. They are not used:

- A journal has no heartbeat. So they could take the place of `liveness.py` and `successor_of`, a
  tenth of this folder, for databases alone, and both would stay here for journals.
- Heartbeats are recorded within `Study.optimize` alone, which trains each trial that it draws.
- A trial whose worker dies before its first heartbeat runs for ever.
- Who notices a death fails the trial and then adds its successor: a death in between loses the
  point.
- One error of the storage ends a heartbeat for good, and the trial's end is then an error that ends
  the worker.
- A point whose worker is asked to stop, or whose training raises, is not tried again.
- The limit is looked at after a trial: N workers that race at the end run up to N - 1 too many.

`tests/sweeps/search/test_optuna.py` shows each of these of Optuna 5.0, and fails once one has gone.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from moejax.sweeps.search.definition import Definition, StudyError
from moejax.sweeps.search.liveness import Heartbeat, Watch
from moejax.sweeps.search.progress import Outcome, Report, TrialLostError
from moejax.sweeps.search.study import definition_of, storage_errors
from moejax.sweeps.search.trials import (
    ENDED,
    Condition,
    conditions,
    has_earlier_duplicate,
    is_undecided,
    points_that_count,
    root,
    successor_of,
)

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

MAX_REFUSED = 100
"""Points drawn in a row that are not allowed."""

MAX_ERRORS = 20
"""Errors in a row, after which they are taken for errors of this worker and not of the points."""

MAX_REPEATED = 20
"""Points drawn in a row that other workers run; then this worker waits for one of them."""

UNDECIDED_S = 0.05
"""Seconds between two looks at earlier trials that are being drawn."""

log = logging.getLogger("moejax")

Point: TypeAlias = dict[str, Any]
RunArm: TypeAlias = Callable[[Point, str, Report], Outcome]


def work(
    study: "Study",
    run_arm: RunArm,
    *,
    arm_of: Callable[[Point], str],
    worker_id: str,
    should_stop: Callable[[], bool],
    beat_s: float = 5.0,
    grace_s: float = 60.0,
    poll_s: float = 2.0,
) -> int:
    """Evaluates points of a study until its number of trials has ended.

    Args:
      study: of `open_study` or `create_study`.
      run_arm: trains a point, or returns how its arm ended before: `run_arm(point, arm, report)`.
        The run directory is the arm's, so that training goes on from its newest checkpoint when the
        point was another worker's. It lets `TrialLostError` pass. Any other error is logged, and
        the point is left as if its worker had died.
      arm_of: the id of a point's arm; raises ValueError for a point that the space or the config
        does not allow.
      worker_id: a name that no other worker of the study has.
      should_stop: asked between trials, and by the arm through its report.
      beat_s: seconds between heartbeats.
      grace_s: seconds without a heartbeat after which another worker's trial is taken over.
      poll_s: seconds between two looks at the study while there is nothing to do.

    Returns:
      The number of trials that this worker has ended.

    Raises:
      StudyError: the storage cannot be reached, or hardly any point is allowed.
      Exception: the last of `MAX_ERRORS` errors of `run_arm` in a row.
    """
    if grace_s <= 2 * beat_s:
        raise StudyError(
            f"grace_s={grace_s:g} must be more than two heartbeats of beat_s={beat_s:g}; "
            "make it longer"
        )
    with storage_errors(f"of study {study.study_name!r}"):
        definition = definition_of(study)
        study.pruner = definition.new_pruner()
        worker = _Worker(
            study=study,
            definition=definition,
            run_arm=run_arm,
            arm_of=arm_of,
            worker_id=worker_id,
            should_stop=should_stop,
            beat_s=beat_s,
            poll_s=poll_s,
            watch=Watch(grace_s),
        )
        return worker.work()


@dataclasses.dataclass
class _Worker:
    """The arguments of `work`, and the numbers of draws and arms in a row without a result.

    Attributes:
      num_refused: draws that are not allowed.
      num_repeated: draws that other workers run.
      num_errors: arms that raised an error.
    """

    study: "Study"
    definition: Definition
    run_arm: RunArm
    arm_of: Callable[[Point], str]
    worker_id: str
    should_stop: Callable[[], bool]
    beat_s: float
    poll_s: float
    watch: Watch
    num_refused: int = 0
    num_repeated: int = 0
    num_errors: int = 0

    @property
    def num_trials(self) -> int:
        """The study's number of trials now: it may rise while its workers run."""
        return definition_of(self.study).trials

    def work(self) -> int:
        """Evaluates points, see the function of this name."""
        num_ended = 0
        while not self.should_stop():
            trials = self._update_trials()
            has_waiting = Condition.WAITING in conditions(trials).values()
            num_trials = self.num_trials
            if len(points_that_count(trials, ENDED)) >= num_trials and not has_waiting:
                break
            if has_waiting or len(points_that_count(trials)) < num_trials:
                num_ended += self._run_trial(self.study.ask())
            else:
                self._wait(self.poll_s)
        return num_ended

    def _update_trials(self, own: int | None = None) -> list["FrozenTrial"]:
        """Lets trials of dead workers fail, makes their successors, and returns all trials.

        Args:
          own: the number of this worker's trial, which never counts as dead.
        """
        trials = self.study.get_trials(deepcopy=False)
        dead = [trial for trial in self.watch.observe(trials) if trial.number != own]
        for trial in dead:
            self._fail(trial.number)
        if dead:
            trials = self.study.get_trials(deepcopy=False)
        found = conditions(trials)
        abandoned = [trial for trial in trials if found[trial.number] == Condition.ABANDONED]
        for trial in abandoned:
            self.study.add_trial(successor_of(trial))
        return self.study.get_trials(deepcopy=False) if abandoned else trials

    def _run_trial(self, trial: "Trial") -> bool:
        """Runs a trial that was just drawn or was waiting, and returns whether it has ended."""
        import optuna

        reported = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        with Heartbeat(self.study, trial, self.watch, self.beat_s) as heartbeat:
            report = Report(trial, heartbeat, self.should_stop, self.definition.place, reported)
            try:
                trial.set_user_attr("worker", self.worker_id)
                point = self.definition.draw(self.study, trial)
                arm = self._note_arm(trial, point)
                if arm is None:
                    return False
                outcome = self._settle(trial, arm, report)
                if outcome is None:
                    outcome = self._train(trial, point, arm, report)
                return self._tell(trial, outcome)
            except (TrialLostError, optuna.exceptions.UpdateFinishedTrialError):
                return False

    def _note_arm(self, trial: "Trial", point: Point) -> str | None:
        """Notes the arm of a trial's point in the trial, and returns it.

        None where the point is not allowed, which ends the trial.
        """
        try:
            arm = self.arm_of(point)
        except ValueError as error:
            self._discard(trial, "not allowed", str(error))
            self.num_refused += 1
            if self.num_refused >= MAX_REFUSED:
                raise StudyError(
                    f"{self.num_refused} points in a row are not allowed, "
                    f"the last because: {error}; narrow the axes"
                ) from error
            return None
        self.num_refused = 0
        trial.set_user_attr("arm", arm)
        return arm

    def _settle(self, trial: "Trial", arm: str, report: Report) -> Outcome | None:
        """Waits until earlier trials have their points, and decides whether this one must run.

        Returns:
          None if this worker must train the point; the outcome otherwise.

        Raises:
          TrialLostError: the trial must not be run: it is one too many, or another has its point.
        """
        while not self.should_stop():
            report.check()
            trials = self._update_trials(own=trial.number)
            found = conditions(trials)
            if found[trial.number] != Condition.RUNNING:
                raise TrialLostError
            if any(map(is_undecided, trials[: trial.number])):
                self._wait(UNDECIDED_S)
                continue
            self._check_needed(trial, trials)
            own_root = root(trials[trial.number])
            same_arm = []
            for other in trials:
                if root(other) < own_root and other.user_attrs.get("arm") == arm:
                    same_arm.append(other)
            for other in same_arm:
                if found[other.number] in ENDED:
                    return _outcome_of(other, found[other.number])
            if not self._must_wait(trial, {found[other.number] for other in same_arm}):
                return None
            # Hardly another point is left: the outcome of the other trial will be this one's, too.
            self._wait(self.poll_s)
        return Outcome("stopped")

    def _check_needed(self, trial: "Trial", trials: list["FrozenTrial"]) -> None:
        """Discards a trial, and raises `TrialLostError`, if it is a duplicate or one too many."""
        if has_earlier_duplicate(trials, trial.number):
            raise self._discard(trial, "drawn already")
        own_root = root(trials[trial.number])
        earlier_points = [number for number in points_that_count(trials) if number < own_root]
        if len(earlier_points) >= self.num_trials:
            raise self._discard(trial, "one too many")

    def _must_wait(self, trial: "Trial", others: set[Condition]) -> bool:
        """Whether to wait for the outcome of another trial of the same arm.

        Args:
          trial: this worker's.
          others: the conditions of earlier trials of the same arm, none of which has ended.

        Raises:
          TrialLostError: the trial is discarded, and another point should be drawn instead.
        """
        is_running = Condition.RUNNING in others
        can_draw_again = is_running and self.num_repeated < MAX_REPEATED
        if Condition.WAITING in others or can_draw_again:
            self.num_repeated += 1
            raise self._discard(trial, "drawn already")
        return is_running

    def _train(self, trial: "Trial", point: Point, arm: str, report: Report) -> Outcome:
        """Trains a point; after an error the trial is left to any worker, which may be this one."""
        import optuna

        try:
            outcome = self.run_arm(point, arm, report)
        except TrialLostError:
            raise
        except Exception as error:  # whatever it is, it must not end the other arms
            log.error("arm %s failed: %s", arm, error, exc_info=True)
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr("error", message)
            self._leave(trial, is_death=True)
            self.num_errors += 1
            if self.num_errors >= MAX_ERRORS:
                raise
            raise TrialLostError from error
        except BaseException:
            self._leave(trial, is_death=False)
            raise
        self.num_errors = 0
        return outcome

    def _tell(self, trial: "Trial", outcome: Outcome) -> bool:
        """Tells the study how the trial ended.

        Returns:
          Whether it has an outcome: False if it is left for another worker to go on.

        Raises:
          TrialLostError: it has ended already.
        """
        from optuna.trial import TrialState

        if outcome.status == "stopped":
            self._leave(trial, is_death=False)
            return False
        self.num_repeated = 0
        is_finite = outcome.loss is not None and math.isfinite(outcome.loss)
        if outcome.status == "failed" or (outcome.status == "done" and not is_finite):
            error = outcome.error or f"{self.definition.objective} is {outcome.loss}"
            trial.set_user_attr("outcome", "failed")
            trial.set_user_attr("error", error)
            trial.set_user_attr("is_result", outcome.is_result)
            self._fail(trial.number)
            return True
        try:
            if outcome.status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, outcome.loss)
        except ValueError as error:  # Optuna's error for a trial that has ended
            raise TrialLostError from error
        return True

    def _leave(self, trial: "Trial", is_death: bool) -> None:
        """Leaves a trial to another worker at once; a death counts towards the point's retries."""
        import optuna

        if not is_death:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr("released", True)
        self._fail(trial.number)
        self._update_trials()

    def _fail(self, number: int) -> None:
        """Lets a trial fail unless it has ended; several workers may try, and one succeeds."""
        import optuna

        with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _discard(self, trial: "Trial", outcome: str, error: str = "") -> TrialLostError:
        """Ends a trial that is not run and does not count.

        Returns:
          The exception, for the caller to raise.
        """
        trial.set_user_attr("outcome", outcome)
        if error:
            trial.set_user_attr("error", error)
        self._fail(trial.number)
        return TrialLostError(outcome)

    def _wait(self, seconds: float) -> None:
        """Sleeps, and wakes up soon after a stop."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.should_stop():
            time.sleep(min(left, 0.1))


def _outcome_of(trial: "FrozenTrial", condition: Condition) -> Outcome:
    """Returns how a trial ended, for another trial of the same arm."""
    if condition == Condition.DONE:
        return Outcome("done", trial.value)
    if condition == Condition.PRUNED:
        return Outcome("pruned")
    error = trial.user_attrs.get("error", "its workers died too often")
    return Outcome("failed", error=error, is_result=trial.user_attrs.get("is_result", False))
