"""AdamW from optax, the schedule of its learning rate, and which parameters decay."""

from typing import Any

import jax
import optax
from flax import nnx

from moejax.config import Config, Knobs, OptimizerConfig

STACKED = ("layers", "experts", "gate_up", "heads", "kv_heads")
"""Axes of stacks: what has no other axis but one is a vector, however many are stacked."""


def make_optimizer(
    config: OptimizerConfig, params: nnx.State
) -> optax.GradientTransformationExtraArgs:
    """Makes AdamW with clipping by the global norm.

    `update` takes the learning rate of the step as a keyword, and returns what
    `optax.apply_updates` adds to the parameters.

    Args:
      config: the optimizer's leaves.
      params: parameters with their logical axes.
    """
    clip = optax.identity()
    if config.clip_norm:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, *adamw(config, params), scale_by_given_rate())


def adamw(config: OptimizerConfig, params: nnx.State) -> tuple[optax.GradientTransformation, ...]:
    """Returns the transformations of AdamW, between the clipping and the learning rate.

    Another optimizer is another function like this one. What treats groups of parameters in
    different ways takes a mask of them, as the decay does.
    """
    moments = optax.scale_by_adam(b1=config.beta1, b2=config.beta2)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(params))
    return moments, decay


def scale_by_given_rate() -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the `learning_rate` with which `update` is called.

    In `optax.scale_by_learning_rate` the rate is fixed or follows a count of its own. Here it is
    traced: a knob scales it, and it follows the step count of the run, which also counts skipped
    steps. The state holds no array.
    """

    def init(params: optax.Params) -> optax.OptState:
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        learning_rate: jax.Array,
        **others: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return optax.scale_by_learning_rate(learning_rate).update(updates, state)

    return optax.GradientTransformationExtraArgs(init, update)


def decay_mask(params: nnx.State) -> Any:
    """Returns True where weights decay: matrices.

    Norm scales and biases are vectors, however many are stacked.
    """

    def is_matrix(variable: nnx.Variable) -> nnx.Variable:
        own_axes = [axis for axis in variable.axes if axis not in STACKED]
        return variable.replace(len(own_axes) > 1)

    return jax.tree.map(is_matrix, params, is_leaf=lambda v: isinstance(v, nnx.Variable))


# The learning rate
# -------------------------------------------------------------------------------------------------


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
