"""Counting parameters."""

import dataclasses
import math

import jax
from flax import nnx

from moejax.config import Config
from moejax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
      total: all of them.
      active: those that take part in one token's forward pass: of E experts, K. Embeddings count in full.
    """

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCount:
    """Counts without allocating any."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    params = jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable))
    total = active = 0
    for param in params:
        size = math.prod(param.shape)
        total += size
        active += size * config.moe.top_k // config.moe.num_experts if "experts" in param.axes else size
    return ParameterCount(total, active)
