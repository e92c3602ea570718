"""What follows from all trials of a study: which count, which wait for a worker, which is best.

A trial of Optuna cannot be handed to another worker: when its worker dies it fails, and a successor
with the same point goes on. A line of successors is one point, named by the number of its first
trial, the root, and counts once. Nothing is stored about a line: a condition follows from the
trials only, so a worker that dies between two writes leaves nothing half done.
"""

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an extra, imported where it is needed
    from optuna import Study
    from optuna.trial import FrozenTrial

MAX_RETRIES = 3
"""Deaths of workers that a point survives; with one more it counts as failed."""

KEPT = ("arm", "reached")
"""Attributes of a trial that its successor keeps."""


class Condition(enum.StrEnum):
    """The condition of a trial."""

    WAITING = "waiting"  # a successor, for any worker
    RUNNING = "running"
    ABANDONED = "abandoned"  # its worker died or stopped, and it has no successor yet
    DONE = "done"
    PRUNED = "pruned"
    FAILED = "failed"
    CONTINUED = "continued"  # by its successor
    DISCARDED = "void"  # never run: not allowed, drawn twice, or one too many


ENDED = (Condition.DONE, Condition.PRUNED, Condition.FAILED)
LIVE = (Condition.WAITING, Condition.RUNNING, Condition.ABANDONED)


def root(trial: "FrozenTrial") -> int:
    """Returns the number of the first trial of a trial's line."""
    return trial.user_attrs.get("root", trial.number)


def conditions(trials: Sequence["FrozenTrial"]) -> dict[int, Condition]:
    """Returns the condition of every trial, by number; `trials` are all of the study's."""
    continued = {trial.user_attrs.get("retried_from") for trial in trials}
    return {trial.number: _condition(trial, trial.number in continued) for trial in trials}


def _condition(trial: "FrozenTrial", is_continued: bool) -> Condition:
    known = {"COMPLETE": Condition.DONE, "PRUNED": Condition.PRUNED, "WAITING": Condition.WAITING}
    if trial.state.name in known:
        return known[trial.state.name]
    outcome = trial.user_attrs.get("outcome")
    if outcome is not None:
        return Condition.FAILED if outcome == "failed" else Condition.DISCARDED
    if trial.state.name == "RUNNING":
        return Condition.RUNNING
    if is_continued:
        return Condition.CONTINUED
    if "arm" not in trial.user_attrs:  # its worker died before it had a point
        return Condition.DISCARDED
    return Condition.ABANDONED if retries_after(trial) <= MAX_RETRIES else Condition.FAILED


def retries_after(trial: "FrozenTrial") -> int:
    """Returns the number of workers that died in the line of a trial without an outcome.

    A worker that was asked to stop, and so released its trial, has not died.
    """
    has_died = not trial.user_attrs.get("released", False)
    return trial.user_attrs.get("retries", 0) + int(has_died)


def successor_of(trial: "FrozenTrial") -> "FrozenTrial":
    """Returns the waiting trial that goes on with an abandoned one.

    It has the point, the evaluations and the rungs of successive halving of the abandoned trial. If
    that was a successor, too, its worker may have died before all parameters were set; but they are
    known, as those of its own predecessor.
    """
    import optuna

    user_attrs = {name: trial.user_attrs[name] for name in KEPT if name in trial.user_attrs}
    user_attrs["root"] = root(trial)
    user_attrs["retried_from"] = trial.number
    user_attrs["retries"] = retries_after(trial)
    system_attrs: dict[str, Any] = {}
    for name, value in trial.system_attrs.items():
        if name.startswith("completed_rung"):
            system_attrs[name] = value
    system_attrs["fixed_params"] = trial.system_attrs.get("fixed_params") or dict(trial.params)
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.WAITING,
        user_attrs=user_attrs,
        system_attrs=system_attrs,
        intermediate_values=dict(trial.intermediate_values),
    )


def is_undecided(trial: "FrozenTrial") -> bool:
    """Whether a trial is being drawn: it has neither an arm nor an outcome yet."""
    is_drawn = "arm" in trial.user_attrs or "outcome" in trial.user_attrs
    return trial.state.name == "RUNNING" and not is_drawn


def has_earlier_duplicate(trials: Sequence["FrozenTrial"], number: int) -> bool:
    """Whether an earlier trial has this one's point already.

    That is so where two workers noticed a death at the same time. The entire line is searched, not
    only successors of the same trial: a duplicate may die before it has ended itself, and leave a
    successor of its own.
    """
    found = conditions(trials)
    own_root = root(trials[number])
    for other in trials[:number]:
        if root(other) == own_root and found[other.number] in (*ENDED, *LIVE):
            return True
    return False


def points_that_count(
    trials: Sequence["FrozenTrial"], among: Sequence[Condition] = (*ENDED, *LIVE)
) -> set[int]:
    """Returns the roots of the points that count towards the study's number of trials.

    Args:
      trials: all of the study's.
      among: the conditions that count.
    """
    found = conditions(trials)
    return {root(trial) for trial in trials if found[trial.number] in among}


def trials_table(study: "Study") -> list[dict[str, Any]]:
    """Returns a row for each trial.

    Its keys are number, state, arm, params, value (of a pruned arm the last one), the fraction that
    it reached, worker and error. An arm that failed is a result, `is_result`, if it was trained:
    its values were not finite, or an alarm stopped it. Trials that never ran are left out; those
    that another trial continued have the state "continued".
    """
    trials = study.get_trials(deepcopy=False)
    found = conditions(trials)
    rows = []
    for trial in trials:
        condition = found[trial.number]
        if condition != Condition.DISCARDED:
            rows.append(_row(trial, condition))
    return rows


def best(study: "Study") -> dict[str, Any] | None:
    """Returns the row of the arm with the smallest loss among those trained to the end.

    None as long as there is no such arm.
    """
    rows = [row for row in trials_table(study) if row["state"] == Condition.DONE]
    return min(rows, key=lambda row: row["value"], default=None)


def untrained(study: "Study") -> list[dict[str, Any]]:
    """Returns the rows of failed trials whose points were not trained, so that nothing is known."""
    failed = [row for row in trials_table(study) if row["state"] == Condition.FAILED]
    return [row for row in failed if not row["is_result"]]


def _row(trial: "FrozenTrial", condition: Condition) -> dict[str, Any]:
    attributes = trial.user_attrs
    error = attributes.get("error")
    if condition == Condition.FAILED and error is None:
        error = f"its workers died {retries_after(trial)} times"
    has_value = condition in (Condition.DONE, Condition.PRUNED)
    is_result = has_value
    if condition == Condition.FAILED:
        is_result = attributes.get("is_result", False)
    return {
        "number": trial.number,
        "state": condition.value,
        "arm": attributes.get("arm"),
        "params": dict(trial.params or trial.system_attrs.get("fixed_params", {})),
        "value": trial.value if has_value else None,
        "fraction": attributes.get("reached", {}).get("fraction"),
        "worker": attributes.get("worker"),
        "error": error,
        "is_result": is_result,
    }
