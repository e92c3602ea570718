"""Counting parameters."""

import dataclasses
import math
from typing import Any

from flax import nnx

from moejax.config import Config
from moejax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
      total: all of them.
      active: those that take part in one token's forward pass: of E experts, K (fewer where a token
        chooses zero, identity or constant experts). Embeddings count in full.
    """

    total: int
    active: int


def count_parameters(config: Config) -> ParameterCount:
    """Counts parameters without allocating any."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    total = active = 0
    for path, param in parameters:
        size = math.prod(param.shape)
        total += size
        active += _active_size(config, path, param, size)
    return ParameterCount(total, active)


def _active_size(config: Config, path: tuple[Any, ...], param: Any, size: int) -> int:
    """Returns how many of a parameter's numbers take part in one token's forward pass."""
    if path[0] != "stacks" or "experts" not in param.axes:
        return size
    group = config.layer_groups[int(str(path[1]))]
    if group.moe is None:
        return size
    num_experts = group.moe.num_experts
    return size * min(group.moe.top_k, num_experts) // num_experts
