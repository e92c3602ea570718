"""Is a candidate worth its compute? Effective speed-ups over a baseline, and a verdict.

The speed-up of a candidate at a rung is the compute with which the baseline would reach the
candidate's loss, over the compute of the rung. The baseline's law says which compute that is, moved
so that the law goes through the baseline's own mean at the rung: a baseline has a speed-up of
exactly 1 over itself.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from moejax.inspection.analysis.differences import Difference, mean_difference
from moejax.sweeps.arms import SweepError
from moejax.sweeps.ladder.gates import GateRule
from moejax.sweeps.ladder.law import Law
from moejax.sweeps.ladder.results import Measurements

Verdict = Literal["works", "does not", "not told apart"]


@dataclasses.dataclass(frozen=True)
class SpeedUp:
    """An effective speed-up with its interval.

    Attributes:
      value: NaN if it is not known; infinity if the baseline reaches the loss with no compute.
      low: the lower end of the interval; NaN without one.
      high: the upper end.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan

    def times(self, factor: float) -> "SpeedUp":
        """Returns the speed-up in another unit."""
        return SpeedUp(self.value * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate next to a baseline at one rung.

    Attributes:
      budget: FLOPs of the rung.
      gain: loss of the baseline minus that of the candidate, of pairs of one seed.
      flops: the effective speed-up in FLOPs.
      time: that in seconds of training.
      is_extrapolated: whether the baseline reaches the candidate's loss only beyond its top rung.
    """

    budget: float
    gain: Difference
    flops: SpeedUp
    time: SpeedUp
    is_extrapolated: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison; None where something is not known or beyond all numbers."""
        return {
            "budget": self.budget,
            "gain": _finite(self.gain.mean),
            "gain_interval": _finite_ends(self.gain.low, self.gain.high),
            "seeds": self.gain.num_seeds,
            "flops_speedup": _finite(self.flops.value),
            "flops_interval": _finite_ends(self.flops.low, self.flops.high),
            "time_speedup": _finite(self.time.value),
            "time_interval": _finite_ends(self.time.low, self.time.high),
            "is_extrapolated": self.is_extrapolated,
        }


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What is said of a candidate.

    Attributes:
      candidate: its name.
      rungs: comparisons at the rungs that both have.
      verdict: at the top one of them.
      gate: the speed-up that was to be exceeded.
    """

    candidate: str
    rungs: tuple[Comparison, ...]
    verdict: Verdict
    gate: float

    def to_json(self) -> dict[str, Any]:
        """Returns the judgement; None where something is not known or beyond all numbers."""
        return {
            "candidate": self.candidate,
            "verdict": self.verdict,
            "gate": self.gate,
            "rungs": [rung.to_json() for rung in self.rungs],
        }


def judge(
    baseline: tuple[Measurements, str],
    candidate: tuple[Measurements, str],
    law: Law,
    gate: GateRule,
    num_candidates: int = 1,
) -> Judgement:
    """Compares a candidate with a baseline at every rung that both have.

    Args:
      baseline: measurements and the name of an arm of theirs.
      candidate: likewise.
      law: of the baseline.
      gate: what the candidate is to exceed.
      num_candidates: compared with the baseline together; intervals are wider for it (Bonferroni).

    Raises:
      SweepError: the two have no rung in common that was measured.
    """
    budgets = [budget for budget in baseline[0].budgets if budget in candidate[0].budgets]
    rungs = []
    for budget in budgets:
        found = _compare(baseline, candidate, law, budget, num_candidates)
        if found.gain.num_pairs:
            rungs.append(found)
    if not rungs:
        raise SweepError(
            f"{baseline[1]} and {candidate[1]} have no rung and seed in common that both have "
            "ended; train equal budgets and seeds of both"
        )
    verdict = _verdict(rungs[-1].flops, gate.speedup)
    return Judgement(candidate[1], tuple(rungs), verdict, gate.speedup)


def _compare(
    baseline: tuple[Measurements, str],
    candidate: tuple[Measurements, str],
    law: Law,
    budget: float,
    num_candidates: int,
) -> Comparison:
    base, base_arm = baseline
    other, other_arm = candidate
    base_S = base.loss[base_arm][base.budgets.index(budget)]
    other_S = other.loss[other_arm][other.budgets.index(budget)]
    gains = []
    for place, seed in enumerate(base.seeds):
        if seed in other.seeds:
            gains.append(base_S[place] - other_S[other.seeds.index(seed)])
    gain = mean_difference(np.array([gains]), num_candidates)

    def speedup(nats: float) -> float:
        if math.isnan(nats):
            return math.nan
        return law.budget(law.loss(budget) - nats) / budget

    flops = SpeedUp(speedup(gain.mean), speedup(gain.low), speedup(gain.high))
    top = max(base.budgets)
    return Comparison(
        budget=budget,
        gain=gain,
        flops=flops,
        time=flops.times(_ratio_of_seconds(baseline, candidate, budget)),
        is_extrapolated=flops.value * budget > top,
    )


def _ratio_of_seconds(
    baseline: tuple[Measurements, str], candidate: tuple[Measurements, str], budget: float
) -> float:
    """Returns the seconds of the baseline at a rung over those of the candidate, of medians."""
    medians = []
    for measured, arm in (baseline, candidate):
        seconds_S = measured.seconds[arm][measured.budgets.index(budget)]
        known = seconds_S[np.isfinite(seconds_S)]
        medians.append(float(np.median(known)) if known.size else math.nan)
    return medians[0] / medians[1] if medians[1] else math.nan


def _verdict(flops: SpeedUp, gate: float) -> Verdict:
    if flops.low > gate:
        return "works"
    if flops.high < gate:
        return "does not"
    return "not told apart"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_ends(low: float, high: float) -> list[float | None] | None:
    """Returns the ends of an interval, of which the upper may be beyond all numbers."""
    return None if math.isnan(low) else [_finite(low), _finite(high)]
