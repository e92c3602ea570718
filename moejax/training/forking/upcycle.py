"""Experts from the feed-forward networks of a dense model.

  copy      every expert is the network, with noise if asked for (Komatsuzaki et al. 2022)
  drop      a copy, of which a fraction of the hidden units is drawn again from the distribution of
            their weights, others in each expert (Nakamura et al. 2025, Drop-Upcycling)
  granular  G segments of the hidden units are G experts, and there are E / G copies of each; the
            router's columns are the same for the segments of a copy, so that a token that chooses
            one chooses all of them (He et al. 2024, virtual groups)

Combine weights sum to 1, so a copy without noise and segments compute what the network computes,
whatever the router says: segments have a weight of 1 / G of their copy's, and projections out are
multiplied by G.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config, ConfigError
from moejax.training.forking.layers import ByLayer, places_of, split_path

EXPERTS = "ffn/experts/"
ROUTER = "ffn/router/"

HIDDEN_AXIS = {"gate_up": -1, "gate_up_bias": -1, "down": -2}
"""The axis of hidden units; what is not here has none."""


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """How experts are made of networks.

    Attributes:
      config: of the fork.
      source: of the dense model.
      key: of what is drawn.
    """

    config: Config
    source: Config
    key: jax.Array

    @property
    def num_segments(self) -> int:
        """Segments of a network that are experts of their own."""
        if self.config.init.upcycle != "granular":
            return 1
        return self.source.model.d_ff // self.config.moe.d_expert


def check_upcycling(config: Config, source: Config) -> None:
    """Raises `ConfigError` unless experts can be made of the networks of a dense model."""
    moe, d_ff = config.moe, source.model.d_ff
    way = config.init.upcycle
    if source.num_moe_layers:
        raise ConfigError(
            f"init.upcycle={way} makes experts of dense layers, and init.source="
            f"{config.init.source} has experts; use init.upcycle=none"
        )
    if way != "granular" and moe.d_expert != d_ff:
        raise ConfigError(
            f"moe.d_expert={moe.d_expert} must be {d_ff}, the width of the source's networks, with "
            f"init.upcycle={way}; set that, or use init.upcycle=granular"
        )
    if way == "granular":
        segments, rest = divmod(d_ff, moe.d_expert)
        if rest or moe.num_experts % segments or moe.top_k % segments:
            raise ConfigError(
                f"init.upcycle=granular cuts networks of width {d_ff} into experts of "
                f"moe.d_expert={moe.d_expert}; that must divide it, and moe.num_experts="
                f"{moe.num_experts} and moe.top_k={moe.top_k} must be multiples of the number of "
                "segments"
            )


def upcycle(
    initial: Mapping[str, jax.Array], arrays: Mapping[str, jax.Array], upcycling: Upcycling
) -> dict[str, jax.Array]:
    """Returns the parameters of a fork.

    Args:
      initial: its initial parameters by path, of which routers are kept.
      arrays: parameters of the source by path.
      upcycling: how.

    Raises:
      ConfigError: an array of the fork that the source has no counterpart of.
    """
    by_layer = ByLayer(arrays, upcycling.source)
    places = places_of(upcycling.config)
    found = {}
    for number, (path, array) in enumerate(initial.items()):
        place, own = split_path(path, places)
        key = jax.random.fold_in(upcycling.key, number)
        if place is None:
            found[path] = _same(path, arrays.get(path), array)
        elif own.startswith(ROUTER):
            found[path] = _alike_in_groups(array, upcycling.num_segments)
        elif own.startswith(EXPERTS):
            name = own.removeprefix(EXPERTS)
            network = by_layer.read(f"ffn/{name}", place.layers)
            if network is not None:
                network = _make_experts(name, network, upcycling, place.layers, key)
            found[path] = _same(path, network, array)
        else:
            found[path] = _same(path, by_layer.read(own, place.layers), array)
    return found


def _same(path: str, found: jax.Array | None, wanted: jax.Array) -> jax.Array:
    """Returns an array if it has the shape that is wanted."""
    if found is None:
        raise ConfigError(
            f"init.upcycle: the source has nothing for {path}; use the model of the source, but "
            "for its experts"
        )
    if found.shape != wanted.shape:
        raise ConfigError(
            f"init.upcycle: {path} is {found.shape} in the source and {wanted.shape} in this "
            "model; use the sizes of the source"
        )
    return found


def _alike_in_groups(array: jax.Array, num_segments: int) -> jax.Array:
    """Returns a router whose last axis, that of experts, is alike for the segments of a copy."""
    if num_segments == 1:
        return array
    return jnp.repeat(array[..., ::num_segments], num_segments, axis=-1)


def _make_experts(
    name: str, network: jax.Array, upcycling: Upcycling, layers: np.ndarray, key: jax.Array
) -> jax.Array:
    """Returns arrays of experts `[layers, E, ...]` from those of networks `[layers, ...]`."""
    init, num_experts = upcycling.config.init, upcycling.config.moe.num_experts
    if init.upcycle == "granular":
        return _cut(name, network, upcycling.num_segments, num_experts)
    copies = jnp.repeat(network[:, None], num_experts, axis=1)
    if init.upcycle == "drop":
        return _draw_again(name, copies, upcycling, layers, key)
    if init.upcycle_noise:
        deviation = copies.std(axis=tuple(range(2, copies.ndim)), keepdims=True)
        noise = jax.random.normal(key, copies.shape)
        copies += init.upcycle_noise * deviation * noise
    return copies


def _cut(name: str, network: jax.Array, num_segments: int, num_experts: int) -> jax.Array:
    """Returns segments of the hidden units; expert e is segment e modulo their number."""
    if name not in HIDDEN_AXIS:
        return jnp.repeat(network[:, None], num_experts, axis=1)
    axis = HIDDEN_AXIS[name]
    segments = jnp.stack(jnp.split(network, num_segments, axis=axis), axis=1)
    if name == "down":
        segments *= num_segments
    return jnp.concatenate([segments] * (num_experts // num_segments), axis=1)


def _draw_again(
    name: str, copies: jax.Array, upcycling: Upcycling, layers: np.ndarray, key: jax.Array
) -> jax.Array:
    """Returns copies of which some hidden units, the same of all arrays, are drawn again."""
    if name not in HIDDEN_AXIS:
        return copies
    axis = HIDDEN_AXIS[name]
    num_hidden = copies.shape[axis]
    is_dropped_NEF = _dropped_units(upcycling, layers, copies.shape[1], num_hidden)
    shape = [*copies.shape[:2], *[1] * (copies.ndim - 2)]
    shape[axis] = num_hidden
    is_dropped = is_dropped_NEF.reshape(shape)
    axes = tuple(range(2, copies.ndim))
    count = jnp.maximum(jnp.broadcast_to(is_dropped, copies.shape).sum(axes, keepdims=True), 1)
    mean = jnp.where(is_dropped, copies, 0).sum(axes, keepdims=True) / count
    squares = jnp.where(is_dropped, jnp.square(copies - mean), 0).sum(axes, keepdims=True)
    drawn = mean + jnp.sqrt(squares / count) * jax.random.normal(key, copies.shape)
    return jnp.where(is_dropped, drawn, copies)


def _dropped_units(
    upcycling: Upcycling, layers: np.ndarray, num_experts: int, num_hidden: int
) -> jax.Array:
    """Returns which hidden units of each expert are drawn again, `[layers, E, F]`."""
    num_dropped = round(upcycling.config.init.upcycle_drop * num_hidden)

    def of_expert(layer: jax.Array, expert: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(upcycling.key, layer), expert)
        return jax.random.permutation(key, num_hidden) < num_dropped

    of_layer = jax.vmap(of_expert, in_axes=(None, 0))
    return jax.vmap(of_layer, in_axes=(0, None))(jnp.asarray(layers), jnp.arange(num_experts))
