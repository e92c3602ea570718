"""Blocks, and stacks of them scanned over layers.

A `Stack` holds one block whose parameters carry a leading axis of layers, and scans it: the traced
program has the same size for any depth. A block is a `Block` (one layer) or an `InterleavedBlock`
(some dense layers and a MoE layer), so that stacks nest: "every other layer is MoE" is a stack of
interleaved blocks, each with a stack of dense blocks inside.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config, ModelConfig
from moejax.moe.balancing.stats import RoutingStats
from moejax.moe.expert_parallel.strategy import EXCHANGED
from moejax.moe.experts.experts import FeedForward
from moejax.moe.layer import MoE
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides
from moejax.moe.router.selection import SAVED_NAMES
from moejax.moe.token_info import TokenInfo
from moejax.nn.attention.cache import Cache
from moejax.nn.attention.routed import RoutedAttention
from moejax.nn.norms import Identity, Norm, make_norm
from moejax.sharding import constrain_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of a pass shares.

    Attributes:
      positions_BL: position of each token in its document.
      segments_BL: number of the document within its row, 0 at padding.
      info: what MoE layers know about the tokens.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array
    info: TokenInfo

    def of_layer(
        self, index: jax.Array | int, overrides: RoutingOverrides = AS_TRAINED
    ) -> "Context":
        """Returns the context for one of several layers: its own keys and overrides."""

        def fold_index(key):
            return jax.random.fold_in(key, index)

        keys_B = self.info.keys_B
        if keys_B is not None:
            keys_B = jax.vmap(fold_index)(keys_B)
        info = dataclasses.replace(self.info, keys_B=keys_B, overrides=overrides)
        return dataclasses.replace(self, info=info)


@runtime_checkable
class Mixer(Protocol):
    """What a token learns from others of its row, such as `Attention`."""

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        cache: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Returns what is added to the residual stream, and the cache with these positions.

        The cache is one that its `init_cache` made.
        """

    def init_cache(self, batch: int, slots: int) -> Cache:
        """Returns an empty cache of `slots` positions for each of `batch` rows."""


