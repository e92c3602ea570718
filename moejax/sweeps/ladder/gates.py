"""The gate that a recipe states before anything is trained, and the smallest effect one can see."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from scipy.special import stdtrit

from moejax.config import nearest
from moejax.inspection.analysis.differences import student_quantile
from moejax.sweeps.arms import SweepError

POWER = 0.8
"""How often a ladder of the stated size sees an effect of the size that it is said to see."""


@dataclasses.dataclass(frozen=True)
class GateRule:
    """What a candidate must reach, written in the recipe before anything is trained.

    Attributes:
      speedup: the effective speed-up in FLOPs at the top rung that a candidate is to exceed.
      noise: standard deviation over seeds of the difference of two arms of one seed, in nats, as
        earlier runs showed it; 0 if it is not known.
    """

    speedup: float = 1.0
    noise: float = 0.0

    @classmethod
    def from_recipe(cls, found: Mapping[str, Any]) -> "GateRule":
        """Returns the rule that a recipe's `gate()` gives.

        Raises:
          SweepError: another key, or a number that cannot be.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key, value in found.items():
            if key not in names:
                raise SweepError(
                    f"gate() gives {key}, which is no rule; the nearest is {nearest(key, names)}"
                )
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                raise SweepError(f"gate() gives {key}={value!r}; it must be a number from 0 on")
        return cls(**{key: float(value) for key, value in found.items()})

    def detectable(self, num_seeds: int, num_candidates: int = 1) -> float | None:
        """Returns the smallest difference in nats that seeds let one see; None if not known."""
        if not self.noise or num_seeds < 2:
            return None
        return smallest_detectable(self.noise, num_seeds, num_candidates)


def smallest_detectable(noise: float, num_seeds: int, num_candidates: int = 1) -> float:
    """Returns the difference that is told apart from zero in 8 of 10 ladders.

    Args:
      noise: standard deviation over seeds of the difference of two arms of one seed.
      num_seeds: of each arm, at least 2.
      num_candidates: arms that are compared with the baseline together.

    The sum of two quantiles of Student's distribution, of the interval and of the power, in
    standard errors. A test compares it with simulated ladders.
    """
    of_power = float(stdtrit(num_seeds - 1, POWER))
    reach = student_quantile(num_seeds, num_candidates) + of_power
    return reach * noise / math.sqrt(num_seeds)
