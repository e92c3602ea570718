"""The law L = E + A C^-a of losses over compute, fitted robustly.

E is the loss that no model of any size goes below, the entropy of the text. It belongs to the data,
so the arms of a ladder share it; A and a belong to each arm. The fit minimises a Huber loss of the
residuals of log L, as Hoffmann et al. 2022 (section D.2) do: one bad run moves it little.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

HUBER = 1e-3
"""Residuals of log L above it count by their size, and not by its square."""

LEAST_RUNGS = 3
"""Of an arm: the law has three numbers."""

LARGEST_EXPONENT = 3.0
SMALLEST_EXPONENT = 1e-3

Curve = tuple[Sequence[float], Sequence[float]]
"""Budgets in FLOPs, and the loss at each."""


class LawError(ValueError):
    """Losses that determine no law."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L = E + A C^-a.

    Attributes:
      E: nats that no compute saves.
      A: nats times FLOPs to the power of a.
      a: the exponent.
    """

    E: float
    A: float
    a: float

    def loss(self, budget: float) -> float:
        """Returns the loss at a budget in FLOPs."""
        return self.E + self.A * budget**-self.a

    def budget(self, loss: float) -> float:
        """Returns the FLOPs that reach a loss; infinity if none do."""
        if loss <= self.E:
            return math.inf
        log_budget = (math.log(self.A) - math.log(loss - self.E)) / self.a
        # Of a flat law even a small difference is worth more than a float can hold.
        return math.exp(log_budget) if log_budget < 700 else math.inf


def fit_laws(curves: Mapping[str, Curve], near: Mapping[str, Law] | None = None) -> dict[str, Law]:
    """Fits the laws of several arms, which share E.

    Args:
      curves: losses over budgets, by arm.
      near: laws of nearly the same losses, from which the fit starts; None tries several starts.

    Raises:
      LawError: an arm with fewer than three rungs, or losses that are not positive.
    """
    _check(curves)
    scaled = _Scaled.from_curves(curves)
    starts = scaled.best_starts() if near is None else [scaled.start_at(near)]
    return scaled.fit(starts)


def _check(curves: Mapping[str, Curve]) -> None:
    if not curves:
        raise LawError("no arm has ended at all rungs")
    for name, (budgets, losses) in curves.items():
        if len(set(budgets)) < LEAST_RUNGS:
            raise LawError(
                f"{name} has losses at {len(set(budgets))} rungs, and a law of three numbers "
                f"needs {LEAST_RUNGS}; train more budgets"
            )
        if not min(losses) > 0:
            raise LawError(f"{name} has a loss of {min(losses)}, and a law is of positive losses")


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """Curves of all arms in one table, with budgets in units of their geometric mean.

    Attributes:
      names: of the arms.
      unit: the logarithm of the geometric mean of all budgets.
      arm_P: the number of the arm of each point.
      x_P: log budgets over the unit.
      loss_P: losses.
    """

    names: tuple[str, ...]
    unit: float
    arm_P: np.ndarray
    x_P: np.ndarray
    loss_P: np.ndarray

    @classmethod
    def from_curves(cls, curves: Mapping[str, Curve]) -> "_Scaled":
        arms: list[int] = []
        logs: list[float] = []
        losses: list[float] = []
        for number, (budgets, values) in enumerate(curves.values()):
            arms += [number] * len(budgets)
            logs += [math.log(budget) for budget in budgets]
            losses += list(values)
        unit = float(np.mean(logs))
        return cls(tuple(curves), unit, np.array(arms), np.array(logs) - unit, np.array(losses))

    def best_starts(self) -> list[np.ndarray]:
        """Returns the best of several values of E, with what follows for the arms."""
        lowest = float(self.loss_P.min())
        starts = [self._start(lowest * part) for part in np.linspace(0.02, 0.98, 25)]
        starts.sort(key=self._cost)
        return starts[:3]

    def start_at(self, laws: Mapping[str, Law]) -> np.ndarray:
        """Returns the parameters of known laws."""
        own = [laws[name] for name in self.names]
        E = min(own[0].E, 0.999 * float(self.loss_P.min()))
        log_A_K = [math.log(law.A) - law.a * self.unit for law in own]
        return np.array([E, *log_A_K, *[law.a for law in own]])

    def fit(self, starts: Sequence[np.ndarray]) -> dict[str, Law]:
        """Returns the laws by arm, from the best of several starts."""
        lowest = float(self.loss_P.min())
        found = [self._improve(start, lowest) for start in starts]
        theta = min(found, key=self._cost)
        E, log_A_K, a_K = self._split(theta)
        laws = {}
        for number, name in enumerate(self.names):
            a = float(a_K[number])
            laws[name] = Law(float(E), math.exp(log_A_K[number] + a * self.unit), a)
        return laws

    def _split(self, theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Returns E, and the logarithm of A in the budgets' unit and the exponent of each arm."""
        num_arms = len(self.names)
        return float(theta[0]), theta[1 : 1 + num_arms], theta[1 + num_arms :]

    def _start(self, E: float) -> np.ndarray:
        """Returns the least squares of log(L - E), which is linear in log C, for a given E."""
        log_A_K = []
        a_K = []
        for number in range(len(self.names)):
            is_own = self.arm_P == number
            slope, intercept = np.polyfit(self.x_P[is_own], np.log(self.loss_P[is_own] - E), 1)
            log_A_K.append(intercept)
            a_K.append(np.clip(-slope, 2 * SMALLEST_EXPONENT, LARGEST_EXPONENT / 2))
        return np.array([E, *log_A_K, *a_K])

    def _residuals(self, theta: np.ndarray) -> Float[np.ndarray, "P"]:
        E, log_A_K, a_K = self._split(theta)
        power_P = np.exp(log_A_K[self.arm_P] - a_K[self.arm_P] * self.x_P)
        return np.log(E + power_P) - np.log(self.loss_P)

    def _jacobian(self, theta: np.ndarray) -> Float[np.ndarray, "P T"]:
        """Returns the derivatives of the residuals."""
        E, log_A_K, a_K = self._split(theta)
        power_P = np.exp(log_A_K[self.arm_P] - a_K[self.arm_P] * self.x_P)
        is_own_PK = self.arm_P[:, None] == np.arange(len(self.names))[None]
        of_E_P1 = 1 / (E + power_P)[:, None]
        of_A_PK = power_P[:, None] * of_E_P1 * is_own_PK
        return np.concatenate([of_E_P1, of_A_PK, -self.x_P[:, None] * of_A_PK], axis=1)

    def _cost(self, theta: np.ndarray) -> float:
        """Returns the Huber loss of the residuals, as `least_squares` defines it."""
        squares_P = np.square(self._residuals(theta) / HUBER)
        huber_P = np.where(squares_P <= 1, squares_P, 2 * np.sqrt(squares_P) - 1)
        return float(huber_P.sum())

    def _improve(self, start: np.ndarray, lowest: float) -> np.ndarray:
        num_arms = len(self.names)
        low = [0.0] + [-50.0] * num_arms + [SMALLEST_EXPONENT] * num_arms
        high = [lowest] + [50.0] * num_arms + [LARGEST_EXPONENT] * num_arms
        inside = np.clip(start, np.array(low) + 1e-9, np.array(high) - 1e-9)
        found = least_squares(
            self._residuals,
            inside,
            self._jacobian,
            bounds=(low, high),
            loss="huber",
            f_scale=HUBER,
            x_scale="jac",
        )
        return found.x
