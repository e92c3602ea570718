"""Interventions on one MoE layer: how it routes, and which weights its experts have.

Each function takes the layer and returns an edited copy; the layer that it was given, and arrays
that do not change, stay as they are. Layers here stand alone (`Decoder.walk`): parameters have no
leading axis of layers. All interventions are for evaluation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import LOSS_SPECS
from moejax.inspection.analysis.expert_similarity import weight_cosine
from moejax.moe.experts.experts import Experts
from moejax.moe.layer import MoE
from moejax.moe.router.modules import NoLogits

LayerEdit = Callable[[MoE], MoE]
"""Returns an edited copy of a layer."""

WEIGHTS = ("gate_up", "down", "gate_up_bias", "down_bias")
UNUSED: dict[str, Any] = {
    f"{name}_weight": 0.0 for name, spec in LOSS_SPECS.items() if spec.statistic
}
"""Losses that evaluation has no use for, and whose sums may not be defined for every K."""


def chosen_per_token(moe: MoE) -> int:
    """Returns K, the experts per token in evaluation; the average where experts choose."""
    if moe.is_limited:
        return min(int(moe.limit[...][0]), moe.config.top_k)
    return moe.config.top_k


def why_not_top_k(moe: MoE, top_k: int) -> str | None:
    """Why the layer cannot send a token to that many experts; None if it can."""
    config = moe.config
    if config.router == "soft":
        return "moe.router=soft mixes all tokens into every slot"
    most = _largest_top_k(moe)
    if not 1 <= top_k <= most:
        return f"K={top_k} must be between 1 and {most} with moe.router={config.router}"
    if config.router == "hierarchical" and top_k % config.top_k_groups:
        return (
            f"K={top_k} must be a multiple of moe.top_k_groups={config.top_k_groups} "
            "with moe.router=hierarchical"
        )
    return None


def _largest_top_k(moe: MoE) -> int:
    """Returns the largest K that the layer's router can select."""
    config = moe.config
    if config.router == "hash":
        return config.top_k  # columns of its table
    if config.router == "quantile":
        return config.num_choices - 1
    if config.num_groups > 1:
        experts_per_group = config.num_experts // config.num_groups
        return min(config.num_choices, config.top_k_groups * experts_per_group)
    return config.num_choices


def with_top_k(moe: MoE, top_k: int) -> MoE:
    """Returns the layer with another K, and with the run's own normalisation.

    Without `moe.renormalize`, fewer experts also have a smaller sum of weights.
    """
    edited = _with_config(moe, top_k=top_k, **UNUSED)
    edited.is_limited = False
    return edited


def with_capacity(moe: MoE, factor: float) -> MoE:
    """Returns the layer with an evaluation capacity factor.

    Each expert accepts at most that multiple of a perfectly balanced load.
    """
    return _with_config(moe, dispatch="capacity", eval_capacity_factor=factor)


def without_bias(moe: MoE) -> MoE:
    """Returns the layer with its selection bias at 0."""
    edited = _copy(moe)
    _edit(edited, "selection_bias", jnp.zeros_like)
    return edited


def blocked(moe: MoE, expert: int) -> MoE:
    """Returns the layer with one expert blocked: its tokens go to the next expert in rank."""
    edited = _copy(moe)
    edited.block(np.arange(moe.config.num_choices) == expert)
    return edited


def why_not_ablated(moe: MoE, expert: int) -> str | None:
    """Why the output of an expert cannot be made zero; None if it can."""
    first = moe.config.num_experts + moe.config.num_zero_experts
    if first <= expert < first + moe.config.num_identity_experts:
        return "the output of identity experts is the token"
    return None


def ablated(moe: MoE, expert: int) -> MoE:
    """Returns the layer with the output of one expert set to zero, and the same routing.

    Not for identity experts, which have no weights.
    """
    config = moe.config
    edited = _copy(moe)
    if expert < config.num_experts:
        for name in ("down", "down_bias"):
            if hasattr(edited.experts, name):
                _edit(edited.experts, name, lambda w: w.at[expert].set(0.0))
    elif expert >= config.num_choices - config.num_constant_experts:
        index = expert - config.num_choices  # constant experts come last
        _edit(edited.free_experts, "vectors", lambda w: w.at[index].set(0.0))
    return edited


def swapped(moe: MoE, first: int, second: int) -> MoE:
    """Returns the layer with the weights of two experts swapped, and the same router."""
    pair = np.array([first, second])
    reversed_pair = np.array([second, first])
    return _with_weights(moe, lambda w: w.at[pair].set(w[reversed_pair]))


def merged(moe: MoE, first: int, second: int) -> MoE:
    """Returns the layer with the mean of two experts' weights in both, and the same router."""
    pair = np.array([first, second])
    return _with_weights(moe, lambda w: w.at[pair].set((w[first] + w[second])[None] / 2))


def with_random_routing(moe: MoE) -> MoE:
    """Returns the layer with K experts drawn uniformly by token and position.

    Each of them has weight 1/K, times the run's `moe.route_scale`.
    """
    edited = _without_router(moe, router="random", top_k=chosen_per_token(moe))
    edited.is_limited = False
    return edited


def with_uniform_routing(moe: MoE) -> MoE:
    """Returns the layer with every token sent to every expert.

    Each expert has weight 1/E, times the run's `moe.route_scale`.
    """
    edited = _without_router(moe, router="softmax_topk", top_k=moe.config.num_choices)
    edited.is_limited = False
    return edited


def similarity(experts: Experts) -> Float[np.ndarray, "E E"]:
    """Returns cosines between experts, each as one vector of all its weights.

    Low where two experts compute the same with their hidden units in another order.
    """
    flat = []
    for name in WEIGHTS:
        if hasattr(experts, name):
            weights_E = np.asarray(getattr(experts, name)[...])
            flat.append(weights_E.reshape(len(weights_E), -1))
    weights_EP = np.concatenate(flat, axis=1)
    (similarity_EE,) = weight_cosine(weights_EP[None])
    return similarity_EE


def _copy(moe: MoE) -> MoE:
    return nnx.merge(*nnx.split(moe))


def _with_config(moe: MoE, **leaves: Any) -> MoE:
    edited = _copy(moe)
    edited.config = dataclasses.replace(moe.config, **leaves)
    return edited


def _without_router(moe: MoE, **leaves: Any) -> MoE:
    """Returns the layer without what steers a selection: dropless, equal scores for all experts."""
    plain = {
        "score": "uniform",
        "num_groups": 1,
        "top_k_groups": 1,
        "selection_bias": False,
        "dispatch": "dropless",
    }
    edited = _with_config(moe, **plain, **UNUSED, **leaves)
    edited.router = NoLogits(edited.config, 0, rngs=nnx.Rngs(0))
    return edited


def _with_weights(moe: MoE, change: Callable[[Array], Array]) -> MoE:
    edited = _copy(moe)
    for name in WEIGHTS:
        if hasattr(edited.experts, name):
            _edit(edited.experts, name, change)
    return edited


def _edit(module: nnx.Module, name: str, change: Callable[[Array], Array]) -> None:
    """Replaces an array that another module may share, rather than writing into it."""
    variable = getattr(module, name)
    setattr(module, name, variable.replace(change(variable[...])))
