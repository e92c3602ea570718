"""A worker of a search: draws a point, or goes on with one whose worker died, and runs it, until all points have ended.

Workers share nothing but the storage, and decide by the order of trial numbers, which every storage
gives out one at a time: a trial runs only once all earlier ones have their points, if fewer than
the study's number of points count before it and none of them has its arm. So workers that race at
the end neither overshoot nor run a point twice.

A worker that finds nothing to do waits: it may be needed for the point of one that dies. A trial
fails once, whoever noticed its silence, and of two successors only the earlier runs. A worker that
was only slow is refused when it reports, and goes on with another point.
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
    LIVE,
    Condition,
    conditions,
    points_that_count,
    retries_after,
    root,
)

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

MAX_REFUSED = 100  # points drawn in a row that are not allowed
MAX_ERRORS = 20  # errors in a row, after which they are taken for this worker's and not the points'
MAX_REPEATED = (
    20  # points drawn in a row that run elsewhere; then this worker waits for one of them
)
UNDECIDED_S = 0.05  # between looks at earlier trials that are being drawn

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
    max_trials: int | None = None,
    beat_s: float = 5.0,
    grace_s: float = 60.0,
    poll_s: float = 2.0,
) -> int:
    """Evaluates points of a study until its number of trials has ended.

    Args:
      study: of `open_study` or `create_study`.
      run_arm: trains a point, or tells how its arm ended before: `run_arm(point, arm, report)`. The
        run directory is the arm's, so that training goes on from its newest checkpoint when the
        point was another worker's. It lets `TrialLostError` pass. Any other error is logged, and
        the point is left as if its worker had died.
      arm_of: the id of a point's arm; raises ValueError for a point that the space or the config
        does not allow.
      worker_id: a name that no other worker of the study has.
      should_stop: asked between trials, and by the arm through its report.
      max_trials: after which this worker leaves; None for no limit.
      beat_s: seconds between signs of life.
      grace_s: seconds without one after which another worker's trial is taken over.
      poll_s: seconds between looks at the study while there is nothing to do.

    Returns:
      The number of trials that this worker has told.

    Raises:
      StudyError: the storage cannot be reached, or hardly any point is allowed.
      Exception: the last of `MAX_ERRORS` errors of `run_arm` in a row.
    """
    if grace_s <= 2 * beat_s:
        raise StudyError(
            f"grace_s={grace_s:g} must be more than two beats of beat_s={beat_s:g}; make it longer"
        )
    with storage_errors(f"of study {study.study_name!r}"):
        definition = definition_of(study)
        study.pruner = definition.new_pruner()
        worker = _Worker(
            study,
            definition,
            run_arm,
            arm_of,
            worker_id,
            should_stop,
            beat_s,
            poll_s,
            Watch(grace_s),
        )
        return worker.work(max_trials)


@dataclasses.dataclass
class _Worker:
    """The arguments of `work`, and how many draws and arms in a row came to nothing."""

    study: "Study"
    definition: Definition
    run_arm: RunArm
    arm_of: Callable[[Point], str]
    worker_id: str
    should_stop: Callable[[], bool]
    beat_s: float
    poll_s: float
    watch: Watch
    refused: int = 0
    repeated: int = 0
    errors: int = 0

    @property
    def num_trials(self) -> int:
        """Of the study, now: it may rise while its workers run."""
        return definition_of(self.study).trials

    def work(self, max_trials: int | None) -> int:
        """See the function of this name."""
        told = 0
        while not self.should_stop() and (max_trials is None or told < max_trials):
            trials = self._look()
            is_waiting = Condition.WAITING in conditions(trials).values()
            num_trials = self.num_trials
            if len(points_that_count(trials, ENDED)) >= num_trials and not is_waiting:
                break
            if is_waiting or len(points_that_count(trials)) < num_trials:
                told += self._take(self.study.ask())
            else:
                self._wait(self.poll_s)
        return told

    def _look(self, own: int | None = None) -> list["FrozenTrial"]:
        """All trials, after those of dead workers (never `own`) have failed and their successors wait."""
        trials = self.study.get_trials(deepcopy=False)
        dead = [trial for trial in self.watch.observe(trials) if trial.number != own]
        for trial in dead:
            self._fail(trial.number)
        if dead:
            trials = self.study.get_trials(deepcopy=False)
        found = conditions(trials)
        abandoned = [trial for trial in trials if found[trial.number] == Condition.ABANDONED]
        for trial in abandoned:
            self.study.add_trial(_successor(trial))
        return self.study.get_trials(deepcopy=False) if abandoned else trials

    def _take(self, trial: "Trial") -> bool:
        """Runs a trial that was just drawn or was waiting; whether this worker told its outcome."""
        import optuna

        reported = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        with Heartbeat(self.study, trial, self.watch, self.beat_s) as heart:
            report = Report(trial, heart, self.should_stop, self.definition.place, reported)
            try:
                trial.set_user_attr("worker", self.worker_id)
                point = self.definition.draw(self.study, trial)
                arm = self._arm(trial, point)
                if arm is None:
                    return False
                outcome = self._settle(trial, arm, report) or self._run(trial, point, arm, report)
                return self._tell(trial, outcome)
            except (TrialLostError, optuna.exceptions.UpdateFinishedTrialError):
                return False

    def _arm(self, trial: "Trial", point: Point) -> str | None:
        """The arm of a trial's point, noted in the trial; None where the point is not allowed, which ends the trial."""
        try:
            arm = self.arm_of(point)
        except ValueError as error:
            self._void(trial, "not allowed", str(error))
            self.refused += 1
            if self.refused >= MAX_REFUSED:
                raise StudyError(
                    f"{self.refused} points in a row are not allowed, the last because: {error}; narrow the axes"
                ) from error
            return None
        self.refused = 0
        trial.set_user_attr("arm", arm)
        return arm

    def _settle(self, trial: "Trial", arm: str, report: Report) -> Outcome | None:
        """Waits until earlier trials have their points, then says what they know of this one's.

        Returns:
          None if this worker must run it; an outcome otherwise.

        Raises:
          TrialLostError: the trial must not be run: it is one too many, or another has its point.
        """
        while not self.should_stop():
            report.check()
            trials = self._look(own=trial.number)
            found = conditions(trials)
            if found[trial.number] != Condition.RUNNING:
                raise TrialLostError
            own_root = root(trials[trial.number])
            if any(_is_undecided(other) for other in trials[: trial.number]):
                self._wait(UNDECIDED_S)
                continue
            if _has_earlier_duplicate(trials, trial.number):
                raise self._void(trial, "drawn already")
            before = {number for number in points_that_count(trials) if number < own_root}
            if len(before) >= self.num_trials:
                raise self._void(trial, "one too many")
            same = [
                other
                for other in trials
                if root(other) < own_root and other.user_attrs.get("arm") == arm
            ]
            ended = next((other for other in same if found[other.number] in ENDED), None)
            if ended is not None:
                return _outcome(ended, found[ended.number])
            standing = {found[other.number] for other in same}
            if Condition.WAITING in standing or (
                Condition.RUNNING in standing and self.repeated < MAX_REPEATED
            ):
                self.repeated += 1
                raise self._void(trial, "drawn already")
            if Condition.RUNNING not in standing:
                return None
            self._wait(
                self.poll_s
            )  # hardly another point is left: its outcome is this trial's, too
        return Outcome("stopped")

    def _run(self, trial: "Trial", point: Point, arm: str, report: Report) -> Outcome:
        """Trains; where it raises, the trial is left to any worker, which may be this one."""
        import optuna

        try:
            outcome = self.run_arm(point, arm, report)
        except TrialLostError:
            raise
        except Exception as error:  # whatever it is, it must not end the other arms
            log.error("arm %s failed: %s", arm, error, exc_info=True)
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr(
                    "error", next(iter(f"{type(error).__name__}: {error}".splitlines()))
                )
            self._leave(trial, is_death=True)
            self.errors += 1
            if self.errors >= MAX_ERRORS:
                raise
            raise TrialLostError from error
        except BaseException:
            self._leave(trial, is_death=False)
            raise
        self.errors = 0
        return outcome

    def _tell(self, trial: "Trial", outcome: Outcome) -> bool:
        """Ends the trial; whether with an outcome, and not for another worker to go on.

        Raises:
          TrialLostError: it has ended already.
        """
        from optuna.trial import TrialState

        if outcome.status == "stopped":
            self._leave(trial, is_death=False)
            return False
        self.repeated = 0
        is_finite = outcome.loss is not None and math.isfinite(outcome.loss)
        if outcome.status == "failed" or (outcome.status == "done" and not is_finite):
            trial.set_user_attr("outcome", "failed")
            trial.set_user_attr(
                "error", outcome.error or f"{self.definition.objective} is {outcome.loss}"
            )
            trial.set_user_attr("is_result", outcome.is_result)
            self._fail(trial.number)
            return True
        try:
            if outcome.status == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, outcome.loss)
        except ValueError as error:  # Optuna's for a trial that has ended
            raise TrialLostError from error
        return True

    def _leave(self, trial: "Trial", is_death: bool) -> None:
        """Leaves a trial to another worker at once; a death counts towards the point's retries."""
        import optuna

        if not is_death:
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr("released", True)
        self._fail(trial.number)
        self._look()

    def _fail(self, number: int) -> None:
        """Fails a trial, unless it has ended: of several workers, one does, and it does not matter which."""
        import optuna

        with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def _void(self, trial: "Trial", outcome: str, error: str = "") -> TrialLostError:
        """Ends a trial that is not run and does not count; the exception is for the caller to raise."""
        trial.set_user_attr("outcome", outcome)
        if error:
            trial.set_user_attr("error", error)
        self._fail(trial.number)
        return TrialLostError(outcome)

    def _wait(self, seconds: float) -> None:
        """Sleeps, but not long after it was told to stop."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.should_stop():
            time.sleep(min(left, 0.1))


def _successor(trial: "FrozenTrial") -> "FrozenTrial":
    """The waiting trial that goes on with an abandoned one: its point, evaluations and rungs of successive halving.

    The parameters of a trial that was itself a successor may not all be set when its worker dies,
    but are known.
    """
    import optuna

    kept: dict[str, Any] = {
        key: trial.user_attrs[key] for key in ("arm", "reached") if key in trial.user_attrs
    }
    rungs = {
        key: value for key, value in trial.system_attrs.items() if key.startswith("completed_rung")
    }
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.WAITING,
        user_attrs={
            **kept,
            "root": root(trial),
            "retried_from": trial.number,
            "retries": retries_after(trial),
        },
        system_attrs={
            **rungs,
            "fixed_params": trial.system_attrs.get("fixed_params") or dict(trial.params),
        },
        intermediate_values=dict(trial.intermediate_values),
    )


def _is_undecided(trial: "FrozenTrial") -> bool:
    """Whether a trial is being drawn."""
    return (
        trial.state.name == "RUNNING"
        and "arm" not in trial.user_attrs
        and "outcome" not in trial.user_attrs
    )


def _has_earlier_duplicate(trials: list["FrozenTrial"], number: int) -> bool:
    """Whether an earlier trial already stands for this one's point: two workers noticed a death at once.

    The whole line is looked at, not the trial's sisters alone: a twin may die before it has ended
    itself, and leave a successor of its own.
    """
    found = conditions(trials)
    own_root = root(trials[number])
    return any(
        root(other) == own_root and found[other.number] in (*ENDED, *LIVE)
        for other in trials[:number]
    )


def _outcome(trial: "FrozenTrial", condition: Condition) -> Outcome:
    """How a trial ended, told again for another of the same arm."""
    if condition == Condition.DONE:
        return Outcome("done", trial.value)
    if condition == Condition.PRUNED:
        return Outcome("pruned")
    error = trial.user_attrs.get("error", "its workers died too often")
    return Outcome("failed", error=error, is_result=trial.user_attrs.get("is_result", False))
