"""The leaves of the training loop."""

import dataclasses

from moejax.config.errors import ConfigError, divisors
from moejax.config.schema.leaf import leaf


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
    logit_z_weight: float = leaf(
        0.0,
        "weight of the z-loss of the logits, the mean of their squared log-sum-exps",
        at_least=0,
    )
    average_decay: float = leaf(
        0.0,
        "decay of a moving average of the weights, which is evaluated, too; 0: none is kept",
        at_least=0,
        below=1,
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


def validate_train(train: TrainConfig) -> None:
    """Raises `ConfigError` for a batch that cannot be split into its microbatches."""
    if train.batch_size % train.accumulation:
        fitting = divisors(train.batch_size, train.accumulation)
        raise ConfigError(
            f"train.batch_size={train.batch_size} must be a multiple of "
            f"train.accumulation={train.accumulation}; use one of {fitting} "
            "for train.accumulation"
        )
