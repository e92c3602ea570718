"""What attention keeps of the positions seen so far, one slot per position."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Int

AnyCache = TypeVar("AnyCache", bound="Cache")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Arrays with a row and a slot as their first axes."""

    def with_positions(
        self: AnyCache, new: AnyCache, positions_BL: Int[jax.Array, "B L"]
    ) -> AnyCache:
        """Returns the cache with what L new positions have, at their slots."""
        row_B1 = jnp.arange(positions_BL.shape[0])[:, None]

        def put(slots_BSX, new_BLX):
            return slots_BSX.at[row_B1, positions_BL].set(new_BLX)

        return jax.tree.map(put, self, new)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(Cache):
    """Keys and values of each head.

    Attributes:
      k_BSGA: keys, already rotated; S slots.
      v_BSGA: values.
    """

    k_BSGA: jax.Array
    v_BSGA: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache(Cache):
    """What the keys and values of all heads are made of.

    Attributes:
      latent_BSC: normalised latent vectors.
      key_BSA: the part of the keys that has a position, already rotated; all heads share it.
    """

    latent_BSC: jax.Array
    key_BSA: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachePair(Cache):
    """The caches of a layer that attends twice."""

    first: Cache
    second: Cache
