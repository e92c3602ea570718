"""SparseMixer: experts close to the best compete for each of a token's choices."""

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.moe.routers.routing import RouterInputs, Routing, no_expert
from moejax.moe.routers.scores import log_scores, probabilities
from moejax.moe.routers.selection import named

GUMBEL, KEEP = 3, 4  # streams of random numbers; a choice k takes those plus 2 k


def route_sparse_mixer(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Chooses one expert after the other among those whose logits are relatively close to the best remaining one.

    For each choice: entries whose distance to the best, relative to the larger of their magnitude and the best, exceeds
    2 `mixer_threshold` are out; the weight is the softmax over the rest at the chosen one. In evaluation the best is
    chosen. In training one of the rest is sampled by its probability; where that is not the best, its weight is
    multiplied by 1/3 in three of four cases, while the gradient is that of the plain weight (Heun's rule for the
    gradient of sampling). The weights of a token are close to 1 each and are not normalised.

    Source: Liu et al. 2023 (SparseMixer), Liu et al. 2024 (GRIN, section 2); the relative threshold as in Phi-3.5-MoE.
    """
    logits_TE = inputs.logits_TE
    num_experts = logits_TE.shape[-1]
    is_open_TE = jnp.ones(logits_TE.shape, bool)
    if inputs.is_blocked_E is not None:
        is_open_TE &= ~inputs.is_blocked_E[None]
    experts, weights = [], []
    for k in range(config.top_k):
        is_near_TE = _near_best(jax.lax.stop_gradient(logits_TE), is_open_TE, config.mixer_threshold)
        near_TE = jnp.where(is_near_TE, logits_TE, -jnp.inf)
        best_T1 = jnp.argmax(near_TE, axis=-1, keepdims=True)
        chosen_T1 = best_T1
        if inputs.is_training:
            gumbel_TE = inputs.draw(GUMBEL + 2 * k, jax.random.gumbel, num_experts)
            chosen_T1 = jnp.argmax(near_TE + gumbel_TE, axis=-1, keepdims=True)
        chosen_T1 = named(chosen_T1.astype(jnp.int32))
        weight_T1 = jnp.take_along_axis(jax.nn.softmax(near_TE, axis=-1), chosen_T1, axis=-1)
        if inputs.is_training:
            is_whole_T1 = (chosen_T1 == best_T1) | (inputs.draw(KEEP + 2 * k, jax.random.uniform, 1) > 0.75)
            weight_T1 -= jax.lax.stop_gradient(jnp.where(is_whole_T1, 0.0, 2 / 3) * weight_T1)
        if inputs.is_blocked_E is not None:  # perhaps no expert is left
            has_open_T1 = is_open_TE.any(axis=-1, keepdims=True)
            chosen_T1 = jnp.where(has_open_T1, chosen_T1, num_experts)
            weight_T1 = jnp.where(has_open_T1, weight_T1, 0.0)
        experts.append(chosen_T1)
        weights.append(weight_T1)
        is_open_TE &= jnp.arange(num_experts)[None] != chosen_T1
    weights_TK = jnp.where(inputs.mask_T[:, None], jnp.concatenate(weights, axis=1) * config.route_scale, 0.0)
    log_scores_TE = log_scores(logits_TE, "softmax")
    return Routing(
        logits_TE=logits_TE,
        probs_TE=probabilities(log_scores_TE),
        experts_TK=no_expert(jnp.concatenate(experts, axis=1), inputs.mask_T, num_experts),
        weights_TK=weights_TK,
        ranking_TE=jax.lax.stop_gradient(logits_TE),
        log_scores_TE=log_scores_TE,
    )


def _near_best(logits_TE, is_open_TE, threshold):
    best_T1 = jnp.where(is_open_TE, logits_TE, -jnp.inf).max(axis=-1, keepdims=True)
    magnitude_TE = jnp.maximum(jnp.abs(logits_TE), best_T1)
    # Written so that the best itself stays where everything is 0 and the quotient is not a number.
    return is_open_TE & ~((best_T1 - logits_TE) / magnitude_TE > 2 * threshold)
