"""What curves are drawn against: steps, tokens, the arithmetic that these cost, or the time that they took."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float64, Int64

from moejax.training.health.speed import SECONDS, SPEED

AXES = {
    "steps": "training step",
    "tokens": "training tokens",
    "compute": "training FLOPs",
    "time": "training time, minutes",
}
"""Labels of the axes."""

NAMES = {"steps": "steps", "tokens": "tokens", "compute": "FLOPs", "time": "time"}
"""What the axes are called in a title."""

Series = Callable[[str], tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]]
"""From a metric's name to its steps and values, as `Run.series`."""


def place(
    axis: str, steps_S: Int64[np.ndarray, "S"], series: Series, flops_per_token: int | None
) -> Float64[np.ndarray, "S"]:
    """Where steps are on an axis; between logged steps on a straight line.

    Args:
      axis: one of `AXES`.
      steps_S: of training.
      series: of the run.
      flops_per_token: of training, `Run.flops_per_token`.

    Returns:
      NaN everywhere if the run does not tell.
    """
    if axis == "steps":
        return steps_S.astype(np.float64)
    if axis == "time":
        return _along(steps_S, *seconds_trained(series)) / 60
    tokens_S = _along(steps_S, *_finite(*series("tokens")))
    if axis == "tokens":
        return tokens_S
    return tokens_S * (np.nan if flops_per_token is None else flops_per_token)


def seconds_trained(series: Series) -> tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]:
    """Steps, and the seconds that training took up to each: without compilation, evaluation and saving.

    Where some lines of the log have no `perf/seconds`, they are tokens over tokens per second.
    """
    steps, speeds = _finite(*series(SPEED))
    second_steps, seconds = _finite(*series(SECONDS))
    if np.array_equal(steps, second_steps):
        return steps, np.cumsum(seconds)
    token_steps, tokens = _finite(*series("tokens"))  # begun before seconds were logged
    if not np.array_equal(steps, token_steps) or not (speeds > 0).all():
        return steps[:0], speeds[:0]
    return steps, np.cumsum(np.diff(tokens, prepend=0.0) / speeds)


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    is_finite = np.isfinite(values)
    return steps[is_finite], values[is_finite]


def _along(steps_S: np.ndarray, known_steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values at steps, on straight lines from 0 at step 0 through what is known; NaN if nothing is."""
    if not known_steps.size:
        return np.full(len(steps_S), np.nan)
    return np.interp(steps_S, np.append(0, known_steps), np.append(0.0, values))
