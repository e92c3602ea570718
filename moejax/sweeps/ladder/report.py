"""What a ladder says: laws of its arms, the top rung predicted from those below, a joint law."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.sweeps.ladder.intervals import NO_INTERVAL, Interval, LawSamples, sample_laws
from moejax.sweeps.ladder.joint import JointLaw, fit_joint_law, points_of
from moejax.sweeps.ladder.law import Law, LawError, fit_laws
from moejax.sweeps.ladder.results import Measurements

PROJECTED = 4.0
"""The budget of the projection over that of the top rung."""


@dataclasses.dataclass(frozen=True)
class FittedLaw:
    """The law of an arm over all rungs, with intervals over seeds."""

    law: Law
    E_interval: Interval
    A_interval: Interval
    a_interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Returns its numbers; None where there is no interval."""
        return {
            "E": self.law.E,
            "A": self.law.A,
            "a": self.law.a,
            "E_interval": _known(self.E_interval),
            "A_interval": _known(self.A_interval),
            "a_interval": _known(self.a_interval),
        }


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The loss at a budget from the law of an arm at cheaper ones.

    Attributes:
      budget: FLOPs.
      predicted: nats.
      interval: of the prediction, over seeds.
      measured: the mean over seeds; NaN of a projection.
    """

    budget: float
    predicted: float
    interval: Interval
    measured: float = math.nan

    @property
    def error(self) -> float:
        """What was predicted minus what was measured."""
        return self.predicted - self.measured

    def to_json(self) -> dict[str, Any]:
        """Returns its numbers; None where there is no interval or no measurement."""
        found = {
            "budget": self.budget,
            "predicted": self.predicted,
            "interval": _known(self.interval),
        }
        if not math.isnan(self.measured):
            found |= {"measured": self.measured, "error": self.error}
        return found


@dataclasses.dataclass(frozen=True)
class LadderReport:
    """All that is said of a ladder.

    Attributes:
      arms: a row for each arm at each rung.
      laws: by arm; empty if they cannot be fitted.
      predictions: of the top rung, by arm; empty if there are too few rungs below it.
      projections: beyond the top rung, by arm.
      joint: None if it cannot be fitted.
      notes: why something is missing, by what.
    """

    arms: Sequence[dict[str, Any]]
    laws: Mapping[str, FittedLaw]
    predictions: Mapping[str, Prediction]
    projections: Mapping[str, Prediction]
    joint: JointLaw | None
    notes: Mapping[str, str]

    @property
    def worst_prediction(self) -> tuple[str, Prediction] | None:
        """The arm whose top rung was predicted worst, with its prediction."""
        if not self.predictions:
            return None
        arm = max(self.predictions, key=lambda name: abs(self.predictions[name].error))
        return arm, self.predictions[arm]

    def to_json(self) -> dict[str, Any]:
        """Returns one JSON document; `prediction` is that of the arm that was predicted worst."""
        prediction = None
        if self.worst_prediction:
            arm, worst = self.worst_prediction
            by_arm = {name: found.to_json() for name, found in self.predictions.items()}
            prediction = {"arm": arm, **worst.to_json(), "by_arm": by_arm}
        return {
            "law": {arm: law.to_json() for arm, law in self.laws.items()},
            "prediction": prediction,
            "projection": {arm: found.to_json() for arm, found in self.projections.items()},
            "joint_law": dataclasses.asdict(self.joint) if self.joint else None,
            "arms": list(self.arms),
            "notes": dict(self.notes),
        }


def report_of(measured: Measurements, scans: Sequence[Measurements] = ()) -> LadderReport:
    """Fits everything that a ladder's measurements determine.

    Args:
      measured: losses of the ladder.
      scans: other ladders, whose points the joint law is fitted to as well.
    """
    notes: dict[str, str] = {}
    laws: dict[str, FittedLaw] = {}
    projections: dict[str, Prediction] = {}
    predictions: dict[str, Prediction] = {}
    num_rungs = len(measured.budgets)
    try:
        laws, samples = _fit(measured, num_rungs)
        left_out = [arm for arm in measured.arms if arm not in laws]
        if left_out:
            notes["laws"] = f"not of {', '.join(left_out)}, which miss a rung"
        beyond = PROJECTED * measured.budgets[-1]
        projections = {arm: _predict(arm, laws, samples, beyond) for arm in laws}
    except LawError as error:
        notes["laws"] = str(error)
    try:
        below, samples = _fit(measured, num_rungs - 1)
        for arm in below:
            _, top = measured.curve(arm, [num_rungs - 1])
            if top:
                found = _predict(arm, below, samples, measured.budgets[-1])
                predictions[arm] = dataclasses.replace(found, measured=top[0])
    except LawError as error:
        notes["prediction"] = f"{error} below the top one"
    joint = None
    try:
        joint = fit_joint_law(points_of([measured, *scans]))
    except LawError as error:
        notes["joint law"] = str(error)
    return LadderReport(_arm_rows(measured), laws, predictions, projections, joint, notes)


def _fit(measured: Measurements, num_rungs: int) -> tuple[dict[str, FittedLaw], LawSamples]:
    """Fits the laws of the arms that have ended at all of the cheapest rungs."""
    curves = {}
    for arm in measured.arms:
        budgets, losses = measured.curve(arm, range(num_rungs))
        if len(budgets) == num_rungs:
            curves[arm] = (budgets, losses)
    laws = fit_laws(curves)
    samples = sample_laws(measured, laws, num_rungs)
    fitted = {}
    for arm, law in laws.items():
        intervals = [samples.interval(arm, number) for number in ("E", "A", "a")]
        fitted[arm] = FittedLaw(law, *intervals)
    return fitted, samples


def _predict(
    arm: str, laws: Mapping[str, FittedLaw], samples: LawSamples, budget: float
) -> Prediction:
    return Prediction(budget, laws[arm].law.loss(budget), samples.loss_interval(arm, budget))


def _arm_rows(measured: Measurements) -> list[dict[str, Any]]:
    rows = []
    for arm in measured.arms:
        for rung, budget in enumerate(measured.budgets):
            known = measured.loss[arm][rung][np.isfinite(measured.loss[arm][rung])]
            seconds = measured.seconds[arm][rung][np.isfinite(measured.seconds[arm][rung])]
            rows.append(
                {
                    "arm": arm,
                    "budget": budget,
                    "params_active": _whole(measured.params_active[arm][rung]),
                    "params_total": _whole(measured.params_total[arm][rung]),
                    "tokens": _whole(measured.tokens[arm][rung]),
                    "loss": float(known.mean()) if known.size else None,
                    "se": _standard_error(known),
                    "seeds": int(known.size),
                    "seconds": float(np.median(seconds)) if seconds.size else None,
                }
            )
    return rows


def _standard_error(values: np.ndarray) -> float | None:
    if values.size < 2:
        return None
    return float(values.std(ddof=1)) / math.sqrt(values.size)


def _whole(value: float) -> int | None:
    return None if math.isnan(value) else int(value)


def _known(interval: Interval) -> list[float] | None:
    return None if interval is NO_INTERVAL or math.isnan(interval[0]) else list(interval)
