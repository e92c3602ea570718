"""Fair learning rates: each setting of a sweep trains at its own best one.

Arms that share a learning rate are compared at the rate that suits one of them. Here trials come
first: a quarter of the steps, at five rates around the one that the recipe gives. The best of them
and its neighbours lie on a parabola in the logarithm of the rate, whose lowest point is taken for
the arms of the setting, at full length and for every seed. If the best is the last in its
direction, one more rate beyond it is tried, twice at most.

Trials have one seed, so they cost 5 to 7 quarters of one seed of the sweep. A longer training has
its best rate at a somewhat lower one; that is neglected for all settings alike.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from moejax.config import Config
from moejax.sweeps.arms import Arm, Plan
from moejax.sweeps.tables import setting_key

RATE = "optimizer.learning_rate"

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the rate that the recipe, or the setting, gives."""

SPACING = 2.0
"""Of neighbouring factors."""

MOST_BEYOND = 2
"""Further rates that are tried beyond the last in a direction."""

FRACTION = 0.25
"""Of the steps of an arm, which a trial has."""

DIGITS = 3
"""Significant ones of a rate that is found."""


@dataclasses.dataclass(frozen=True)
class Trials:
    """The trials of one setting.

    Attributes:
      arm: one of the setting's arms, of the first seed.
      arms: of the trials, by factor of the arm's learning rate, in increasing order.
    """

    arm: Arm
    arms: Mapping[float, Arm]


@dataclasses.dataclass(frozen=True)
class FairRate:
    """The learning rate that was found for a setting.

    Attributes:
      rate: the lowest point of the parabola, in three digits; the best trial's rate where its
        neighbours are not both known.
      rates: that were tried, increasing.
      losses: of the trials; NaN of one that did not get to its end.
      is_bracketed: whether the best trial has a worse one on both sides.
    """

    rate: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    is_bracketed: bool


def plan_trials(plan: Plan) -> dict[Hashable, Trials]:
    """Returns the first trials of each setting of a plan, by the key of the setting."""
    trials: dict[Hashable, Trials] = {}
    for arm in plan.arms:
        key = setting_key(arm.overrides)
        if key not in trials:
            trials[key] = Trials(arm, {factor: _trial_of(arm, factor) for factor in FACTORS})
    return trials


def _trial_of(arm: Arm, factor: float) -> Arm:
    """Returns the trial of an arm at a factor of its learning rate."""
    rate = _rounded(arm.config.optimizer.learning_rate * factor)
    num_steps = max(1, round(FRACTION * arm.config.train.num_steps))
    train = dataclasses.replace(arm.config.train, num_steps=num_steps, eval_every=0)
    config = with_rate(dataclasses.replace(arm.config, train=train), rate)
    overrides = {**arm.overrides, RATE: rate, "train.num_steps": num_steps}
    return Arm.from_config(config, overrides, arm.matched)


def with_rate(config: Config, rate: float) -> Config:
    """Returns a configuration with another learning rate."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")


def arms_of(trials: Mapping[Hashable, Trials]) -> tuple[Arm, ...]:
    """Returns the arms of all trials, each configuration once."""
    arms = {}
    for of_setting in trials.values():
        for arm in of_setting.arms.values():
            arms[arm.id] = arm
    return tuple(arms.values())


def extend_trials(
    trials: Mapping[Hashable, Trials], losses: Mapping[str, float]
) -> dict[Hashable, Trials]:
    """Returns trials with one more rate where the best is the last in its direction.

    Args:
      trials: that have ended.
      losses: of their arms, by id; of an arm that did not get to its end there is none.

    Returns:
      The same trials if none needs another rate, or may have one.
    """
    extended = {}
    for key, of_setting in trials.items():
        factors = sorted(of_setting.arms)
        best = _best(of_setting, losses)
        beyond = None
        if best == factors[0] and best > FACTORS[0] / SPACING**MOST_BEYOND:
            beyond = best / SPACING
        if best == factors[-1] and best < FACTORS[-1] * SPACING**MOST_BEYOND:
            beyond = best * SPACING
        if beyond is not None:
            arms = {**of_setting.arms, beyond: _trial_of(of_setting.arm, beyond)}
            of_setting = Trials(of_setting.arm, dict(sorted(arms.items())))
        extended[key] = of_setting
    return extended


def _best(trials: Trials, losses: Mapping[str, float]) -> float | None:
    """Returns the factor whose trial has the lowest loss; None if no trial has one."""
    known = {}
    for factor, arm in trials.arms.items():
        loss = losses.get(arm.id, math.nan)
        if math.isfinite(loss):
            known[factor] = loss
    return min(known, key=lambda factor: known[factor]) if known else None


def find_rate(trials: Trials, losses: Mapping[str, float]) -> FairRate:
    """Returns the learning rate of a setting whose trials have ended.

    Without any trial that got to its end, it is the rate that the setting has.
    """
    tried = [arm.config.optimizer.learning_rate for arm in trials.arms.values()]
    measured = [losses.get(arm.id, math.nan) for arm in trials.arms.values()]
    best = _best(trials, losses)
    if best is None:
        own = trials.arm.config.optimizer.learning_rate
        return FairRate(own, tuple(tried), tuple(measured), is_bracketed=False)
    place = [*trials.arms].index(best)
    around = slice(max(place - 1, 0), place + 2)
    neighbours = measured[around]
    is_bracketed = len(neighbours) == 3
    rate = tried[place]
    if is_bracketed and all(map(math.isfinite, neighbours)):
        rate = _lowest_point(tried[around], neighbours)
    return FairRate(_rounded(rate), tuple(tried), tuple(measured), is_bracketed)


def _lowest_point(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Returns where the parabola through three points in the logarithm of the rate is lowest."""
    curvature, slope, _ = np.polyfit(np.log(rates), losses, 2)
    # The middle is the lowest of the three, so that the vertex is between the others; three equal
    # losses make no parabola.
    if curvature <= 0:
        return rates[1]
    return math.exp(-slope / (2 * curvature))


def with_fair_rates(plan: Plan, rates: Mapping[Hashable, FairRate]) -> Plan:
    """Returns a plan whose arms have the learning rates of their settings, noted as matched."""
    arms = []
    changes = list(plan.changes)
    for arm in plan.arms:
        rate = rates[setting_key(arm.overrides)].rate
        config = with_rate(arm.config, rate)
        arms.append(Arm.from_config(config, arm.overrides, {**arm.matched, RATE: rate}))
    return Plan(tuple(arms), plan.duplicates, tuple(changes))
