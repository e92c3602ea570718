"""Changes to one MoE layer: how it routes, and which weights its experts have.

Each function takes the layer and returns a changed one; the layer that it was given, and arrays
that do not change, stay as they are. Layers here stand alone (`Decoder.walk`): parameters have no
leading axis of layers. All are for evaluation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax.inspection.analysis.expert_similarity import weight_cosine
from moejax.moe.experts.experts import Experts
from moejax.moe.layer import MoE
from moejax.moe.router.modules import NoLogits

Surgery = Callable[[MoE], MoE]

WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")
UNUSED: dict[str, Any] = dict.fromkeys(
    ("load_weight", "vmoe_load_weight", "sequence_balance_weight"), 0.0
)
"""Losses that evaluation has no use for, and whose sums do not go with every K."""


def chosen_per_token(moe: MoE) -> int:
    """Experts per token, K, as the layer is evaluated; on average where experts choose."""
    return min(int(moe.limit[...][0]), moe.config.top_k) if moe.is_limited else moe.config.top_k


def why_not_top_k(moe: MoE, top_k: int) -> str | None:
    """Why the layer cannot send a token to so many experts; None if it can."""
    config = moe.config
    if config.router == "soft":
        return "moe.router=soft mixes all tokens into every slot"
    most = config.num_choices
    if config.router == "hash":
        most = config.top_k  # columns of its table
    elif config.router == "quantile":
        most -= 1
    elif config.num_groups > 1:
        most = min(most, config.top_k_groups * (config.num_experts // config.num_groups))
    if not 1 <= top_k <= most:
        return f"K={top_k} must be between 1 and {most} with moe.router={config.router}"
    if config.router == "hierarchical" and top_k % config.top_k_groups:
        return f"K={top_k} must be a multiple of moe.top_k_groups={config.top_k_groups} with moe.router=hierarchical"
    return None


def with_top_k(moe: MoE, top_k: int) -> MoE:
    """Another number of experts per token, with the run's own normalisation.

    Without `moe.renormalize`, fewer experts also have less weight together.
    """
    changed = _with_config(moe, top_k=top_k, **UNUSED)
    changed.is_limited = False
    return changed


def with_capacity(moe: MoE, factor: float) -> MoE:
    """An evaluation capacity factor: each expert takes so many choices over a perfectly balanced load, and no more."""
    return _with_config(moe, dispatch="capacity", eval_capacity_factor=factor)


def without_bias(moe: MoE) -> MoE:
    """The selection bias at 0."""
    changed = _copy(moe)
    _edit(changed, "selection_bias", jnp.zeros_like)
    return changed


def blocked(moe: MoE, expert: int) -> MoE:
    """Tokens go to the next expert in rank instead; see `MoE.block`."""
    changed = _copy(moe)
    changed.block(np.arange(moe.config.num_choices) == expert)
    return changed


def why_not_ablated(moe: MoE, expert: int) -> str | None:
    """Why the output of an expert cannot be made zero; None if it can."""
    first = moe.config.num_experts + moe.config.num_zero_experts
    if first <= expert < first + moe.config.num_identity_experts:
        return "the output of identity experts is the token"
    return None


def ablated(moe: MoE, expert: int) -> MoE:
    """The expert's output is zero, and who chooses it stays as it is; not for identity experts, without weights."""
    config, changed = moe.config, _copy(moe)
    if expert < config.num_experts:
        for name in ("down", "down_bias"):
            if hasattr(changed.experts, name):
                _edit(changed.experts, name, lambda w: w.at[expert].set(0.0))
    elif expert >= config.num_choices - config.num_constant_experts:
        _edit(changed.free_experts, "vectors", lambda w: w.at[expert - config.num_choices].set(0.0))
    return changed


def swapped(moe: MoE, first: int, second: int) -> MoE:
    """Two experts with each other's weights; the router is as it was."""
    return _with_weights(
        moe, lambda w: w.at[np.array([first, second])].set(w[np.array([second, first])])
    )


def merged(moe: MoE, first: int, second: int) -> MoE:
    """Two experts that both have the mean of their weights; the router is as it was."""
    return _with_weights(
        moe, lambda w: w.at[np.array([first, second])].set((w[first] + w[second])[None] / 2)
    )


def with_random_routing(moe: MoE) -> MoE:
    """K experts drawn uniformly by token and position, each of weight 1/K, times the run's `moe.route_scale`."""
    changed = _without_router(moe, router="random", top_k=chosen_per_token(moe))
    changed.is_limited = False
    return changed


def with_uniform_routing(moe: MoE) -> MoE:
    """Every expert for every token, each of weight 1/E, times the run's `moe.route_scale`."""
    changed = _without_router(moe, router="softmax_topk", top_k=moe.config.num_choices)
    changed.is_limited = False
    return changed


def similarity(experts: Experts) -> Float[np.ndarray, "E E"]:
    """Cosines between all weights of two experts, as one vector each.

    Low where two experts compute the same with their hidden units in another order.
    """
    arrays = [np.asarray(getattr(experts, name)[...]) for name in WEIGHTS if hasattr(experts, name)]
    return weight_cosine(np.concatenate([w.reshape(len(w), -1) for w in arrays], axis=1)[None])[0]


def _copy(moe: MoE) -> MoE:
    return nnx.merge(*nnx.split(moe))


def _with_config(moe: MoE, **leaves: Any) -> MoE:
    changed = _copy(moe)
    changed.config = dataclasses.replace(moe.config, **leaves)
    return changed


def _without_router(moe: MoE, **leaves: Any) -> MoE:
    """Dropless and without whatever steers a selection; equal scores for all experts."""
    plain = {
        "score": "uniform",
        "num_groups": 1,
        "top_k_groups": 1,
        "selection_bias": False,
        "dispatch": "dropless",
    }
    changed = _with_config(moe, **plain, **UNUSED, **leaves)
    changed.router = NoLogits(changed.config, 0, rngs=nnx.Rngs(0))
    return changed


def _with_weights(moe: MoE, change: Callable[[Array], Array]) -> MoE:
    changed = _copy(moe)
    for name in WEIGHTS:
        if hasattr(changed.experts, name):
            _edit(changed.experts, name, change)
    return changed


def _edit(module: nnx.Module, name: str, change: Callable[[Array], Array]) -> None:
    """Puts a changed array in place of one that another module may share."""
    variable = getattr(module, name)
    setattr(module, name, variable.replace(change(variable[...])))
