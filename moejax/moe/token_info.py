"""What a MoE layer is told besides the residual stream."""

import dataclasses

import jax

from moejax.config import Knobs
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenInfo:
    """What a layer is told besides the residual stream: about its tokens, and how to route them.

    Attributes:
      is_token_BL: False where a position is padding: it reaches no expert and enters no statistic.
      tokens_BL: token ids; None unless the router looks at them.
      positions_BL: positions in their documents; None unless the router looks at them.
      knobs: traced scalars; None in evaluation.
      keys_B: a key per sequence, for everything drawn at random; None where nothing is.
      trace: keep the token-level routing in the statistics.
      overrides: how the layer routes otherwise than as trained.
    """

    is_token_BL: jax.Array
    tokens_BL: jax.Array | None = None
    positions_BL: jax.Array | None = None
    knobs: Knobs | None = None
    keys_B: jax.Array | None = None
    trace: bool = dataclasses.field(default=False, metadata={"static": True})
    overrides: RoutingOverrides = AS_TRAINED

    @property
    def is_training(self) -> bool:
        """Whether this is a training pass."""
        return self.knobs is not None
