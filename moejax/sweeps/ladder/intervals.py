"""Intervals of laws and their predictions, by a bootstrap over seeds."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from moejax.inspection.analysis.differences import CONFIDENCE
from moejax.sweeps.ladder.law import Law, fit_laws
from moejax.sweeps.ladder.results import Measurements, curve_of

NUM_SAMPLES = 400
"""Of the bootstrap: the ends of an interval of 95 % are the tenth values from each side."""

Interval = tuple[float, float]

NO_INTERVAL: Interval = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class LawSamples:
    """Laws fitted to samples of the seeds.

    Attributes:
      laws: of each sample, by arm; empty with one seed, which says nothing of noise.
    """

    laws: tuple[Mapping[str, Law], ...]

    def interval(self, arm: str, number: str) -> Interval:
        """Returns the interval of one number of an arm's law: "E", "A" or "a"."""
        return _middle([getattr(laws[arm], number) for laws in self.laws])

    def loss_interval(self, arm: str, budget: float) -> Interval:
        """Returns the interval of the loss that an arm's law predicts."""
        return _middle([laws[arm].loss(budget) for laws in self.laws])


def _middle(values: list[float]) -> Interval:
    """Returns the ends of the middle 95 % of values."""
    if not values:
        return NO_INTERVAL
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def sample_laws(
    measured: Measurements,
    laws: Mapping[str, Law],
    num_rungs: int,
    num_samples: int = NUM_SAMPLES,
) -> LawSamples:
    """Fits laws to resampled seeds.

    At each rung, seeds are drawn with replacement, the same for all arms, so that what arms of a
    seed share stays shared. Means of n drawn values scatter by sqrt((n - 1) / n) less than means of
    n new ones, which is made up for. The samples are the same each time.

    Args:
      measured: losses.
      laws: of the arms that have a loss at each of these rungs.
      num_rungs: how many, from the cheapest on, laws are fitted to.
      num_samples: of the bootstrap.
    """
    num_seeds = len(measured.seeds)
    if num_seeds < 2:
        return LawSamples(())
    random = np.random.default_rng(0)
    stretch = math.sqrt(num_seeds / (num_seeds - 1))
    stretched = {arm: _stretch(measured.loss[arm], stretch) for arm in laws}
    samples = []
    for _ in range(num_samples):
        drawn_RS = random.integers(num_seeds, size=(num_rungs, num_seeds))
        curves = {}
        for arm, loss_RS in stretched.items():
            sample_RS = np.take_along_axis(loss_RS[:num_rungs], drawn_RS, axis=1)
            curves[arm] = curve_of(measured.budgets[:num_rungs], sample_RS)
        # A sample may have drawn nothing but missing runs at a rung.
        if all(len(budgets) == num_rungs for budgets, _ in curves.values()):
            samples.append(fit_laws(curves, laws))
    return LawSamples(tuple(samples))


def _stretch(loss_RS: Float[np.ndarray, "R S"], factor: float) -> Float[np.ndarray, "R S"]:
    """Returns losses whose distances from the mean of their rung are longer by a factor."""
    known_RS = np.isfinite(loss_RS)
    total_R1 = np.where(known_RS, loss_RS, 0).sum(axis=1, keepdims=True)
    mean_R1 = total_R1 / np.maximum(known_RS.sum(axis=1, keepdims=True), 1)
    return mean_R1 + factor * (loss_RS - mean_R1)
