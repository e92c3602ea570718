"""Routers: pure functions from logits to a `Routing`, one file per family, one table of names."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.config import MoeConfig
from moejax.moe.routers.experts_choose import route_expert_choice as route_expert_choice
from moejax.moe.routers.experts_choose import route_soft as route_soft
from moejax.moe.routers.fixed import route_balanced, route_hash, route_random
from moejax.moe.routers.hierarchical import route_hierarchical
from moejax.moe.routers.routing import RouterInputs as RouterInputs
from moejax.moe.routers.routing import Routing as Routing
from moejax.moe.routers.scored import route_noisy, route_quantile, route_scored
from moejax.moe.routers.scores import weigh
from moejax.moe.routers.selection import named
from moejax.moe.routers.sinkhorn import route_sinkhorn
from moejax.moe.routers.sparse_mixer import route_sparse_mixer

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
"""Routers by which tokens choose; what goes together with each is in `config.ROUTER_RULES`."""


def route(inputs: RouterInputs, config: MoeConfig, limit: Int[Array, ""] | None = None) -> Routing:
    """Routes by the router that `moe.router` names; see the functions in `ROUTERS`.

    Args:
      inputs: what the router sees.
      config: of the layer.
      limit: experts per token, at most `moe.top_k`, if fewer are wanted: each token's best.
    """
    routing = ROUTERS[config.router](inputs, config)
    if limit is None:
        return routing
    is_within_1K = jnp.arange(config.top_k)[None] < limit
    experts_TK = named(jnp.where(is_within_1K, routing.experts_TK, config.num_choices))
    weights_TK = weigh(routing.log_scores_TE, experts_TK, config)
    return dataclasses.replace(routing, experts_TK=experts_TK, weights_TK=weights_TK)
