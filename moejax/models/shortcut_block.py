"""A layer of two blocks with attention and a dense network each, and experts beside them."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from moejax.models.blocks import Block, Context, Mixer
from moejax.moe.balancing.stats import RoutingStats
from moejax.moe.layer import MoE
from moejax.nn.attention.cache import Cache, CachePair


class ShortcutBlock(nnx.Module):
    """Two dense blocks; experts read what the first one's network reads, and are added at the end.

    Their all-to-all exchange can then run while the rest of the layer is computed.

    Args:
      first: whose network's inputs are those of the experts.
      second: reads the output of the first, without that of the experts.
      ffn: the MoE layer.

    Source: Cai et al. 2024 (ScMoE), section 3.1; two dense blocks as in LongCat-Flash 2025, section
    2.1.2.
    """

    def __init__(self, first: Block, second: Block, ffn: MoE):
        self.first = first
        self.second = second
        self.ffn = ffn

    is_moe = True

    @property
    def moe(self) -> MoE:
        """The MoE layer."""
        return self.ffn

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers in the order of the pass."""
        return (self.first.mixer, self.second.mixer)

    def __call__(
        self, x_BLD: jax.Array, context: Context, cache: Any = None
    ) -> tuple[jax.Array, RoutingStats, Any]:
        """Returns (x_BLD, `RoutingStats`, cache); see `Block`."""
        first_cache, second_cache = (None, None) if cache is None else (cache.first, cache.second)
        with jax.named_scope("mixer"):
            mixed_BLD, first_cache = self.mix(x_BLD, context, first_cache)
            residual_BLD = self.add_mixed(x_BLD, mixed_BLD)
        inputs_BLD = self.ffn_inputs(x_BLD, residual_BLD)
        with jax.named_scope("moe"):
            y_BLD, stats = self.ffn(inputs_BLD, context.info)
        x_BLD, _ = self.first.add_ffn(residual_BLD, inputs_BLD, context)
        x_BLD, _, second_cache = self.second(x_BLD, context, second_cache)
        cache = None if first_cache is None else CachePair(first_cache, second_cache)
        return x_BLD + self.first.scaled(y_BLD), stats, cache

    def mix(
        self, x_BLD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns what the first mixer makes of the residual stream, and its cache."""
        return self.first.mix(x_BLD, context, cache)

    def add_mixed(self, x_BLD: jax.Array, mixed_BLD: jax.Array) -> jax.Array:
        """Returns the residual stream after the first mixer."""
        return self.first.add_mixed(x_BLD, mixed_BLD)

    def ffn_inputs(self, x_BLD: jax.Array, residual_BLD: jax.Array) -> jax.Array:
        """Returns what the experts read, and the first dense network."""
        return self.first.ffn_inputs(x_BLD, residual_BLD)

    def init_cache(self, batch: int, slots: int) -> CachePair:
        """Returns an empty cache."""
        first = self.first.init_cache(batch, slots)
        return CachePair(first, self.second.init_cache(batch, slots))

    def walk(
        self, context: Context | None = None
    ) -> Iterator[tuple["ShortcutBlock", Context | None]]:
        """Yields the layer itself."""
        yield self, context
