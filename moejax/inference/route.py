"""Routes rows of tokens through a loaded model, token by token, compiled once for each shape."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import Config, ConfigError
from moejax.inference.load import LoadedRun
from moejax.moe.router.by_token import choices_by_token, scores_by_token
from moejax.sharding import BATCH_AXES

SHORTEST = 64
"""Positions of the shortest padded row."""


class RoutedRows(NamedTuple):
    """How rows were routed, on device; T = B * L.

    Attributes:
      experts_NTK: see `choices_by_token`.
      weights_NTK: likewise.
      entropy_N: sums over real tokens of the entropies of the router's distributions, nats.
      logits_NTE: see `scores_by_token`; None unless they were asked for.
      probs_NTE: likewise.
    """

    experts_NTK: Int[Array, "N T K"]
    weights_NTK: Float[Array, "N T K"]
    entropy_N: Float[Array, "N"]
    logits_NTE: Any = None
    probs_NTE: Any = None


def padded_length(loaded: LoadedRun, length: int) -> int:
    """Returns the positions of a row that holds `length` tokens.

    It is a power of two, so that few programs serve many texts. Where routing depends on the
    length of the row, padding included, it is the length itself: experts that choose tokens
    (expert_choice), and evaluation with a capacity. The mesh may need a few positions more.
    """
    if _depends_on_length(loaded.config):
        parts = 1 if loaded.mesh is None else loaded.mesh.shape["context"]
        return _round_up(length, parts)
    exponent = (length - 1).bit_length()
    next_power_of_two = 1 << exponent
    return max(SHORTEST, next_power_of_two)


def rows_at_once(loaded: LoadedRun, rows: int) -> int:
    """Returns the smallest number of at least `rows` that the mesh can split."""
    if loaded.mesh is None:
        return rows
    sizes = [loaded.mesh.shape[axis] for axis in BATCH_AXES]
    num_parts = math.prod(sizes)
    return _round_up(rows, num_parts)


def route_rows(
    loaded: LoadedRun,
    tokens_BL: Int[np.ndarray, "B L"],
    segments_BL: Int[np.ndarray, "B L"],
    positions_BL: Int[np.ndarray, "B L"],
    *,
    with_scores: bool = False,
) -> RoutedRows:
    """Routes rows of tokens as evaluation does: nothing is drawn at random.

    Args:
      loaded: the model; B must be a multiple of what its mesh splits the batch into
        (`rows_at_once`).
      tokens_BL: token ids.
      segments_BL: number of the piece within its row, 0 at padding.
      positions_BL: positions within the piece.
      with_scores: return logits and probabilities too.

    Raises:
      ConfigError: the model has no MoE layers.
    """
    if not loaded.config.num_moe_layers:
        raise ConfigError(
            "moe.num_experts=0: this model has no experts, so nothing is routed; load a MoE run"
        )
    graphdef, state = nnx.split(loaded.model)
    arrays = (tokens_BL, segments_BL, positions_BL)
    if loaded.mesh is None:
        return _route(graphdef, with_scores, state, *arrays)
    with jax.set_mesh(loaded.mesh):
        return _route(graphdef, with_scores, state, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _route(
    graphdef: Any,
    with_scores: bool,
    state: Any,
    tokens_BL: jax.Array,
    segments_BL: jax.Array,
    positions_BL: jax.Array,
) -> RoutedRows:
    """Returns the routing of a batch, with scores if they are asked for."""
    model = nnx.merge(graphdef, state)
    _, stats = model(tokens_BL, segments_BL, positions_BL, trace=True)
    routings = [group.routing for group in stats]
    num_choices = model.config.moe.num_choices
    choices = choices_by_token(routings, num_choices)
    entropy_N = jnp.concatenate([group.entropy for group in stats])
    if not with_scores:
        return RoutedRows(*choices, entropy_N)
    return RoutedRows(*choices, entropy_N, *scores_by_token(routings, num_choices))


def _depends_on_length(config: Config) -> bool:
    """Whether routing of a token depends on the length of its row."""
    for moe in config.moe_groups:
        if moe.router == "expert_choice" or moe.eval_capacity_factor > 0:
            return True
    return False


def _round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below the number."""
    num_multiples = -(-number // multiple)
    return num_multiples * multiple
