"""Interventions on one MoE layer: how it routes, and which weights its experts have.

An intervention is data wherever it can be (`LayerEdit`): arrays that a compiled program takes, so
that many of a kind can be stacked and run as one. All of them are for evaluation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import LOSS_SPECS, ROUTER_RULES, MoeConfig
from moejax.inspection.analysis.expert_similarity import weight_cosine
from moejax.moe.experts.experts import Experts
from moejax.moe.layer import MoE
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides
from moejax.moe.router.modules import NoLogits, RouterState

UNUSED: dict[str, Any] = {
    f"{name}_weight": 0.0 for name, spec in LOSS_SPECS.items() if spec.statistic
}
"""Losses that evaluation has no use for, and whose sums may not be defined for every K."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerEdit:
    """An intervention on one MoE layer.

    Those of equal `jax.tree.structure` can be stacked: one program runs them all.

    Attributes:
      overrides: how the layer routes.
      sources_2E: two experts, the mean of whose weights each expert has, int32; an expert twice for
        its weights alone. None: each has its own.
      structure: a function of the layer, and its further arguments: it returns a copy that is
        another program; empty where the layer stays the same one.
    """

    overrides: RoutingOverrides = AS_TRAINED
    sources_2E: Any = None
    structure: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})

    def apply(self, moe: MoE) -> MoE:
        """Returns the layer with another structure and other weights; overrides go with tokens."""
        if self.structure:
            function, *arguments = self.structure
            moe = function(moe, *arguments)
        if self.sources_2E is not None:
            moe = _with_weights_of(moe, jnp.asarray(self.sources_2E))
        return moe


def chosen_per_token(moe: MoE) -> int:
    """Returns K, the experts per token in evaluation; the average where experts choose."""
    if moe.active_top_k is None:
        return moe.config.top_k
    return min(int(moe.active_top_k[...][0]), moe.config.top_k)


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


def with_top_k(moe: MoE, top_k: int) -> LayerEdit:
    """Returns another K, with the run's own normalisation.

    Without `moe.renormalize`, fewer experts also have a smaller sum of weights. Numbers of experts
    up to the same power of two share a program, where the router can select the best of more.
    """
    if top_k == chosen_per_token(moe) == moe.config.top_k:
        return LayerEdit()
    if not ROUTER_RULES[moe.config.router].can_limit:
        return LayerEdit(structure=(_select_top_k, top_k))
    power_of_two = 1 << (top_k - 1).bit_length()
    widest = min(power_of_two, _largest_top_k(moe))
    overrides = RoutingOverrides(active_top_k=np.int32(top_k))
    return LayerEdit(overrides, structure=(_select_top_k, widest))


def with_capacity(factor: float) -> LayerEdit:
    """Returns an evaluation capacity factor.

    Each expert accepts at most that multiple of a perfectly balanced load.
    """
    return LayerEdit(RoutingOverrides(capacity_factor=np.float32(factor)))


def without_bias() -> LayerEdit:
    """Returns a selection bias of 0."""
    return LayerEdit(structure=(_zero_bias,))


def blocked(config: MoeConfig, expert: int) -> LayerEdit:
    """Returns one expert blocked: its tokens go to the next expert in rank."""
    return LayerEdit(RoutingOverrides(is_blocked_E=_one_hot(config, expert)))


def why_not_ablated(moe: MoE, expert: int) -> str | None:
    """Why the output of an expert cannot be made zero; None if it can."""
    first = moe.config.num_experts + moe.config.num_zero_experts
    if first <= expert < first + moe.config.num_identity_experts:
        return "the output of identity experts is the token"
    return None


def ablated(config: MoeConfig, expert: int) -> LayerEdit:
    """Returns the output of one expert set to zero, and the same routing."""
    return LayerEdit(RoutingOverrides(is_ablated_E=_one_hot(config, expert)))


