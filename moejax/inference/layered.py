"""A decoder taken apart for decoding: one program for each kind of layer, called layer after layer.

A scan over layers copies the weights of a layer, of all its experts, before it uses them, and its
cache twice. Where a step computes little, that is most of its time. Here each layer has arrays of
its own: weights are not copied, caches are written in place, and what is compiled does not grow
with the number of layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.models import Decoder
from moejax.models.blocks import Context
from moejax.moe.token_info import TokenInfo
from moejax.nn.attention.cache import Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache(Cache):
    """The tokens so far, for models in which a text that grows long is computed again.

    Attributes:
      tokens_BS: ids by slot.
    """

    tokens_BS: jax.Array


class LayeredDecoder:
    """A decoder whose layers have arrays of their own, with a cache of keys and values.

    Args:
      model: its layers are copied, so that their weights are in memory twice while it exists.
    """

    def __init__(self, model: Decoder):
        self.config = model.config
        blocks = [block for block, _ in model.walk()]
        self._blocks = blocks
        self._remembers_text = model.config.attention.changes_with_length
        self._layers = [_program(_layer_program, block) for block in blocks]
        without_layers = nnx.clone(model)
        without_layers.stacks = nnx.List([])
        self._begin = _program(_begin_program, without_layers)
        self._end = _program(_end_program, without_layers)

    def init_cache(self, batch: int, slots: int) -> list[Cache]:
        """Returns an empty cache of each layer for `batch` sequences of up to `slots` tokens."""
        cache: list[Cache] = [block.init_cache(batch, slots) for block in self._blocks]
        if self._remembers_text:
            cache.append(TextCache(jnp.zeros((batch, slots), jnp.int32)))
        return cache

    def extend(
        self,
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
        cache: list[Cache],
        is_token_BL: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], list[Cache]]:
        """Returns the residual stream after the last layer for L more positions; for `logits`.

        Args:
          tokens_BL: the next tokens of each sequence.
          positions_BL: their positions, which are also the slots they fill; slots after a
            sequence's end may hold anything, for they are written before they are read.
          cache: from `init_cache` or an earlier call, with the keys and values of the earlier
            positions; overwritten.
          is_token_BL: False after the end of a sequence; None: all are tokens.

        Returns:
          The residual stream, and the cache with these positions.
        """
        if not self._remembers_text:
            return self._extend(tokens_BL, positions_BL, cache, is_token_BL)
        of_layers: list[Cache] = cache[:-1]
        text: Any = cache[-1]
        text = text.with_positions(TextCache(tokens_BL), positions_BL)
        if self._makes_long(positions_BL, is_token_BL):
            x_BLD, of_layers = self._extend_anew(text, positions_BL, of_layers)
        else:
            x_BLD, of_layers = self._extend(tokens_BL, positions_BL, of_layers, is_token_BL)
        return x_BLD, [*of_layers, text]

    def _extend(
        self, tokens_BL: Any, positions_BL: Any, cache: list[Cache], is_token_BL: Any
    ) -> tuple[jax.Array, list[Cache]]:
        """Extends the caches of the layers."""
        x_BLD, context = self._begin(tokens_BL, positions_BL, is_token_BL)
        extended = []
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            x_BLD, layer_cache = layer(x_BLD, context, layer_cache)
            extended.append(layer_cache)
        return x_BLD, extended

    def _makes_long(self, positions_BL: jax.Array, is_token_BL: jax.Array | None) -> bool:
        """Whether these positions take texts that have begun over their original length."""
        limit = self.config.attention.rope_original_length
        if is_token_BL is not None:
            positions_BL = jnp.where(is_token_BL, positions_BL, 0)
        last = int(positions_BL.max())
        num_before = int(positions_BL[:, 0].max())
        return 0 < num_before <= limit <= last

    def _extend_anew(
        self, text: "TextCache", positions_BL: jax.Array, cache: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """Computes all of the texts again, as one is longer now than its layers were told."""
        length = int(positions_BL.max()) + 1
        tokens_BM = text.tokens_BS[:, :length]
        all_positions_BM = jnp.broadcast_to(jnp.arange(length), tokens_BM.shape)
        is_token_BM = all_positions_BM <= positions_BL[:, -1:]
        x_BMD, cache = self._extend(tokens_BM, all_positions_BM, cache, is_token_BM)
        return jnp.take_along_axis(x_BMD, positions_BL[:, :, None], axis=1), cache

    def logits(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns logits of the next token, float32, from what `extend` returns."""
        return self._end(x_BLD)


def _program(make: Callable, module: nnx.Module) -> Callable:
    """Returns a compiled function of a module, with its arrays bound.

    Modules of one kind share what is compiled. Arrays are passed as a flat list: splitting a module
    takes longer than running a small layer.
    """
    graphdef, state = nnx.split(module)
    arrays, structure = jax.tree.flatten(state)
    program = make(graphdef, structure)
    return functools.partial(program, arrays)


@functools.lru_cache(maxsize=64)
def _begin_program(graphdef, structure) -> Callable:
    """Returns what comes before the layers."""

    @jax.jit
    def begin(arrays, tokens_BL, positions_BL, is_token_BL):
        if is_token_BL is None:
            is_token_BL = jnp.ones(tokens_BL.shape, bool)
        model = _merge(graphdef, structure, arrays)
        segments_BL = is_token_BL.astype(jnp.int32)
        info = TokenInfo(is_token_BL, tokens_BL, positions_BL)
        context = Context(positions_BL, segments_BL, info)
        x_BLD = model.embed(tokens_BL)
        return x_BLD, context

    return begin


@functools.lru_cache(maxsize=64)
def _layer_program(graphdef, structure) -> Callable:
    """Returns one layer."""

    @functools.partial(jax.jit, donate_argnums=(1, 3))
    def apply(arrays, x_BLD, context, cache):
        block = _merge(graphdef, structure, arrays)
        x_BLD, _, cache = block(x_BLD, context, cache)
        return x_BLD, cache

    return apply


@functools.lru_cache(maxsize=64)
def _end_program(graphdef, structure) -> Callable:
    """Returns what comes after the layers."""

    @jax.jit
    def end(arrays, x_BLD):
        model = _merge(graphdef, structure, arrays)
        return model.unembed(x_BLD)

    return end


def _merge(graphdef, structure, arrays) -> Any:
    """Returns the module whose state is a flat list of arrays."""
    state = jax.tree.unflatten(structure, arrays)
    return nnx.merge(graphdef, state)
