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

    def make_model() -> Decoder:
        rngs = nnx.Rngs(params=0)
        return Decoder(config, rngs=rngs)

    model = nnx.eval_shape(make_model)
    state = nnx.state(model, nnx.Param)
    total = 0
    active = 0
    for path, param in nnx.to_flat_state(state):
        size = math.prod(param.shape)
        total += size
        active += _active_size(config, path, param, size)
    return ParameterCount(total, active)


def _active_size(config: Config, path: tuple[Any, ...], param: Any, size: int) -> int:
    """Returns how many of a parameter's numbers take part in one token's forward pass."""
    if "query_experts" in param.axes:
        return size * config.attention.top_k_query_experts // config.attention.num_query_experts
    if path[0] != "stacks" or "experts" not in param.axes:
        return size
    stack = int(str(path[1]))
    moe = config.layer_groups[stack].moe
    if moe is None:
        return size
    num_experts = moe.num_experts
    num_active = min(moe.top_k, num_experts)
    return size * num_active // num_experts
