"""From logits to scores, probabilities and combine weights.

Everything is computed from logarithms of scores. A sigmoid far below 0 underflows, and a normaliser
with a small constant then hides the collapse of all scores; the softmax of log scores is the same
ratio without either.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, Routing

NO_WEIGHT = -1e30
"""The logarithm of the weight where there is no expert.

It is finite, so that a token without any expert gives no NaN.
"""


def log_scores(logits_TE: Float[Array, "T E"], score: str) -> Float[Array, "T E"]:
    """Returns the logarithm of each expert's score.

    Args:
      logits_TE: float32.
      score: "softmax" over all experts, also for "softmax_after" (selected first, normalised
        afterwards: the same up to a factor that the normalisation removes); "sigmoid"
        (DeepSeek-V3); "sqrt_softplus" (DeepSeek-V4); "uniform".

    Raises:
      ValueError: another score, such as "auto", which is not resolved.
    """
    if score in ("softmax", "softmax_after"):
        return jax.nn.log_softmax(logits_TE, axis=-1)
    if score == "sigmoid":
        return jax.nn.log_sigmoid(logits_TE)
    if score == "sqrt_softplus":
        # log(softplus(l)) is l up to rounding below -20, where softplus itself soon underflows.
        clipped_TE = jnp.maximum(logits_TE, -20.0)
        is_low_TE = logits_TE < -20.0
        log_softplus_TE = jnp.log(jax.nn.softplus(clipped_TE))
        return 0.5 * jnp.where(is_low_TE, logits_TE, log_softplus_TE)
    if score == "uniform":
        return jnp.zeros_like(logits_TE)
    raise ValueError(
        f"moe.score={score} is no score function; `config.resolve` derives it from moe.score=auto"
    )


def probabilities(log_scores_TE: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """Scores divided by their sum over all experts: what the balance loss averages."""
    return jax.nn.softmax(log_scores_TE, axis=-1)


def log_weights(
    log_scores_TE: Float[Array, "T E"], experts_TK: Int[Array, "T K"]
) -> Float[Array, "T K"]:
    """Logarithms of the selected experts' scores; `NO_WEIGHT` where an id is E."""
    is_expert_TK = experts_TK < log_scores_TE.shape[-1]
    expert_TK = jnp.where(is_expert_TK, experts_TK, 0)
    taken_TK = jnp.take_along_axis(log_scores_TE, expert_TK, axis=-1)
    return jnp.where(is_expert_TK, taken_TK, NO_WEIGHT)


def combine_weights(
    log_scores_TE: Float[Array, "T E"], experts_TK: Int[Array, "T K"], config: MoeConfig
) -> Float[Array, "T K"]:
    """Returns the combine weights of the selected experts.

    They are the scores, normalised or not, times `route_scale`. The selection bias is not in them:
    it affects the choice only. A sum below `renormalize_floor` is replaced by it (ERNIE 4.5).

    Args:
      log_scores_TE: from `log_scores`.
      experts_TK: selected experts; where an id is E the weight is 0, and the others share
        what there is.
      config: for `score`, `renormalize`, `weight_norm`, `renormalize_floor` and `route_scale`.
    """
    taken_TK = log_weights(log_scores_TE, experts_TK)
    if config.score == "uniform":
        weights_TK = jax.nn.softmax(taken_TK, axis=-1)
    elif config.renormalize:
        weights_TK = _over_norm(taken_TK, config.weight_norm, config.renormalize_floor)
    else:
        weights_TK = jnp.exp(taken_TK)
    is_expert_TK = experts_TK < log_scores_TE.shape[-1]
    return jnp.where(is_expert_TK, weights_TK * config.route_scale, 0.0)


def _over_norm(log_weights_TK: Float[Array, "T K"], p: float, floor: float) -> Float[Array, "T K"]:
    """Returns weights over the p-th root of the sum of their p-th powers, at least `floor`.

    Args:
      log_weights_TK: their logarithms.
      p: 1 divides by their sum.
      floor: 0 for none.
    """
    if p == 1 and not floor:
        return jax.nn.softmax(log_weights_TK, axis=-1)
    log_norm_T1 = jax.nn.logsumexp(p * log_weights_TK, axis=-1, keepdims=True) / p
    weights_TK = jnp.exp(log_weights_TK - log_norm_T1)
    if floor:
        weights_TK *= jnp.minimum(jnp.exp(log_norm_T1) / floor, 1.0)
    return weights_TK


def spread_over_survivors(
    weights_TK: Float[Array, "T K"],
    log_weights_TK: Float[Array, "T K"],
    is_kept_TK: Bool[Array, "T K"],
) -> Float[Array, "T K"]:
    """Shares the weights of all choices of a token among those that are kept.

    Their shares are as if only they had been chosen: the softmax of their logarithms. A quotient of
    weights would be 0/0 where the kept ones underflow compared with the others, and its gradient
    would overflow long before.

    Args:
      weights_TK: combine weights.
      log_weights_TK: their logarithms, see `Routing`.
      is_kept_TK: which are left; the weights of the others become 0.
    """
    total_T1 = weights_TK.sum(axis=1, keepdims=True)
    kept_log_weights_TK = jnp.where(is_kept_TK, log_weights_TK, NO_WEIGHT)
    shares_TK = jax.nn.softmax(kept_log_weights_TK, axis=-1)
    return jnp.where(is_kept_TK, total_T1 * shares_TK, 0.0)


def routing_by_scores(
    inputs: RouterInputs,
    log_scores_TE: Float[Array, "T E"],
    ranking_TE: Float[Array, "T E"],
    experts_TK: Int[Array, "T K"],
    config: MoeConfig,
) -> Routing:
    """Returns the routing to selected experts whose weights and probabilities are the scores.

    Args:
      inputs: for the raw logits.
      log_scores_TE: from `log_scores`.
      ranking_TE: what the selection was made by.
      experts_TK: the selection.
      config: for the weights, see `combine_weights`.
    """
    return Routing(
        logits_TE=inputs.logits_TE,
        probs_TE=probabilities(log_scores_TE),
        experts_TK=experts_TK,
        weights_TK=combine_weights(log_scores_TE, experts_TK, config),
        ranking_TE=jax.lax.stop_gradient(ranking_TE),
        log_scores_TE=log_scores_TE,
        log_weights_TK=log_weights(log_scores_TE, experts_TK),
    )
