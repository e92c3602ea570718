"""By `optimizer.name`: what makes updates of gradients, before weight decay and learning rate."""

from collections.abc import Callable

import optax
from flax import nnx

from moejax.config import OptimizerConfig
from moejax.training.optimizers.adafactor import scale_by_adafactor
from moejax.training.optimizers.matrices import map_params
from moejax.training.optimizers.muon import scale_by_muon
from moejax.training.optimizers.plans import is_by_muon

Rule = Callable[[OptimizerConfig, nnx.State], optax.GradientTransformation]
"""Makes the transformation, for parameters with their logical axes."""


def _adam(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    del params
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2)


def _muon(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    def rule_of(path: str, param: nnx.Variable) -> str:
        return "muon" if is_by_muon(path, param) else "adam"

    rules = {"muon": scale_by_muon(config.muon_momentum), "adam": _adam(config, params)}
    return optax.partition(rules, map_params(rule_of, params))


def _adafactor(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    del config, params
    return scale_by_adafactor()


def _lion(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    del params
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)


def _sgd(config: OptimizerConfig, params: nnx.State) -> optax.GradientTransformation:
    del params
    return optax.trace(decay=config.beta1)


RULES: dict[str, Rule] = {
    "adamw": _adam,
    "muon": _muon,
    "muonh": _muon,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
}
"""A test compares the names with those of `optimizer.name`."""
