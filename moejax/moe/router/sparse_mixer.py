"""SparseMixer: experts close to the best compete for each of a token's choices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, Routing, Stream, no_expert
from moejax.moe.router.scores import NO_WEIGHT, log_scores, probabilities
from moejax.moe.router.selection import mask_blocked, save_for_remat


def route_sparse_mixer(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Chooses one expert after the other among those whose logits are close to the best one left.

    For each choice: entries whose distance to the best, relative to the larger of their magnitude
    and the best, exceeds 2 `mixer_threshold` are out; the weight is the softmax over the rest at
    the chosen one. In evaluation the best is chosen. In training one of the rest is sampled by its
    probability; where that is not the best, its weight is multiplied by 1/3 in three of four cases,
    while the gradient is that of the plain weight (Heun's rule for the gradient of sampling). The
    weights of a token are close to 1 each and are not normalised.

    Source: Liu et al. 2023 (SparseMixer), Liu et al. 2024 (GRIN, section 2); the relative threshold
    as in Phi-3.5-MoE.
    """
    logits_TE = inputs.logits_TE
    num_experts = logits_TE.shape[-1]
    is_open_TE = jnp.ones(logits_TE.shape, bool)
    if inputs.is_blocked_E is not None:
        is_open_TE &= ~inputs.is_blocked_E[None]
    ranking_TE = mask_blocked(logits_TE, inputs.is_blocked_E)
    choices = []
    for k in range(config.top_k):
        choice = _choose(inputs, is_open_TE, ranking_TE, k, config.mixer_threshold)
        choices.append(choice)
        ranking_TE = choice.ranking_TE
        is_open_TE &= jnp.arange(num_experts)[None] != choice.expert_T1
    chosen_TK = jnp.concatenate([choice.expert_T1 for choice in choices], axis=1)
    experts_TK = no_expert(chosen_TK, inputs.mask_T, num_experts)
    weights_TK, log_weights_TK = _scaled(
        jnp.concatenate([choice.log_weight_T1 for choice in choices], axis=1),
        jnp.concatenate([choice.factor_T1 for choice in choices], axis=1),
    )
    is_expert_TK = experts_TK < num_experts
    log_scores_TE = log_scores(logits_TE, "softmax")
    return Routing(
        logits_TE=logits_TE,
        probs_TE=probabilities(log_scores_TE),
        experts_TK=experts_TK,
        weights_TK=jnp.where(is_expert_TK, weights_TK * config.route_scale, 0.0),
        ranking_TE=jax.lax.stop_gradient(ranking_TE),
        log_scores_TE=log_scores_TE,
        log_weights_TK=jnp.where(is_expert_TK, log_weights_TK, NO_WEIGHT),
    )


class _Choice(NamedTuple):
    """One choice of each token.

    Attributes:
      expert_T1: the chosen expert; E where none is left.
      log_weight_T1: logarithm of its share among those that are near the best.
      factor_T1: on its weight, 1 or 1/3.
      ranking_TE: what it was chosen by.
    """

    expert_T1: jax.Array
    log_weight_T1: jax.Array
    factor_T1: jax.Array
    ranking_TE: jax.Array


def _choose(inputs: RouterInputs, is_open_TE, ranking_TE, k: int, threshold: float) -> _Choice:
    """Chooses among the open experts that are near the best of them.

    Args:
      inputs: logits, and keys in training.
      is_open_TE: experts that were neither chosen before nor blocked.
      ranking_TE: what experts rank by so far; in training a choice makes its own.
      k: which choice of a token it is.
      threshold: `moe.mixer_threshold`.
    """
    logits_TE = inputs.logits_TE
    num_experts = logits_TE.shape[-1]
    constant_TE = jax.lax.stop_gradient(logits_TE)
    is_near_TE = _near_best(constant_TE, is_open_TE, threshold)
    near_TE = jnp.where(is_near_TE, logits_TE, NO_WEIGHT)
    best_T1 = jnp.argmax(near_TE, axis=-1, keepdims=True)
    chosen_T1, factor_T1 = best_T1, jnp.ones(best_T1.shape)
    if inputs.is_training:
        gumbel_TE = inputs.draw(Stream.GUMBEL, jax.random.gumbel, num_experts, choice=k)
        values_TE = near_TE + gumbel_TE
        chosen_T1 = jnp.argmax(values_TE, axis=-1, keepdims=True)
        taken_or_far_TE = jnp.where(is_open_TE, -jnp.inf, jnp.inf)
        ranking_TE = jnp.where(is_near_TE, values_TE, taken_or_far_TE)
        ranking_TE = mask_blocked(ranking_TE, inputs.is_blocked_E)
    chosen_T1 = save_for_remat(chosen_T1.astype(jnp.int32))
    if inputs.is_training:
        uniform_T1 = inputs.draw(Stream.KEEP, jax.random.uniform, 1, choice=k)
        keeps_weight_T1 = uniform_T1 > 0.75
        factor_T1 = jnp.where((chosen_T1 == best_T1) | keeps_weight_T1, 1.0, 1 / 3)
    log_weights_TE = jax.nn.log_softmax(near_TE, axis=-1)
    log_weight_T1 = jnp.take_along_axis(log_weights_TE, chosen_T1, axis=-1)
    if inputs.is_blocked_E is not None:
        # Perhaps no expert is left.
        has_open_T1 = is_open_TE.any(axis=-1, keepdims=True)
        chosen_T1 = jnp.where(has_open_T1, chosen_T1, num_experts)
    return _Choice(chosen_T1, log_weight_T1, factor_T1, ranking_TE)


def _scaled(log_weights_TK, factors_TK):
    """Returns weights times factors, and their logarithms.

    The gradients are those of the weights themselves.
    """
    weights_TK = jnp.exp(log_weights_TK)
    weights_TK -= jax.lax.stop_gradient((1 - factors_TK) * weights_TK)
    # The gradient of the logarithm is over the scaled weight.
    raised_TK = log_weights_TK / factors_TK
    values_TK = log_weights_TK + jnp.log(factors_TK)
    return weights_TK, raised_TK + jax.lax.stop_gradient(values_TK - raised_TK)


def _near_best(logits_TE, is_open_TE, threshold):
    """Whether each expert is open and its logit relatively close to the best open one."""
    open_TE = jnp.where(is_open_TE, logits_TE, -jnp.inf)
    best_T1 = open_TE.max(axis=-1, keepdims=True)
    magnitude_TE = jnp.maximum(jnp.abs(logits_TE), best_T1)
    distance_TE = (best_T1 - logits_TE) / magnitude_TE
    # Written so that the best itself stays where everything is 0 and the quotient is not a number.
    is_far_TE = distance_TE > 2 * threshold
    return is_open_TE & ~is_far_TE
