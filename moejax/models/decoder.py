"""The decoder-only transformer: dense, MoE, or both in a pattern."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import (
    Config,
    Knobs,
    LayerGroup,
    MoeConfig,
    active_top_k_of,
    embedding_deviation,
    folded,
    folded_moe,
    parse_schedule,
)
from moejax.kernels.cross_entropy import Head, TokenLosses, cross_entropy
from moejax.models.blocks import Block, Context, InterleavedBlock, Stack
from moejax.models.shortcut_block import ShortcutBlock
from moejax.moe.balancing.stats import RoutingStats
from moejax.moe.experts.experts import FeedForward, Network
from moejax.moe.layer import MoE
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides, split_overrides
from moejax.moe.token_info import TokenInfo
from moejax.nn.attention.grouped_query import Attention
from moejax.nn.attention.latent import LatentAttention
from moejax.nn.attention.layer_options import LayerOptions, assign_constants, options_by_layer
from moejax.nn.attention.routed import RoutedAttention
from moejax.nn.norms import make_norm
from moejax.sharding import constrain_tokens, gather_fsdp, parts_of_logits


class Decoder(nnx.Module):
    """Embedding, stacks of blocks, norm, and a head that makes logits.

    The layers follow `moe.first_dense` and `moe.every`: first the dense ones, then interleaved
    blocks of `every - 1` dense layers and a MoE layer, then the layers of an incomplete block,
    dense.
    `moe.per_layer` changes some of them.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.model.d_model
        shape = (config.vocab_size, width)
        # Without `mup`, standard deviation 1/sqrt(D) gives logits of unit scale; `embed` multiplies
        # by sqrt(D) on the way in, unless the model has another multiplier.
        init = jax.nn.initializers.normal(embedding_deviation(config))
        embedding_VD = init(rngs.params(), shape)
        self.embedding = nnx.Param(embedding_VD, axes=("vocab", "embed"))
        self.stacks = nnx.List(make_stacks(config, rngs))
        if config.attention.kind == "grouped_query":
            _set_options(self.stacks, config)
        epsilon = config.model.final_norm_epsilon or config.model.norm_epsilon
        self.final_norm = make_norm(config.model.norm, width, epsilon)
        if not config.model.tied_embeddings:
            unembedding_VD = init(rngs.params(), shape)
            self.unembedding = nnx.Param(unembedding_VD, axes=("vocab", "embed"))
        if config.model.logits_bias:
            self.logits_bias = nnx.Param(jnp.zeros(config.vocab_size), axes=("vocab",))
        self.config = config
        # What it computes with: the multipliers of `mup` are leaves there.
        self.model_config = folded(config).model

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        segments_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        *,
        knobs: Knobs | None = None,
        keys_B: jax.Array | None = None,
        trace: bool = False,
        overrides: RoutingOverrides = AS_TRAINED,
    ) -> tuple[Float[Array, "B L D"], tuple[RoutingStats, ...]]:
        """Computes hidden states of packed rows, of which `head` makes logits of the next token.

        Logits of all positions at once take more memory than anything else; a loss needs none of
        them (`cross_entropy`).

        Args:
          tokens_BL: token ids.
          segments_BL: number of the document within its row, 0 at padding; attention stays
            within a document.
          positions_BL: position within the document.
          knobs: traced scalars, in training; None is evaluation.
          keys_B: a key per row for what training draws at random; None draws nothing.
          trace: keep token-level routing in the statistics.
          overrides: how MoE layers route otherwise than as trained, with a leading axis of all of
            them.

        Returns:
          Normalised hidden states, and the `RoutingStats` of each group of equal MoE layers
          (`Config.moe_groups`), with a leading axis of its layers; `stats.join` joins them all.
          Empty for a dense model.
        """
        is_token_BL = segments_BL > 0
        context = Context(
            positions_BL=positions_BL,
            segments_BL=segments_BL,
            info=TokenInfo(is_token_BL, tokens_BL, positions_BL, knobs, keys_B, trace),
        )
        x_BLD = self.embed(tokens_BL)
        stats = []
        overrides_of_stacks = self._split_overrides(overrides)
        for index, stack in enumerate(self.stacks):
            stack_context = context.of_layer(index)
            x_BLD, stack_stats = stack(x_BLD, stack_context, overrides_of_stacks[index])
            if stack_stats is not None:
                stats.append(stack_stats)
        return self.final_norm(x_BLD), tuple(stats)

    def _split_overrides(self, overrides: RoutingOverrides) -> list[RoutingOverrides]:
        """Returns the overrides of each stack."""
        groups = self.config.layer_groups
        nums_of_moe_layers = [0 if group.moe is None else group.num for group in groups]
        return split_overrides(overrides, nums_of_moe_layers)

    def walk(self, context: Context | None = None) -> Iterator[tuple[Block, Context | None]]:
        """Yields the layers in order, with the context that each has in a pass.

        This is for inspecting a model, not for traced code.
        """
        for index, stack in enumerate(self.stacks):
            yield from stack.walk(context and context.of_layer(index))

    def embed(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the residual stream before the first layer."""
        model = self.model_config
        embedding_VD = gather_fsdp(self.embedding, model.compute_dtype)
        x_BLD = constrain_tokens(embedding_VD[tokens_BL])
        return x_BLD * (model.embedding_multiplier or model.d_model**0.5)

    def head(self) -> Head:
        """Returns the map from normalised hidden states to logits."""
        model = self.model_config
        weight = self.embedding if model.tied_embeddings else self.unembedding
        weight_VD = gather_fsdp(weight, model.compute_dtype)
        return Head(
            weight_VD,
            self.config.num_token_ids,
            bias_V=self.logits_bias[...] if model.logits_bias else None,
            divisor=model.logits_divisor,
            cap=model.logits_cap,
        )

    def logits(self, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns logits, float32, from normalised hidden states."""
        return self.head().logits(hidden_BLD)

    def unembed(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns logits, float32, from the residual stream after the last layer."""
        return self.logits(self.final_norm(x_BLD))

    def cross_entropy(
        self, hidden_BLD: Float[Array, "B L D"], targets_BL: Int[Array, "B L"]
    ) -> TokenLosses:
        """Returns the cross-entropy of targets, and their log-sum-exps.

        Args:
          hidden_BLD: normalised hidden states.
          targets_BL: ids of the tokens that follow.
        """
        length_parts, logits_parts = parts_of_logits()
        return cross_entropy(
            hidden_BLD,
            self.head(),
            targets_BL,
            num_parts=logits_parts,
            length_parts=length_parts,
        )


def _set_options(stacks: Sequence[Stack], config: Config) -> None:
    """Gives each layer of attention its options; layers of a stack are made alike."""
    num_pairs = (config.attention.rope_dim or config.head_dim) // 2
    options = options_by_layer(config.attention, config.model.num_layers, num_pairs)
    first = 0
    for stack, group in zip(stacks, config.layer_groups, strict=True):
        of_dense, of_last = _options_in_group(options, first, group)
        first += group.num * len(group.kinds)
        block: Any = stack.block
        if isinstance(block, InterleavedBlock):
            dense: Any = block.dense.block
            assign_constants(dense.mixer.constants, of_dense)
            block = block.moe_block
        for mixer in block.mixers:
            assign_constants(mixer.constants, of_last)


def _options_in_group(
    options: LayerOptions, first: int, group: LayerGroup
) -> tuple[LayerOptions, LayerOptions]:
    """Returns the options of all but the last layer of each block, and those of the last ones."""
    num_layers = len(group.kinds)
    end = first + group.num * num_layers

    def in_blocks(value_N):
        of_group_N = value_N[first:end]
        return of_group_N.reshape(group.num, num_layers, *value_N.shape[1:])

    by_block = jax.tree.map(in_blocks, options)
    of_dense = jax.tree.map(lambda value_NX: value_NX[:, :-1], by_block)
    of_last = jax.tree.map(lambda value_NX: value_NX[:, -1], by_block)
    return of_dense, of_last


def make_stacks(config: Config, rngs: nnx.Rngs) -> list[Stack]:
    """Makes one stack for each group of equal layers, or of equal interleaved blocks."""
    return [_make_stack(config, group, rngs) for group in config.layer_groups]


def _make_stack(config: Config, group: LayerGroup, rngs: nnx.Rngs) -> Stack:
    """Makes the stack of a group; of several kinds of layers, all but the last are dense."""
    num_dense = len(group.kinds) - 1

    def make_dense(rngs: nnx.Rngs) -> Block | ShortcutBlock:
        return make_block(config, None, rngs=rngs)

    def make_last(rngs: nnx.Rngs) -> Block | ShortcutBlock:
        return make_block(config, group.moe, rngs=rngs)

    def make_interleaved(rngs: nnx.Rngs) -> InterleavedBlock:
        dense = Stack(make_dense, num_dense, config, rngs=rngs)
        last: Any = make_last(rngs)
        return InterleavedBlock(dense, last)

    make_one = make_interleaved if num_dense else make_last
    return Stack(make_one, group.num, config, rngs=rngs)


def make_block(config: Config, moe: MoeConfig | None, *, rngs: nnx.Rngs) -> Block | ShortcutBlock:
    """Makes a layer of attention and a MoE layer, or a feed-forward network where `moe` is None.

    With `model.shortcut` it is a layer of two of the latter, and a MoE layer beside them.
    """
    if config.model.shortcut and moe is not None:
        first, second = (_make_dense_block(config, rngs) for _ in range(2))
        return ShortcutBlock(first, second, _make_moe(config, moe, rngs))
    if moe is None:
        return _make_dense_block(config, rngs)
    attention = _make_attention(config, rngs)
    return Block(folded(config).model, attention, _make_moe(config, moe, rngs))


def _make_dense_block(config: Config, rngs: nnx.Rngs) -> Block:
    model = folded(config).model
    attention = _make_attention(config, rngs)
    dtype = jnp.dtype(model.compute_dtype)
    network = Network(has_bias=model.ffn_bias)
    ffn = FeedForward(model.d_model, model.d_ff, dtype, network, rngs=rngs)
    return Block(model, attention, ffn)


def _make_moe(config: Config, moe: MoeConfig, rngs: nnx.Rngs) -> MoE:
    return MoE(
        folded_moe(config, moe),
        config.model.d_model,
        jnp.dtype(config.model.compute_dtype),
        vocab_size=config.vocab_size,
        active_top_k=_first_active_top_k(config, moe),
        rngs=rngs,
    )


def _make_attention(
    config: Config, rngs: nnx.Rngs
) -> Attention | RoutedAttention | LatentAttention:
    model = config.model
    dtype = jnp.dtype(model.compute_dtype)
    if config.attention.kind == "latent":
        return LatentAttention(config.attention, model.d_model, dtype, rngs=rngs)
    if config.attention.kind == "routed":
        router = config.attention_router
        return RoutedAttention(config.attention, router, model.d_model, dtype, rngs=rngs)
    make_qk_norm = functools.partial(make_norm, model.norm, epsilon=model.norm_epsilon)
    return Attention(
        config.attention,
        model.d_model,
        dtype,
        make_norm=make_qk_norm,
        norm_epsilon=model.norm_epsilon,
        rngs=rngs,
    )


def _first_active_top_k(config: Config, moe: MoeConfig) -> int | None:
    """Returns the experts per token of the first step, None where no schedule changes them."""
    text = config.schedule.top_k
    if text == "constant":
        return None
    schedule = parse_schedule("schedule.top_k", text)
    return active_top_k_of(moe.top_k, schedule.start)
