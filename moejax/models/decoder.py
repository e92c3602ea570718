"""The decoder-only transformer: dense, MoE, or both in a pattern."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import Config
from moejax.kernels.project import project
from moejax.models.stack import Block, Context, Period, Stack
from moejax.moe.stats import RoutingStats
from moejax.nn.attention import cache_mask, row_mask
from moejax.nn.norm import RMSNorm
from moejax.sharding import constrain_batch


class Decoder(nnx.Module):
    """Embedding, stacks of blocks, norm, logits.

    The layers follow `moe.first_dense` and `moe.every`: first the dense ones, then periods of `every - 1` dense layers
    and a MoE layer, then what is left of an incomplete period, dense.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, vocab = config.model.d_model, config.vocab_size
        # Standard deviation 1/sqrt(D) gives logits of unit scale; `embed` multiplies by sqrt(D) on the way in.
        init = jax.nn.initializers.normal(width**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (vocab, width)), axes=("vocab", "embed"))
        self.stacks = nnx.List(make_stacks(config, rngs))
        self.final_norm = RMSNorm(width)
        if not config.model.tied_embeddings:
            self.unembedding = nnx.Param(init(rngs.params(), (vocab, width)), axes=("vocab", "embed"))
        self.config = config

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        *,
        capacity_factor: Float[Array, ""] | None = None,
        trace: bool = False,
    ) -> tuple[Float[Array, "B L V"], RoutingStats | None]:
        """Logits of the next token at every position of packed rows.

        Args:
          tokens_BL: token ids.
          segments_BL: number of the document within its row, 0 at padding; attention stays within a document.
          positions_BL: position within the document.
          capacity_factor: limit of capacity dispatch in training; None (evaluation) is dropless.
          trace: keep token-level routing in the statistics.

        Returns:
          Logits, float32, and `RoutingStats` with a leading axis of MoE layers (None for a dense model).
        """
        context = Context(
            positions_BL=positions_BL,
            mask_BLS=row_mask(segments_BL),
            is_token_BL=segments_BL > 0,
            capacity_factor=capacity_factor,
            trace=trace,
        )
        logits_BLV, _, stats = self._apply(tokens_BL, context, [None] * len(self.stacks))
        return logits_BLV, stats

    def extend(
        self, tokens_BL: Int[Array, "B L"], positions_BL: Int[Array, "B L"], cache: list
    ) -> tuple[Float[Array, "B L V"], list]:
        """Logits of L more positions, with the keys and values of the earlier ones in the cache.

        Args:
          tokens_BL: the next tokens of each sequence.
          positions_BL: their positions, which are also the slots they fill; slots behind a sequence's end may hold
            anything, for they are written before they are seen.
          cache: from `init_cache` or an earlier call.

        Returns:
          Logits, float32, and the cache.
        """
        slots = jax.tree.leaves(cache)[0].shape[-3]
        context = Context(
            positions_BL=positions_BL,
            mask_BLS=cache_mask(positions_BL, slots),
            is_token_BL=jnp.ones(tokens_BL.shape, bool),
        )
        logits_BLV, cache, _ = self._apply(tokens_BL, context, cache)
        return logits_BLV, cache

    def init_cache(self, batch: int, slots: int) -> list:
        """An empty cache for `batch` sequences of up to `slots` tokens."""
        return [stack.init_cache(batch, slots) for stack in self.stacks]

    def embed(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The residual stream before the first layer."""
        embedding_VD = self.embedding[...].astype(self.config.model.compute_dtype)
        return constrain_batch(embedding_VD[tokens_BL]) * self.config.model.d_model**0.5

    def unembed(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits from the residual stream after the last layer."""
        weight = self.embedding if self.config.model.tied_embeddings else self.unembedding
        weight_VD = weight[...].astype(self.config.model.compute_dtype)
        return project(self.final_norm(x_BLD), weight_VD.T, out_dtype=jnp.float32)

    def _apply(self, tokens_BL, context: Context, cache: list):
        x_BLD = self.embed(tokens_BL)
        new_cache, stats = [], None
        for stack, stack_cache in zip(self.stacks, cache, strict=True):
            x_BLD, stack_cache, stack_stats = stack(x_BLD, context, stack_cache)
            new_cache.append(stack_cache)
            if stack_stats is not None:
                stats = stack_stats
        return self.unembed(x_BLD), new_cache, stats


def make_stacks(config: Config, rngs: nnx.Rngs) -> list[Stack]:
    """The layers of a config as at most three stacks: dense, periods, dense."""

    def dense_block(rngs):
        return Block(config, is_moe=False, rngs=rngs)

    def period(rngs):
        if config.moe.every == 1:
            return Block(config, is_moe=True, rngs=rngs)
        return Period(config, config.moe.every - 1, rngs=rngs)

    num_periods = config.num_moe_layers
    first_dense = config.moe.first_dense if num_periods else 0
    rest = config.model.num_layers - first_dense - num_periods * config.moe.every if num_periods else 0
    if not num_periods:
        first_dense = config.model.num_layers
    parts = [(dense_block, first_dense), (period, num_periods), (dense_block, rest)]
    return [Stack(make_block, num, config, rngs=rngs) for make_block, num in parts if num]


def moe_layer_indices(config: Config) -> list[int]:
    """Which layers of the model are MoE layers, counted from 0, in the order of stacked `RoutingStats`."""
    first, every = config.moe.first_dense, config.moe.every
    return [first + every * (i + 1) - 1 for i in range(config.num_moe_layers)]
