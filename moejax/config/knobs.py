"""The traced scalars of a configuration."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.config.loss_specs import with_loss_weights
from moejax.config.sections.root import Config

NOT_OF_MOE = ("seed", "learning_rate", "logit_z_weight")
"""Knobs whose leaves are in other sections than `moe`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@with_loss_weights(jax.Array)
class Knobs:
    """Traced float32 scalars, which change no array shape.

    So changing them recompiles nothing, and they can be `vmap`ped. Each but the first three has the
    name of its leaf in `moe`. Where that leaf is 0, its term may be left out of the compiled
    program, and the knob has no effect.

    Attributes:
      seed: `train.seed`, int32, for the random draws of training; the initial weights and the order
        of rows take it from the configuration.
      learning_rate: `optimizer.learning_rate`, the highest; the schedule multiplies it.
      logit_z_weight: `train.logit_z_weight`.
      capacity_factor: limits the slots used per expert; buffers have the size of
        `moe.capacity_factor`, so larger values have no effect.
      jitter: half the width of the uniform factor on the router's input.
      noise_scale: multiplies the noise on the logits.
      bias_rate: step of the selection bias.
      expert_dropout: fraction of choices whose output is dropped.
      NAME_weight: coefficient of each layer's loss NAME, for every loss of `LOSS_SPECS`.
    """

    seed: jax.Array
    learning_rate: jax.Array
    logit_z_weight: jax.Array
    capacity_factor: jax.Array
    jitter: jax.Array
    noise_scale: jax.Array
    bias_rate: jax.Array
    expert_dropout: jax.Array

    @classmethod
    def from_config(cls, config: Config) -> "Knobs":
        """Returns the knobs as the configuration sets them."""
        of_moe = {}
        for name in cls.names_of_moe():
            value = getattr(config.moe, name)
            of_moe[name] = jnp.float32(value)
        return cls(
            seed=jnp.int32(config.train.seed),
            learning_rate=jnp.float32(config.optimizer.learning_rate),
            logit_z_weight=jnp.float32(config.train.logit_z_weight),
            **of_moe,
        )

    @classmethod
    def names_of_moe(cls) -> list[str]:
        """Returns the names of the knobs that are leaves of `moe`."""
        names = [field.name for field in dataclasses.fields(cls)]
        return [name for name in names if name not in NOT_OF_MOE]
