"""Where the tokens of a device go: one record for each way of choosing.

All three have `for_experts`, which keeps the part that belongs to some of the experts, so that a
device with a share of the experts treats them alike.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """The experts of each token, where tokens choose.

    Attributes:
      experts_BLK: expert ids; E or more where a choice is of no expert with weights.
      weights_BLK: multiply the experts' outputs.
      input_weights_BLK: multiply the experts' inputs; None where nothing does.
      max_choices: upper bound on the choices of experts with weights, which bounds the number of
        rows; None: every choice may be one.
    """

    experts_BLK: jax.Array
    weights_BLK: jax.Array
    input_weights_BLK: Any = None
    max_choices: int | None = dataclasses.field(default=None, metadata={"static": True})

    def for_experts(self, first: jax.Array, count: int) -> "TokenChoice":
        """Returns the choices of `count` experts from `first` on; all others are of no expert."""
        local_BLK = self.experts_BLK - first
        is_here_BLK = (local_BLK >= 0) & (local_BLK < count)
        experts_BLK = jnp.where(is_here_BLK, local_BLK, count)
        return dataclasses.replace(self, experts_BLK=experts_BLK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """The tokens of each expert, where experts choose.

    Attributes:
      positions_BEC: position of each token in its sequence; L where a slot is empty.
      weights_BEC: multiply the experts' outputs.
    """

    positions_BEC: jax.Array
    weights_BEC: jax.Array

    def for_experts(self, first: jax.Array, count: int) -> "ExpertChoice":
        """Returns the slots of `count` experts from `first` on."""

        def keep_share(a_BEC: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a_BEC, first, count, axis=1)

        return jax.tree.map(keep_share, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftSlots:
    """How slots mix tokens, and tokens the outputs of slots.

    Attributes:
      dispatch_BLES: weights of a sequence's tokens in the S slots of each expert.
      combine_BLES: weights of the slots' outputs for each token, of the same shape.
    """

    dispatch_BLES: jax.Array
    combine_BLES: jax.Array

    def for_experts(self, first: jax.Array, count: int) -> "SoftSlots":
        """Returns the slots of `count` experts from `first` on."""

        def keep_share(a_BLES: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(a_BLES, first, count, axis=2)

        return jax.tree.map(keep_share, self)


Assignment = TokenChoice | ExpertChoice | SoftSlots
"""Where tokens go, whoever chose."""
