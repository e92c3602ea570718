"""The learning rate of each step."""

import jax
import optax

from moejax.config import Config, Knobs, OptimizerConfig


def learning_rate_at(config: Config, knobs: Knobs, step: jax.Array) -> jax.Array:
    """Returns the learning rate of a step: the knob, times what the schedule leaves of it."""
    schedule = make_schedule(config.optimizer, config.train.num_steps)
    return schedule(step) * knobs.learning_rate


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Makes the schedule of the learning rate, as a fraction of its highest value.

    A linear warm-up, then cosine or linear decay, or 1 with a linear end (`wsd`). The schedule
    falls to `final_fraction` at `num_steps`, whatever the fractions round to, unless the warm-up is
    the whole run.
    """
    warmup_steps = round(config.warmup_fraction * num_steps)
    if config.warmup_fraction < 1:
        warmup_steps = min(warmup_steps, num_steps - 1)
    decay = _make_decay(config, num_steps, max(1, num_steps - warmup_steps))
    if warmup_steps == 0:
        return decay
    # Step 0 already learns: the ramp starts one step above zero.
    first = 1.0 / warmup_steps
    warmup = optax.linear_schedule(first, 1.0, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


def _make_decay(config: OptimizerConfig, num_steps: int, rest: int) -> optax.Schedule:
    """Makes the part of the schedule after the warm-up, over `rest` of the run's steps."""
    last = config.final_fraction
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(1.0, rest, alpha=last)
    if config.schedule == "linear":
        return optax.linear_schedule(1.0, last, rest)
    # Warm-up and decay may each be rounded up: together they last no longer than the run.
    wanted = max(1, round(config.decay_fraction * num_steps))
    decay_steps = min(rest, wanted)
    return optax.linear_schedule(1.0, last, decay_steps, transition_begin=rest - decay_steps)