def swapped(config: MoeConfig, first: int, second: int) -> LayerEdit:
    """Returns the weights of two experts swapped, and the same router."""
    sources_2E = _own_weights(config)
    sources_2E[:, first] = second
    sources_2E[:, second] = first
    return LayerEdit(sources_2E=sources_2E)


def merged(config: MoeConfig, first: int, second: int) -> LayerEdit:
    """Returns the mean of two experts' weights in both, and the same router."""
    sources_2E = _own_weights(config)
    for expert in (first, second):
        sources_2E[:, expert] = (first, second)
    return LayerEdit(sources_2E=sources_2E)


def with_random_routing(moe: MoE) -> LayerEdit:
    """Returns K experts drawn uniformly by token and position.

    Each of them has weight 1/K, times the run's `moe.route_scale`.
    """
    return LayerEdit(structure=(_select_without_logits, "random", chosen_per_token(moe)))


def with_uniform_routing(moe: MoE) -> LayerEdit:
    """Returns every token sent to every expert.

    Each expert has weight 1/E, times the run's `moe.route_scale`.
    """
    return LayerEdit(structure=(_select_without_logits, "softmax_topk", moe.config.num_choices))


def similarity(experts: Experts) -> Float[np.ndarray, "E E"]:
    """Returns cosines between experts, each as one vector of all its weights.

    Low where two experts compute the same with their hidden units in another order.
    """
    flat = []
    for weights_E in jax.device_get(jax.tree.leaves(nnx.state(experts))):
        flat.append(weights_E.reshape(len(weights_E), -1))
    weights_EP = np.concatenate(flat, axis=1)
    (similarity_EE,) = weight_cosine(weights_EP[None])
    return similarity_EE


def _one_hot(config: MoeConfig, expert: int) -> np.ndarray:
    return np.arange(config.num_choices) == expert


def _own_weights(config: MoeConfig) -> Int[np.ndarray, "2 E"]:
    """Returns the `sources_2E` of experts that have their own weights."""
    expert_E = np.arange(config.num_experts, dtype=np.int32)
    return np.stack([expert_E, expert_E])


def _copy(moe: MoE) -> MoE:
    return nnx.merge(*nnx.split(moe))


def _with_config(moe: MoE, **leaves: Any) -> MoE:
    edited = _copy(moe)
    edited.config = dataclasses.replace(moe.config, **leaves)
    return edited


def _select_top_k(moe: MoE, top_k: int) -> MoE:
    """Returns the layer with arrays for another K, which nothing schedules."""
    edited = _with_config(moe, top_k=top_k, **UNUSED)
    edited.active_top_k = None
    return edited


def _select_without_logits(moe: MoE, router: str, top_k: int) -> MoE:
    """Returns the layer without what steers a selection: dropless, equal scores for all experts."""
    plain = {
        "router": router,
        "top_k": top_k,
        "score": "uniform",
        "num_groups": 1,
        "top_k_groups": 1,
        "selection_bias": False,
        "dispatch": "dropless",
    }
    edited = _with_config(moe, **plain, **UNUSED)
    edited.active_top_k = None
    edited.router = NoLogits(edited.config, 0, rngs=nnx.Rngs(0))
    return edited


def _zero_bias(moe: MoE) -> MoE:
    edited = _copy(moe)
    bias = edited.selection_bias
    edited.selection_bias = RouterState(jnp.zeros_like(bias[...]), axes=bias.axes)
    return edited


def _with_weights_of(moe: MoE, sources_2E: Int[Array, "2 E"]) -> MoE:
    """Returns the layer with the mean of two experts' weights in each expert."""
    first_E, second_E = sources_2E

    def mean_of_two(weights_E):
        # Twice the same weights have themselves as their mean, to the last bit.
        return (weights_E[first_E] + weights_E[second_E]) / 2

    graphdef, state = nnx.split(moe.experts)
    edited = _copy(moe)
    edited.experts = nnx.merge(graphdef, jax.tree.map(mean_of_two, state))
    return edited
