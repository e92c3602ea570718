"""What the trials of a study say together: which count, which wait for a worker, and which is best.

A trial of Optuna cannot be handed on: when its worker dies it fails, and a successor with the same
point goes on. A line of successors is one point, named by the number of its first trial, the root,
and counts once. Nothing is stored about a line as a whole: a condition follows from the trials
alone, so a worker that dies between two writes leaves nothing half done.
"""

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Study
    from optuna.trial import FrozenTrial

MAX_RETRIES = 3  # deaths of workers that a point survives; one more and it counts as failed


class Condition(enum.StrEnum):
    """Where a trial stands."""

    WAITING = "waiting"  # a successor, for any worker
    RUNNING = "running"
    ABANDONED = "abandoned"  # its worker died or stopped, and it has no successor yet
    DONE = "done"
    PRUNED = "pruned"
    FAILED = "failed"
    CONTINUED = "continued"  # by its successor
    VOID = "void"  # never run: not allowed, drawn twice, or one too many


ENDED = (Condition.DONE, Condition.PRUNED, Condition.FAILED)
LIVE = (Condition.WAITING, Condition.RUNNING, Condition.ABANDONED)


def root(trial: "FrozenTrial") -> int:
    """The number of the first trial of its line."""
    return trial.user_attrs.get("root", trial.number)


def conditions(trials: Sequence["FrozenTrial"]) -> dict[int, Condition]:
    """The condition of every trial, by number; `trials` are all of the study's."""
    continued = {trial.user_attrs.get("retried_from") for trial in trials}
    return {trial.number: _condition(trial, trial.number in continued) for trial in trials}


def _condition(trial: "FrozenTrial", is_continued: bool) -> Condition:
    known = {"COMPLETE": Condition.DONE, "PRUNED": Condition.PRUNED, "WAITING": Condition.WAITING}
    if trial.state.name in known:
        return known[trial.state.name]
    outcome = trial.user_attrs.get("outcome")
    if outcome is not None:
        return Condition.FAILED if outcome == "failed" else Condition.VOID
    if trial.state.name == "RUNNING":
        return Condition.RUNNING
    if is_continued:
        return Condition.CONTINUED
    if "arm" not in trial.user_attrs:  # its worker was gone before it had a point
        return Condition.VOID
    return Condition.ABANDONED if retries_after(trial) <= MAX_RETRIES else Condition.FAILED


def retries_after(trial: "FrozenTrial") -> int:
    """Deaths of workers in the line of a trial without an outcome; a worker that was told to stop has not died."""
    return trial.user_attrs.get("retries", 0) + (not trial.user_attrs.get("released", False))


def points_that_count(
    trials: Sequence["FrozenTrial"], among: Sequence[Condition] = (*ENDED, *LIVE)
) -> set[int]:
    """Roots of the points that count towards the study's number of trials."""
    found = conditions(trials)
    return {root(trial) for trial in trials if found[trial.number] in among}


def trials_table(study: "Study") -> list[dict[str, Any]]:
    """A row a trial: number, state, arm, params, value (a pruned arm's is its last), fraction reached, worker, error.

    An arm that failed is a result, `is_result`, if it was trained: its values were not finite, or
    an alarm stopped it. Trials that never ran are left out; those continued by another trial are
    in, with the state "continued".
    """
    trials = study.get_trials(deepcopy=False)
    found = conditions(trials)
    return [
        _row(trial, found[trial.number])
        for trial in trials
        if found[trial.number] != Condition.VOID
    ]


def best(study: "Study") -> dict[str, Any] | None:
    """The row of the arm with the smallest loss of those that were trained to the end; None before the first."""
    rows = [row for row in trials_table(study) if row["state"] == Condition.DONE]
    return min(rows, key=lambda row: row["value"], default=None)


def untrained(study: "Study") -> list[dict[str, Any]]:
    """The rows of failed trials whose points could not be trained, of which nothing is known."""
    return [
        row
        for row in trials_table(study)
        if row["state"] == Condition.FAILED and not row["is_result"]
    ]


def _row(trial: "FrozenTrial", condition: Condition) -> dict[str, Any]:
    attributes = trial.user_attrs
    error = attributes.get("error")
    if condition == Condition.FAILED and error is None:
        error = f"its workers died {retries_after(trial)} times"
    return {
        "number": trial.number,
        "state": condition.value,
        "arm": attributes.get("arm"),
        "params": dict(trial.params or trial.system_attrs.get("fixed_params", {})),
        "value": trial.value if condition in (Condition.DONE, Condition.PRUNED) else None,
        "fraction": attributes.get("reached", {}).get("fraction"),
        "worker": attributes.get("worker"),
        "error": error,
        "is_result": condition in ENDED
        and (condition != Condition.FAILED or attributes.get("is_result", False)),
    }