class Block(nnx.Module):
    """One layer: a mixer of tokens, then a feed-forward part, each with norms and a residual.

    With r the residual multiplier, n a norm before a part and p one after it, the residual stream
    is x + r p(mixer(n(x))) after the mixer, and likewise after the feed-forward part. Which of the
    norms there are is `model.norm_order`. With `model.parallel_residual` both parts read n(x).

    Args:
      config: for the norms and the residual.
      mixer: what a token learns from others of its row.
      ffn: what is done to each token: a MoE layer or a feed-forward network.
    """

    def __init__(self, config: ModelConfig, mixer: Mixer, ffn: MoE | FeedForward):
        has_pre_norms = config.norm_order in ("pre", "sandwich")
        has_post_norms = config.norm_order in ("post", "sandwich")
        self.mixer_norm = _norm_or_identity(config, has_pre_norms)
        self.mixer = mixer
        self.mixer_post_norm = _norm_or_identity(config, has_post_norms)
        self.ffn_norm = _norm_or_identity(config, has_pre_norms and not config.parallel_residual)
        self.ffn = ffn
        self.ffn_post_norm = _norm_or_identity(config, has_post_norms)
        self.is_parallel = config.parallel_residual
        self.residual_multiplier = config.residual_multiplier

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward part is a MoE layer."""
        return isinstance(self.ffn, MoE)

    @property
    def moe(self) -> MoE:
        """The MoE layer of a block that has one."""
        if not isinstance(self.ffn, MoE):
            raise TypeError("the feed-forward part of this block is no MoE layer; see is_moe")
        return self.ffn

    def __call__(self, x_BLD: jax.Array, context: Context, cache: Cache | None = None):
        """Returns (x_BLD, `RoutingStats` or None, cache).

        Without a cache it mixes the tokens of `x_BLD` alone.
        """
        with jax.named_scope("mixer"):
            mixed_BLD, routed, cache = self._mix(x_BLD, context, cache)
            residual_BLD = self.add_mixed(x_BLD, mixed_BLD)
        inputs_BLD = self.ffn_inputs(x_BLD, residual_BLD)
        x_BLD, stats = self.add_ffn(residual_BLD, inputs_BLD, context)
        if stats is not None and routed is not None:
            stats = dataclasses.replace(stats, attention=routed)
        return x_BLD, stats, cache

    def mix(
        self,
        x_BLD: jax.Array,
        context: Context,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns what the mixer makes of the residual stream, and its cache."""
        mixed_BLD, _, cache = self._mix(x_BLD, context, cache)
        return mixed_BLD, cache

    def _mix(
        self, x_BLD: jax.Array, context: Context, cache: Any
    ) -> tuple[jax.Array, RoutingStats | None, Cache | None]:
        """Returns what the mixer makes of the residual stream, its routing if any, its cache."""
        normed_BLD = self.mixer_norm(x_BLD)
        if isinstance(self.mixer, RoutedAttention):
            return self.mixer.attend(
                normed_BLD, context.positions_BL, context.segments_BL, cache, context.info
            )
        y_BLD, cache = self.mixer(normed_BLD, context.positions_BL, context.segments_BL, cache)
        return y_BLD, None, cache

    def add_mixed(self, x_BLD: jax.Array, mixed_BLD: jax.Array) -> jax.Array:
        """Returns the residual stream after the mixer, from that before it and its output."""
        return x_BLD + self.scaled(self.mixer_post_norm(mixed_BLD))

    def ffn_inputs(self, x_BLD: jax.Array, residual_BLD: jax.Array) -> jax.Array:
        """Returns what the feed-forward part reads.

        Args:
          x_BLD: the residual stream before the layer.
          residual_BLD: the residual stream after the mixer.
        """
        if self.is_parallel:
            return self.mixer_norm(x_BLD)
        return self.ffn_norm(residual_BLD)

    def add_ffn(
        self, residual_BLD: jax.Array, inputs_BLD: jax.Array, context: Context
    ) -> tuple[jax.Array, RoutingStats | None]:
        """Returns the residual stream after the feed-forward part, and its routing if it has any.

        Args:
          residual_BLD: the residual stream after the mixer.
          inputs_BLD: what the feed-forward part reads.
          context: what all layers share.
        """
        if isinstance(self.ffn, MoE):
            with jax.named_scope("moe"):
                y_BLD, stats = self.ffn(inputs_BLD, context.info)
        else:
            with jax.named_scope("ffn"):
                y_BLD, stats = self.ffn(inputs_BLD), None
        return residual_BLD + self.scaled(self.ffn_post_norm(y_BLD)), stats

    def scaled(self, y_BLD: jax.Array) -> jax.Array:
        """Returns a part's output times the residual multiplier."""
        if self.residual_multiplier == 1:
            return y_BLD
        return y_BLD * self.residual_multiplier

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixers in the order of the pass."""
        return (self.mixer,)

    def init_cache(self, batch: int, slots: int) -> Cache:
        """Returns an empty cache."""
        return self.mixer.init_cache(batch, slots)

    def walk(self, context: Context | None = None) -> Iterator[tuple["Block", Context | None]]:
        """Yields the layers of this module with the context of each.

        This is for inspecting a model, not for traced code.
        """
        yield self, context


def _norm_or_identity(config: ModelConfig, is_norm: bool) -> Norm | Identity:
    if not is_norm:
        return Identity()
    return make_norm(config.norm, config.d_model, config.norm_epsilon)


class InterleavedBlock(nnx.Module):
    """Several dense layers and then a MoE layer."""

    def __init__(self, dense: "Stack", moe_block: Block):
        self.dense = dense
        self.moe_block = moe_block

    def __call__(self, x_BLD: jax.Array, context: Context):
        """Returns (x_BLD, `RoutingStats` of the MoE layer, None)."""
        x_BLD, _ = self.dense(x_BLD, context)
        return self.moe_block(x_BLD, context)

    def walk(self, context: Context | None = None) -> Iterator[tuple[Block, Context | None]]:
        """Yields the layers of this module with the context of each."""
        yield from self.dense.walk(context)
        yield self.moe_block, context


class Stack(nnx.Module):
    """`num` blocks of one kind, applied one after the other by `lax.scan`.

    Args:
      make_block: makes one block from its `Rngs`.
      num: how many.
      config: for `model.remat` and `model.scan_layers`.
      rngs: split into one key per block.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        num: int,
        config: Config,
        *,
        rngs: nnx.Rngs,
    ):
        def make_state(key):
            block = make_block(nnx.Rngs(params=key))
            return nnx.state(block)

        keys_N = jax.random.split(rngs.params(), num)
        states_N = jax.vmap(make_state)(keys_N)
        block_shapes = nnx.eval_shape(lambda: make_block(nnx.Rngs(params=0)))
        graphdef, _ = nnx.split(block_shapes)
        self.block = nnx.merge(graphdef, _with_layer_axis(states_N))
        self.num = num
        self.remat = config.model.remat
        saved: tuple[str, ...] = SAVED_NAMES
        if config.moe.save_exchanged:
            saved = (*SAVED_NAMES, EXCHANGED)
        self.saved = saved
        self.unroll = not config.model.scan_layers

    def __call__(
        self,
        x_BLD: jax.Array,
        context: Context,
        overrides: RoutingOverrides = AS_TRAINED,
    ) -> tuple[jax.Array, RoutingStats | None]:
        """Returns (x_BLD, `RoutingStats` with a leading axis of MoE layers, or None).

        The overrides have such an axis, too.
        """
        graphdef, states_N = nnx.split(self.block)

        def one_block(x_BLD, layer):
            index, state, layer_overrides = layer
            block = nnx.merge(graphdef, state)
            layer_context = context.of_layer(index, layer_overrides)
            x_BLD, stats, _ = block(x_BLD, layer_context)
            return constrain_tokens(x_BLD), stats

        if self.remat:
            policy = jax.checkpoint_policies.save_only_these_names(*self.saved)
            # A scan keeps the two passes apart by itself; unrolled layers need it said.
            one_block = jax.checkpoint(one_block, policy=policy, prevent_cse=self.unroll)
        indices_N = jnp.arange(self.num)
        num_unrolled = self.num if self.unroll else 1
        layers = (indices_N, states_N, overrides)
        return jax.lax.scan(one_block, x_BLD, layers, unroll=num_unrolled)

    def walk(self, context: Context | None = None) -> Iterator[tuple[Block, Context | None]]:
        """Yields the layers of this module with the context of each."""
        for index in range(self.num):
            block = self._block(index)
            yield from block.walk(context and context.of_layer(index))

    def _block(self, index: int):
        graphdef, states_N = nnx.split(self.block)
        state = jax.tree.map(lambda x_N: x_N[index], states_N)
        return nnx.merge(graphdef, state)


def _with_layer_axis(states_N):
    """Names the leading axis that `vmap` gave every parameter."""

    def add_axis(variable):
        return variable.replace(axes=("layers", *variable.axes))

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    return jax.tree.map(add_axis, states_N, is_leaf=is_variable)
