"""Weights of a run as they are saved, averaged as it trained, or averaged over checkpoints."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints

MOVING = "moving"
"""The average that a run keeps as it trains (`train.average_decay`)."""


def restore_weights(
    checkpoints: Checkpoints, step: int | None = None, average: str = ""
) -> tuple[int, Any, Any]:
    """Returns (step, params, router_state) of a run.

    Args:
      checkpoints: of the run.
      step: a saved step; None takes the newest.
      average: "" for the weights of the step; "moving" for the average that the run keeps; a number
        for the mean of that many checkpoints, the step's and those before it, with the routers'
        state of the step.

    Raises:
      CheckpointError: there is no such step or average, or a step is damaged.
    """
    if not average:
        return checkpoints.restore_model(step)
    if average == MOVING:
        return _moving_average(checkpoints, step)
    return _mean_of_checkpoints(checkpoints, step, _read_number(average))


def _moving_average(checkpoints: Checkpoints, step: int | None) -> tuple[int, Any, Any]:
    if checkpoints.setup.abstract.average is None:
        raise CheckpointError(
            f"{checkpoints.folder} holds no moving average of the weights; train with "
            "train.average_decay above 0, or leave --average out"
        )
    state = checkpoints.restore(step)
    if state is None:
        raise CheckpointError(
            f"{checkpoints.folder} holds no complete checkpoint; train the run first"
        )
    return int(state.step), state.average, state.router_state


def _read_number(average: str) -> int:
    if not average.isdecimal() or int(average) < 2:
        raise CheckpointError(
            f"--average={average} must be {MOVING}, or a number of checkpoints from 2 on"
        )
    return int(average)


def _mean_of_checkpoints(
    checkpoints: Checkpoints, step: int | None, number: int
) -> tuple[int, Any, Any]:
    saved = [each for each in checkpoints.steps() if step is None or each <= step]
    if len(saved) < number:
        raise CheckpointError(
            f"{checkpoints.folder} holds {len(saved)} checkpoints up to the step, {saved}, and "
            f"--average={number} needs as many; keep more (train.keep_checkpoints), or average less"
        )
    last, total, router_state = checkpoints.restore_model(saved[-1] if step is None else step)
    for earlier in saved[-number:-1]:
        _, params, _ = checkpoints.restore_model(earlier)
        total = jax.tree.map(jnp.add, total, params)
    mean = jax.tree.map(lambda array: array / number, total)
    return last, mean, router_state
