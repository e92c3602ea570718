"""Routers: pure functions from logits to a `Routing`, one file per family; their table is `config.ROUTER_RULES`."""

import dataclasses
import importlib
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.config import ROUTER_RULES, MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.routers.experts_choose import route_expert_choice as route_expert_choice
from moejax.moe.routers.experts_choose import route_soft as route_soft
from moejax.moe.routers.routing import RouterInputs as RouterInputs
from moejax.moe.routers.routing import Routing as Routing
from moejax.moe.routers.scores import log_weights, weigh
from moejax.moe.routers.selection import named


def _function(where: str) -> Callable:
    file, _, name = where.partition(".")
    return getattr(importlib.import_module(f"moejax.moe.routers.{file}"), name)


ROUTERS: dict[str, Callable[[RouterInputs, MoeConfig], Routing]] = {
    name: _function(rules.function) for name, rules in ROUTER_RULES.items() if rules.takes_capacity
}
"""The function of each router by which tokens choose."""

UNRANKED = ("hash", "balanced", "expert_choice", "soft")
"""Routers in which no expert is next in rank for a token, so that none can be blocked."""


@takes_numpy
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
    return dataclasses.replace(
        routing,
        experts_TK=experts_TK,
        weights_TK=weigh(routing.log_scores_TE, experts_TK, config),
        log_weights_TK=log_weights(routing.log_scores_TE, experts_TK),
    )
