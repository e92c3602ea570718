"""Routers: pure functions from logits to a `Routing`, one file per family.

`ROUTERS` has them by name.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.config import MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.router.expert_choice import route_expert_choice as route_expert_choice
from moejax.moe.router.fixed import route_balanced, route_hash, route_random
from moejax.moe.router.hierarchical import route_hierarchical
from moejax.moe.router.routing import RouterInputs as RouterInputs
from moejax.moe.router.routing import Routing as Routing
from moejax.moe.router.scores import combine_weights, log_weights
from moejax.moe.router.selection import save_for_remat
from moejax.moe.router.sinkhorn import route_sinkhorn
from moejax.moe.router.soft import route_soft as route_soft
from moejax.moe.router.sparse_mixer import route_sparse_mixer
from moejax.moe.router.token_choice import route_noisy, route_quantile, route_scored

ROUTERS: dict[str, Callable[[RouterInputs, MoeConfig], Routing]] = {
    "softmax_topk": route_scored,
    "switch": route_scored,
    "noisy_topk": route_noisy,
    "sigmoid_topk": route_scored,
    "cosine": route_scored,
    "sparse_mixer": route_sparse_mixer,
    "sinkhorn": route_sinkhorn,
    "quantile": route_quantile,
    "hierarchical": route_hierarchical,
    "hash": route_hash,
    "random": route_random,
    "balanced": route_balanced,
    "dense": route_scored,
}
"""The function of each router by which tokens choose experts.

Which settings go with a router is in `config.ROUTER_RULES`.
"""

UNRANKED = ("hash", "balanced", "expert_choice", "soft")
"""Routers in which no expert is next in rank for a token, so that none can be blocked."""


@takes_numpy
def route(
    inputs: RouterInputs, config: MoeConfig, active_top_k: Int[Array, ""] | None = None
) -> Routing:
    """Routes by the router that `moe.router` names; see the functions in `ROUTERS`.

    Args:
      inputs: what the router sees.
      config: of the layer.
      active_top_k: experts per token, at most `moe.top_k`, if fewer are wanted: each token's best.
    """
    routing = ROUTERS[config.router](inputs, config)
    if active_top_k is None:
        return routing
    is_active_1K = jnp.arange(config.top_k)[None] < active_top_k
    active_TK = jnp.where(is_active_1K, routing.experts_TK, config.num_choices)
    experts_TK = save_for_remat(active_TK)
    return dataclasses.replace(
        routing,
        experts_TK=experts_TK,
        weights_TK=combine_weights(routing.log_scores_TE, experts_TK, config),
        log_weights_TK=log_weights(routing.log_scores_TE, experts_TK),
    )
