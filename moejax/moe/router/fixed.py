"""Routers that learn nothing about where to send a token: baselines and benchmarks."""

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, Routing, Stream, no_expert
from moejax.moe.router.scores import log_scores, routing_by_scores
from moejax.moe.router.selection import mask_blocked, save_for_remat, select


def route_hash(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Sends a token to the experts that a fixed table holds for its id.

    With score "uniform" each weight is 1/K (Roller et al. 2021, Hash Layers); with another one,
    weights are the scores of learned logits (DeepSeek-V4).
    """
    experts_TK = inputs.table_VK[inputs.tokens_T][:, : config.top_k]
    experts_TK = no_expert(experts_TK, inputs.mask_T, config.num_choices)
    return _fixed(save_for_remat(experts_TK), inputs, config)


def route_random(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Sends each token to K experts drawn uniformly without replacement.

    In evaluation the draw is a fixed function of token id and position, so that it can be repeated
    and is the same for a sequence in any batch.
    """
    if inputs.is_training:
        values_TE = inputs.draw(Stream.RANDOM, jax.random.uniform, config.num_choices)
    else:
        base = jax.random.key(0)

        def draw_one(token, position):
            token_key = jax.random.fold_in(base, token)
            key = jax.random.fold_in(token_key, position)
            return jax.random.uniform(key, (config.num_choices,))

        values_TE = jax.vmap(draw_one)(inputs.tokens_T, inputs.positions_T)
    values_TE = mask_blocked(values_TE, inputs.is_blocked_E)
    experts_TK = select(values_TE, inputs.mask_T, config.top_k, inputs.is_blocked_E)
    return _fixed(experts_TK, inputs, config)


def route_balanced(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Deals experts out in turn, for benchmarks.

    Position p takes the experts p K, p K + 1, ..., modulo E.
    """
    first_T1 = inputs.positions_T[:, None] * config.top_k
    place_1K = jnp.arange(config.top_k)[None]
    experts_TK = (first_T1 + place_1K) % config.num_choices
    experts_TK = no_expert(experts_TK, inputs.mask_T, config.num_choices)
    return _fixed(save_for_remat(experts_TK), inputs, config)


def _fixed(experts_TK: jax.Array, inputs: RouterInputs, config: MoeConfig) -> Routing:
    log_scores_TE = log_scores(inputs.logits_TE, config.score)
    return routing_by_scores(inputs, log_scores_TE, log_scores_TE, experts_TK, config)
