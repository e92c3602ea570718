"""Routers: pure functions from logits to a `Routing`, one file per family, one table of names."""

import jax

from moejax.config import MoeConfig
from moejax.moe.routers.routing import Routing
from moejax.moe.routers.softmax_topk import route_softmax_top_k, route_switch

ROUTERS = {
    "softmax_topk": route_softmax_top_k,
    "switch": route_switch,
}


def route(logits_TE: jax.Array, mask_T: jax.Array, config: MoeConfig) -> Routing:
    """Routes by the router that `moe.router` names; see the functions in `ROUTERS`."""
    return ROUTERS[config.router](logits_TE, mask_T, top_k=config.top_k, renormalize=config.renormalize)
