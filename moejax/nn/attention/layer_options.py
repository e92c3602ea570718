"""What the attention layers of a model do not share, as data: layers of a scan are made alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.config import AttentionConfig
from moejax.config.sections.attention import FULL
from moejax.nn.rope_scaling import rope_frequencies, rope_magnitude


class LayerConstant(nnx.Variable):
    """A value that layers of one kind do not share, and that the configuration gives them.

    It has no gradient. As an array it passes through a scan over layers.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOptions:
    """Options of a layer, or with a leading axis those of several; None where all are alike.

    Attributes:
      window: the most keys that a query sees, int32.
      chunk: positions of a chunk, int32.
      has_rope: whether queries and keys have rotary positions.
      frequency_a: rotary frequencies, in radians a position.
      magnitude: factor on rotated queries and keys, together with `frequency_a`.
    """

    window: Any = None
    chunk: Any = None
    has_rope: Any = None
    frequency_a: Any = None
    magnitude: Any = None


ALL_ALIKE = LayerOptions()
"""The options of a layer that differs from no other."""


def options_by_layer(config: AttentionConfig, num_layers: int, num_pairs: int) -> LayerOptions:
    """Returns the options of each layer, with a leading axis of layers.

    Args:
      config: of the model.
      num_layers: of the model.
      num_pairs: half of the dimensions of a head that are rotated.
    """
    window_N = np.array(config.windows(num_layers), np.int32)
    chunk_N = np.array(config.chunks(num_layers), np.int32)
    has_rope_N = np.array(config.have_rope(num_layers))
    options = LayerOptions(
        window=window_N if config.window else None,
        chunk=chunk_N if config.chunk else None,
        has_rope=None if config.rope_layers == "rope" else has_rope_N,
    )
    if not config.rope_theta_window:
        return options
    of_window = dataclasses.replace(
        config, rope_theta=config.rope_theta_window, rope_scaling="none"
    )
    has_window_N = window_N < FULL
    frequency_Na = np.where(
        has_window_N[:, None],
        rope_frequencies(of_window, num_pairs),
        rope_frequencies(config, num_pairs),
    )
    magnitude_N = np.where(has_window_N, rope_magnitude(of_window), rope_magnitude(config))
    return dataclasses.replace(
        options, frequency_a=frequency_Na, magnitude=magnitude_N.astype(np.float32)
    )


def make_constants(config: AttentionConfig, num_pairs: int) -> LayerOptions:
    """Returns variables for the options of a layer; they hold those of the first one."""

    def make(value_N):
        axes = ("head",) * (value_N.ndim - 1)
        return LayerConstant(jnp.asarray(value_N[0]), axes=axes)

    return jax.tree.map(make, options_by_layer(config, 1, num_pairs))


def read_constants(constants: LayerOptions) -> LayerOptions:
    """Returns the options that variables hold."""
    return jax.tree.map(lambda constant: constant[...], constants, is_leaf=_is_constant)


def assign_constants(constants: LayerOptions, options: LayerOptions) -> None:
    """Gives variables, which may have leading axes of layers, their options."""
    variables = jax.tree.leaves(constants, is_leaf=_is_constant)
    for variable, value in zip(variables, jax.tree.leaves(options), strict=True):
        variable[...] = jnp.asarray(value)


def _is_constant(node: Any) -> bool:
    return isinstance(node, LayerConstant)
