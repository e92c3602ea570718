"""What attention keeps of the positions seen so far, one slot per position."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Int

from moejax.nn.mask import AttentionMask

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


def keys_and_mask(
    new: AnyCache,
    cache: AnyCache | None,
    positions_BL: Int[jax.Array, "B L"],
    segments_BL: Int[jax.Array, "B L"] | None,
) -> tuple[AnyCache, AttentionMask]:
    """Returns what there is to attend to, and which of it queries see.

    Args:
      new: of the L positions.
      cache: of those before, to which they are added; None where queries see their own row only.
      positions_BL: position of each token; with a cache also its slot.
      segments_BL: number of the document within its row; not needed with a cache.
    """
    if cache is not None:
        return cache.with_positions(new, positions_BL), AttentionMask.of_cache(positions_BL)
    if segments_BL is None:
        raise ValueError(
            "attention within rows needs segments_BL, and attention to a cache needs cache; "
            "give one"
        )
    return new, AttentionMask.within_rows(segments_BL)


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
