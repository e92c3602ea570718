"""Counting parameters."""

import dataclasses
import math

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
    """Counts without allocating any."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    total = active = 0
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        size = math.prod(param.shape)
        total += size
        moe = config.layer_groups[int(str(path[1]))].moe if path[0] == "stacks" else None
        if moe is not None and "experts" in param.axes:
            size = size * min(moe.top_k, moe.num_experts) // moe.num_experts
        active += size
    return ParameterCount(total, active)
