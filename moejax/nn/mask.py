"""Which keys a query may see, as a description: each kernel makes of it what it needs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which of S keys, which are in order, each of L queries may see.

    Segment 0 is padding, whose queries see padding: no output is read there, and no softmax is
    empty. Also the shape of a tree of `PartitionSpec`s.

    Attributes:
      query_positions_BL: the key at which each query is; None: query i is at key i, as where
        tokens attend to each other.
      query_segments_BL: the document of each query, which sees keys of the same one only; None: all
        keys are of its document.
      key_segments_BS: the document of each key, given together with `query_segments_BL`.
      is_causal: whether a query sees no key after its own position.
      window: the most keys that a query sees, its own position last; with `is_causal` only. A
        number, an int32 scalar, or one number a query `[B, L]`; None: any number.
    """

    query_positions_BL: Any = None
    query_segments_BL: Any = None
    key_segments_BS: Any = None
    window: Any = None
    is_causal: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self):
        if self.window is None:
            return
        if isinstance(self.window, int) and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None for no window")
        if not self.is_causal:
            raise ValueError(
                f"window={self.window} with is_causal=False: a window ends at the query's own "
                "position; use is_causal=True, or window=None"
            )

    @classmethod
    def within_rows(cls, segments_BL: Int[Array, "B L"]) -> "AttentionMask":
        """Returns that of packed rows: a query sees its own document up to itself."""
        return cls(query_segments_BL=segments_BL, key_segments_BS=segments_BL)

    @classmethod
    def of_cache(cls, positions_BL: Int[Array, "B L"]) -> "AttentionMask":
        """Returns that of a cache: a query sees the slots up to its own position."""
        return cls(query_positions_BL=positions_BL)

    def within(
        self, positions_BL: Int[Array, "B L"], window: Any = None, chunk: Any = None
    ) -> "AttentionMask":
        """Returns the mask of queries that see keys of a window, and of their chunk, alone.

        The keys of a document are in order. So those of a query's chunk up to itself are a window,
        too, which is as wide as its place in the chunk.

        Args:
          positions_BL: position of each query in its document, whose chunks start at 0.
          window: the most keys that a query sees; None: any number.
          chunk: positions of a chunk; None: no chunks.
        """
        if chunk is None:
            return dataclasses.replace(self, window=window)
        width_BL = positions_BL % chunk + 1
        if window is not None:
            width_BL = jnp.minimum(width_BL, window)
        return dataclasses.replace(self, window=width_BL)

    @property
    def has_rows(self) -> bool:
        """Whether queries and keys are the same positions of packed rows."""
        return self.query_segments_BL is not None and self.query_positions_BL is None

    @property
    def is_of_rows(self) -> bool:
        """Whether it is one that `within_rows` gives."""
        return self.has_rows and self.is_causal and self.window is None

    def by_query(self, batch: int, length: int) -> "AttentionMask":
        """Returns the same mask with the position and the window of each query written out."""
        shape = (batch, length)
        positions_BL = self.query_positions_BL
        if positions_BL is None:
            positions_L = jnp.arange(length, dtype=jnp.int32)
            positions_BL = jnp.broadcast_to(positions_L, shape)
        window = self.window
        if window is not None and jnp.ndim(window) == 0:
            window = jnp.full(shape, window, jnp.int32)
        return dataclasses.replace(self, query_positions_BL=positions_BL, window=window)

    def materialize(self, batch: int, length: int, num_keys: int) -> Bool[Array, "B L S"]:
        """Returns whether each of `length` queries sees each of `num_keys` keys."""
        by_query = self.by_query(batch, length)
        position_BL1 = by_query.query_positions_BL[:, :, None]
        key_11S = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
        is_seen_BLS = jnp.ones((batch, length, num_keys), bool)
        if self.is_causal:
            is_seen_BLS &= key_11S <= position_BL1
        if self.window is not None:
            is_seen_BLS &= key_11S > position_BL1 - by_query.window[:, :, None]
        if self.query_segments_BL is not None:
            query_segments_BL1 = self.query_segments_BL[:, :, None]
            is_seen_BLS &= query_segments_BL1 == self.key_segments_BS[:, None]
        return is_seen_BLS
