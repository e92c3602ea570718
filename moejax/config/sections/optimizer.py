"""The leaves of the optimizer and of the schedule of its learning rate."""

import dataclasses
from typing import Literal

from moejax.config.errors import require
from moejax.config.parameter_groups import read_groups, read_names
from moejax.config.schema.leaf import leaf
from moejax.config.schema.needs import value

MUON = ("muon", "muonh")
"""Optimizers that orthogonalise updates of matrices, and train the rest by Adam."""

HAS_BETA1 = value("optimizer.name", "adamw", *MUON, "lion", "sgd")
HAS_BETA2 = value("optimizer.name", "adamw", *MUON, "lion")
IS_MUON = value("optimizer.name", *MUON)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon", "muonh", "adafactor", "lion", "sgd"] = leaf(
        "adamw",
        "what makes updates of gradients; muonh is Muon with weights of constant norm",
    )
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
    beta1: float = leaf(
        0.9,
        "decay of the mean of gradients: Adam's and Lion's first moment, and SGD's momentum",
        at_least=0,
        below=1,
        needs=HAS_BETA1,
    )
    beta2: float = leaf(
        0.95,
        "decay of Adam's mean of squared gradients, and of the mean that Lion keeps",
        at_least=0,
        below=1,
        needs=HAS_BETA2,
    )
    muon_momentum: float = leaf(
        0.95, "decay of the mean of gradients of matrices", at_least=0, below=1, needs=IS_MUON
    )
    adam_rate: float = leaf(
        1.0,
        "learning rate of what Adam trains beside Muon, as a factor of learning_rate",
        at_least=0,
        needs=IS_MUON,
    )
    weight_decay: float = leaf(0.1, "decoupled weight decay, of matrices only", at_least=0)
    clip_norm: float = leaf(
        1.0, "largest global norm of the gradient; 0 switches clipping off", at_least=0
    )
    moments_dtype: Literal["float32", "bfloat16"] = leaf(
        "float32", "type in which the optimizer keeps its moments between steps"
    )
    groups: str = leaf(
        "",
        "parameters with a learning rate, decay or clipping of their own, such as "
        "'router: rate=0.3 weight_decay=0; experts: clip_norm=0.5'",
    )
    frozen: str = leaf(
        "",
        "parameters that are not trained: kinds or patterns of paths, such as "
        "'router, embedding, stacks/0/*'",
    )


def validate_optimizer(optimizer: OptimizerConfig) -> None:
    """Raises `ConfigError` for a schedule longer than the run, or names that cannot be read."""
    fractions = optimizer.warmup_fraction
    if optimizer.schedule == "wsd":
        fractions += optimizer.decay_fraction
    require(
        fractions <= 1,
        f"optimizer.warmup_fraction={optimizer.warmup_fraction} and "
        f"optimizer.decay_fraction={optimizer.decay_fraction} must not exceed 1 together; "
        "lower one",
    )
    read_groups(optimizer.groups)
    read_names("optimizer.frozen", optimizer.frozen)
