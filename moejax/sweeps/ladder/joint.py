"""The joint law of losses in active parameters, total parameters and tokens, over all arms.

    L = E + A N^-n (M / N)^-m + B D^-d

with N active and M total parameters and D tokens. With M = N it is the law of Hoffmann et al. 2022;
the factor of M / N says what parameters are worth that are there and not used at once, as in the
laws of Abnar et al. 2025, which take the sparsity 1 - N / M in its place.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from moejax.sweeps.ladder.law import HUBER, LawError
from moejax.sweeps.ladder.results import Measurements

NUMBERS = ("E", "A", "n", "m", "B", "d")

LARGEST_CONDITION = 1e7
"""Of the residuals' derivatives, scaled to length 1: beyond, points do not determine the law."""


@dataclasses.dataclass(frozen=True)
class JointLaw:
    """The numbers of the law, see the module.

    Attributes:
      E: nats.
      A: nats, at one active parameter of a dense model.
      n: exponent of active parameters.
      m: exponent of total over active parameters.
      B: nats, at one token.
      d: exponent of tokens.
      num_points: that it was fitted to.
      worst: the largest relative residual of the loss.
    """

    E: float
    A: float
    n: float
    m: float
    B: float
    d: float
    num_points: int
    worst: float

    def loss(self, active: float, total: float, tokens: float) -> float:
        """Returns the loss of a model after some tokens."""
        of_model = self.A * active**-self.n * (total / active) ** -self.m
        return self.E + of_model + self.B * tokens**-self.d


@dataclasses.dataclass(frozen=True)
class Points:
    """Measured points of a joint law, one after the other.

    Attributes:
      active_P: active parameters.
      total_P: all parameters.
      tokens_P: trained on.
      loss_P: means over seeds, nats.
    """

    active_P: Float[np.ndarray, "P"]
    total_P: Float[np.ndarray, "P"]
    tokens_P: Float[np.ndarray, "P"]
    loss_P: Float[np.ndarray, "P"]


def points_of(several: Sequence[Measurements]) -> Points:
    """Returns the means over seeds of all arms at all rungs of several ladders."""
    rows = []
    for measured in several:
        for arm in measured.arms:
            for rung in range(len(measured.budgets)):
                _, losses = measured.curve(arm, [rung])
                if losses:
                    active = measured.params_active[arm][rung]
                    total = measured.params_total[arm][rung]
                    rows.append((active, total, measured.tokens[arm][rung], losses[0]))
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return Points(*columns)


def fit_joint_law(points: Points) -> JointLaw:
    """Fits the joint law.

    Raises:
      LawError: the points do not determine it, as where one rule ties tokens to parameters and no
        other sizes were trained.
    """
    num_points = len(points.loss_P)
    if num_points <= len(NUMBERS):
        raise LawError(
            f"{num_points} points do not determine a joint law of {len(NUMBERS)} numbers; train "
            "more arms or rungs"
        )
    if np.ptp(np.log(points.total_P / points.active_P)) < 0.1:
        raise LawError(
            "all arms have the same ratio of total to active parameters; train a dense arm, too"
        )
    scales = [_middle_of(values) for values in (points.active_P, points.tokens_P)]
    fits = [_improve(points, scales, start) for start in _starts(points)]
    best = min(fits, key=lambda fit: fit.cost)
    _check_determined(best.jac)
    E, log_A, n, m, log_B, d = best.x
    return JointLaw(
        E=float(E),
        A=math.exp(log_A + n * scales[0]),
        n=float(n),
        m=float(m),
        B=math.exp(log_B + d * scales[1]),
        d=float(d),
        num_points=num_points,
        worst=float(np.abs(np.expm1(_residuals(best.x, points, scales))).max()),
    )


def _middle_of(values: np.ndarray) -> float:
    return float(np.log(values).mean())


def _starts(points: Points) -> list[np.ndarray]:
    lowest = float(points.loss_P.min())
    rest = float(np.median(points.loss_P))
    starts = []
    for part in (0.2, 0.5, 0.8):
        for of_model in (0.3, 0.7):
            E = part * lowest
            log_A = math.log((rest - E) * of_model)
            log_B = math.log((rest - E) * (1 - of_model))
            starts.append(np.array([E, log_A, 0.3, 0.1, log_B, 0.3]))
    return starts


def _residuals(theta: np.ndarray, points: Points, scales: Sequence[float]) -> np.ndarray:
    E, log_A, n, m, log_B, d = theta
    log_active_P = np.log(points.active_P)
    log_ratio_P = np.log(points.total_P) - log_active_P
    of_model_P = np.exp(log_A - n * (log_active_P - scales[0]) - m * log_ratio_P)
    of_tokens_P = np.exp(log_B - d * (np.log(points.tokens_P) - scales[1]))
    return np.log(E + of_model_P + of_tokens_P) - np.log(points.loss_P)


def _improve(points: Points, scales: Sequence[float], start: np.ndarray):
    lowest = float(points.loss_P.min())
    low = [0.0, -50.0, 1e-3, -1.0, -50.0, 1e-3]
    high = [lowest, 50.0, 3.0, 3.0, 50.0, 3.0]
    return least_squares(
        _residuals,
        start,
        bounds=(low, high),
        loss="huber",
        f_scale=HUBER,
        x_scale="jac",
        args=(points, scales),
        max_nfev=2000,
    )


def _check_determined(jacobian_PT: np.ndarray) -> None:
    lengths_T = np.linalg.norm(jacobian_PT, axis=0)
    if not lengths_T.all() or np.linalg.cond(jacobian_PT / lengths_T) > LARGEST_CONDITION:
        raise LawError(
            "the points do not tell what parameters and what tokens are worth, as one rule ties "
            "the two; train other sizes at one budget (model.d_model=... as an axis) and name that "
            "folder, too"
        )
