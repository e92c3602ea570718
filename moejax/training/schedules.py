"""Knobs as functions of the step, by optax's schedules."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from moejax.config import Config, Knobs, Schedule, parse_schedule

SCHEDULES: dict[str, Callable[[Schedule, int], optax.Schedule]] = {
    "constant": lambda schedule, steps: optax.constant_schedule(1.0),
    "linear": lambda schedule, steps: optax.linear_schedule(1.0, schedule.end, steps),
    "cosine": lambda schedule, steps: _between(
        optax.cosine_decay_schedule(1.0, steps), schedule.end
    ),
    "exponential": lambda schedule, steps: optax.exponential_decay(
        1.0, steps, schedule.end, end_value=schedule.end
    ),
    "step": lambda schedule, steps: optax.join_schedules(
        [optax.constant_schedule(1.0), optax.constant_schedule(schedule.end)],
        [round(schedule.fraction * steps)],
    ),
    "warmup": lambda schedule, steps: optax.linear_schedule(
        0.0, 1.0, max(1, round(schedule.fraction * steps))
    ),
}
"""By name: from a parsed schedule and the number of steps to the factor on a knob; see
`config/sections/schedules.py`."""


def scheduled(knobs: Knobs, config: Config, step: jax.Array) -> Knobs:
    """The knobs of a step: as given, times the factors that the configuration schedules.

    Args:
      knobs: of the run.
      config: for `schedule` and `train.num_steps`.
      step: steps done, int32 scalar.
    """
    changed = {
        name: getattr(knobs, name) * factor(config, name, step)
        for name in scheduled_leaves(config)
        if name != "top_k"  # no knob: `router_state.schedule_router_state` limits the choices
    }
    return dataclasses.replace(knobs, **changed)


def factor(config: Config, name: str, step: jax.Array) -> jax.Array:
    """The factor of a leaf of `schedule` after that many steps, float32."""
    schedule = parse_schedule(f"schedule.{name}", getattr(config.schedule, name))
    # The last step is number num_steps - 1: it sees the end.
    return jnp.float32(SCHEDULES[schedule.name](schedule, max(1, config.train.num_steps - 1))(step))


def scheduled_leaves(config: Config) -> list[str]:
    """The leaves of `schedule` that are not constant."""
    return [
        name for name, text in dataclasses.asdict(config.schedule).items() if text != "constant"
    ]


def _between(falling: optax.Schedule, end: float) -> optax.Schedule:
    """From 1 to `end` along a schedule that falls from 1 to 0."""
    return lambda step: end + (1.0 - end) * falling(step)
