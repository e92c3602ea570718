"""What curves are drawn against: steps, tokens, or the arithmetic or time that these cost."""

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
    axis: str,
    steps_S: Int64[np.ndarray, "S"],
    series: Series,
    flops_per_token: int | None,
) -> Float64[np.ndarray, "S"]:
    """Returns where steps are on an axis; between logged steps on a straight line.

    Args:
      axis: one of `AXES`.
      steps_S: of training.
      series: of the run.
      flops_per_token: of training, `Run.flops_per_token`.

    Returns:
      NaN everywhere if the run did not log it.
    """
    if axis == "steps":
        return steps_S.astype(np.float64)
    if axis == "time":
        logged_steps, seconds = seconds_trained(series)
        seconds_S = _interpolate(steps_S, logged_steps, seconds)
        return seconds_S / 60
    logged_steps, tokens = _finite(*series("tokens"))
    tokens_S = _interpolate(steps_S, logged_steps, tokens)
    if axis == "tokens":
        return tokens_S
    if flops_per_token is None:
        return np.full_like(tokens_S, np.nan)
    return tokens_S * flops_per_token


def seconds_trained(series: Series) -> tuple[Int64[np.ndarray, "S"], Float64[np.ndarray, "S"]]:
    """Returns steps, and the seconds that training took up to each.

    Compilation, evaluation and saving do not count. Where some lines of the log have no
    `perf/seconds`, seconds are tokens over tokens per second.
    """
    steps, speeds = _finite(*series(SPEED))
    second_steps, seconds = _finite(*series(SECONDS))
    if np.array_equal(steps, second_steps):
        return steps, np.cumsum(seconds)
    # A run that began before seconds were logged.
    token_steps, tokens = _finite(*series("tokens"))
    has_all_steps = np.array_equal(steps, token_steps)
    has_moved = np.all(speeds > 0)
    if not has_all_steps or not has_moved:
        none = np.zeros(0)
        return none.astype(steps.dtype), none
    new_tokens = np.diff(tokens, prepend=0.0)
    seconds = new_tokens / speeds
    return steps, np.cumsum(seconds)


def _finite(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps that have a value, and the values."""
    is_finite = np.isfinite(values)
    return steps[is_finite], values[is_finite]


def _interpolate(steps_S: np.ndarray, known_steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns values at steps, on straight lines from 0 at step 0; NaN if nothing is known."""
    if not known_steps.size:
        return np.full(len(steps_S), np.nan)
    steps_from_0 = np.append(0, known_steps)
    values_from_0 = np.append(0.0, values)
    return np.interp(steps_S, steps_from_0, values_from_0)
