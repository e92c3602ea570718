"""`moejax sweep --fair=learning_rate`: trials before the arms are compared."""

import logging
import math
from collections.abc import Hashable, Mapping
from pathlib import Path

from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.sweep.running import train_arms
from moejax.sweeps.arms import Plan, describe
from moejax.sweeps.fair import (
    FRACTION,
    RATE,
    FairRate,
    Trials,
    arms_of,
    extend_trials,
    find_rate,
    plan_trials,
    with_fair_rates,
)
from moejax.sweeps.matching import short, training_flops
from moejax.sweeps.store.fair_rates import FAIR_FOLDER, write_rates
from moejax.sweeps.store.records import read_records
from moejax.sweeps.tables import SEED, loss_of

log = logging.getLogger("moejax")


def check_fair(values: FlagValues, plan: Plan) -> None:
    """Raises `UsageError` where trials of learning rates mean nothing."""
    if values.runner == "slurm":
        raise UsageError(
            "--fair=learning_rate has to wait for its trials, and --runner=slurm does not; use "
            "--runner=here or pool"
        )
    if any(RATE in arm.overrides for arm in plan.arms):
        raise UsageError(f"--fair=learning_rate finds {RATE}, which is an axis, too; leave one out")


def describe_trials(plan: Plan) -> str:
    """Returns how many trials come first, and what they cost, in words."""
    arms = arms_of(plan_trials(plan))
    cost = sum(training_flops(arm.config, arm.count) for arm in arms)
    return f"{len(arms)} trials of {FRACTION:g} of the steps come first, {short(cost)}FLOP"


def train_trials(values: FlagValues, directory: Path, plan: Plan) -> Plan | None:
    """Trains the trials of a plan, and returns the plan with the rates that they show.

    None if a signal stopped them.
    """
    trials = plan_trials(plan)
    while True:
        trial_plan = Plan(arms_of(trials))
        if not train_arms(values, directory / FAIR_FOLDER, trial_plan):
            return None
        losses = _losses(directory / FAIR_FOLDER)
        extended = extend_trials(trials, losses)
        if len(arms_of(extended)) == len(trial_plan.arms):
            break
        trials = extended
    rates = {key: find_rate(of_setting, losses) for key, of_setting in trials.items()}
    _log_rates(trials, rates)
    write_rates(directory, trials, rates)
    return with_fair_rates(plan, rates)


def _losses(directory: Path) -> dict[str, float]:
    """Returns the losses of the trials that got to their end, by the id of this version."""
    records = read_records(directory)
    column = loss_of(records)
    losses = {}
    for row in records.to_dict("records"):
        is_known = row["status"] == "done" and math.isfinite(row[column])
        losses[row["arm"]] = row[column] if is_known else math.nan
    return losses


def _log_rates(trials: Mapping[Hashable, Trials], rates: Mapping[Hashable, FairRate]) -> None:
    for key, found in rates.items():
        overrides = dict(trials[key].arm.overrides)
        overrides.pop(SEED.removeprefix("override/"), None)
        open_end = "" if found.is_bracketed else ", the last rate that was tried"
        log.info("fair: %s has %s=%g%s", describe(overrides), RATE, found.rate, open_end)
