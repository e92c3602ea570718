"""The leaves of the training loop and of the optimizer."""

import dataclasses
from typing import Literal

from moejax.config.errors import ConfigError, divisors, require
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import value


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    num_steps: int = leaf(1000, "optimizer steps", at_least=1)
    batch_size: int = leaf(16, "rows of the global batch", at_least=1)
    accumulation: int = leaf(1, "microbatches per optimizer step", at_least=1)
    seed: int = leaf(
        0,
        "seed of the initial weights, the order of rows, and the random draws of training",
        at_least=0,
    )
    log_every: int = leaf(20, "steps between lines of metrics", at_least=1)
    eval_every: int = leaf(
        250, "steps between evaluations, which are also saved; 0: only at the end", at_least=0
    )
    checkpoint_every: int = leaf(250, "steps between checkpoints", at_least=1)
    keep_checkpoints: int = leaf(
        2,
        "how many of the newest checkpoints are kept, in addition to the best by validation loss",
        at_least=1,
    )
    max_nonfinite_steps: int = leaf(5, "this many skipped steps in a row end the run", at_least=1)
    step_limit_s: float = leaf(
        0.0,
        "a step of more seconds ends the process with the stacks of its threads; 0: no limit",
        at_least=0,
        at_most=1e9,
    )
    check_memory: bool = leaf(
        True, "refuse, before anything is compiled, what cannot fit in the memory of the devices"
    )

    def is_evaluated(self, step: int) -> bool:
        """Whether the state after `step` steps is evaluated."""
        is_last = step == self.num_steps
        return is_last or (self.eval_every > 0 and step % self.eval_every == 0)

    def is_saved(self, step: int) -> bool:
        """Whether the state after `step` steps is saved.

        Every evaluated state is, so that the best evaluation has its checkpoint.
        """
        return self.is_evaluated(step) or step % self.checkpoint_every == 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = leaf(3e-3, "the highest learning rate", at_least=0)
    schedule: Literal["cosine", "linear", "wsd"] = leaf(
        "cosine",
        "how the rate falls after the warm-up; wsd keeps the highest until the last decay_fraction",
    )
    warmup_fraction: float = leaf(
        0.05,
        "fraction of num_steps over which the rate rises linearly from 0",
        at_least=0,
        at_most=1,
    )
    decay_fraction: float = leaf(
        0.2,
        "fraction of num_steps, at the end, over which the rate falls linearly",
        at_least=0,
        at_most=1,
        needs=value("optimizer.schedule", "wsd"),
    )
    final_fraction: float = leaf(
        0.1, "the last learning rate as a fraction of the highest", at_least=0, at_most=1
    )
    beta1: float = leaf(0.9, "decay of the mean of gradients", at_least=0, below=1)
    beta2: float = leaf(0.95, "decay of the mean of squared gradients", at_least=0, below=1)
    weight_decay: float = leaf(0.1, "decoupled weight decay, of matrices only", at_least=0)
    clip_norm: float = leaf(
        1.0, "largest global norm of the gradient; 0 switches clipping off", at_least=0
    )


def validate_train(train: TrainConfig) -> None:
    """Raises `ConfigError` for a batch that cannot be split into its microbatches."""
    if train.batch_size % train.accumulation:
        fitting = divisors(train.batch_size, train.accumulation)
        raise ConfigError(
            f"train.batch_size={train.batch_size} must be a multiple of "
            f"train.accumulation={train.accumulation}; use one of {fitting} "
            "for train.accumulation"
        )


def validate_optimizer(optimizer: OptimizerConfig) -> None:
    """Raises `ConfigError` for a schedule whose parts are longer than the run."""
    fractions = optimizer.warmup_fraction
    if optimizer.schedule == "wsd":
        fractions += optimizer.decay_fraction
    require(
        fractions <= 1,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and "
        f"optimizer.decay_fraction={optimizer.decay_fraction} must not exceed 1 together; "
        "lower one",
    )
