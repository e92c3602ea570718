"""AdamW from optax, its schedule, and which parameters decay."""

from typing import Any

import jax
import optax
from flax import nnx

from moejax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Makes the schedule of the learning rate, as a fraction of its highest value.

    A linear warm-up, then cosine or linear decay, or 1 with a linear end (`wsd`). The schedule
    falls to `final_fraction` at `num_steps`, whatever the fractions round to, unless the warm-up is
    the whole run.
    """
    peak, last = 1.0, config.final_fraction
    warmup_steps = round(config.warmup_fraction * num_steps)
    if config.warmup_fraction < 1:
        warmup_steps = min(warmup_steps, num_steps - 1)
    rest = max(1, num_steps - warmup_steps)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, last, rest)
    else:
        # Warm-up and decay may each be rounded up: together they last no longer than the run.
        decay_steps = min(rest, max(1, round(config.decay_fraction * num_steps)))
        decay = optax.linear_schedule(peak, last, decay_steps, transition_begin=rest - decay_steps)
    if warmup_steps == 0:
        return decay
    # Step 0 already learns: the ramp starts one step above zero.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_optimizer(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    """Makes AdamW with clipping by the global norm, without the learning rate.

    The step multiplies by the scheduled rate itself, because the rate is scaled by a traced knob
    and follows the step count of the run, which also counts skipped steps.

    Args:
      config: the optimizer's leaves.
      params: parameters with their logical axes; norm scales do not decay.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(params)),
    )


def decay_mask(params: nnx.State) -> Any:
    """Returns True where weights decay: matrices.

    Norm scales and biases are vectors, however many are stacked.
    """
    stacked = ("layers", "experts", "gate_up")
    return jax.tree.map(
        lambda v: v.replace(len([axis for axis in v.axes if axis not in stacked]) > 1),
        params,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
