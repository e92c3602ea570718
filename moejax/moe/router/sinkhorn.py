"""Selection from a balanced transport plan."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, Routing
from moejax.moe.router.scores import log_scores, routing_by_scores
from moejax.moe.router.selection import mask_blocked, select

NO_MASS = -1e30  # finite, so that a sequence of padding gives no NaN


def route_sinkhorn(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Selects the top K of a balanced plan in training, and of the logits in evaluation.

    Weights are the scores of the logits. The plan balances the tokens of each sequence among
    themselves, so that it depends neither on the mesh nor on accumulation nor on the other
    sequences; the published ones balance the tokens of a device. It lets a token's routing depend
    on later ones, hence `moe.allow_noncausal`. No gradient flows through it.

    Source: Clark et al. 2022 (S-BASE, section 3.1 and appendix B), after Lewis et al. 2021 (BASE).
    """
    log_scores_TE = log_scores(inputs.logits_TE, config.score)
    ranking_TE = jax.lax.stop_gradient(inputs.logits_TE)
    if inputs.is_training:
        num_experts = ranking_TE.shape[-1]
        logits_BLE = ranking_TE.reshape(-1, inputs.length, num_experts)
        mask_BL = inputs.mask_T.reshape(-1, inputs.length)

        def plan_of_sequence(logits_LE, mask_L):
            return log_plan(logits_LE, mask_L, config.sinkhorn_iterations)

        plans_BLE = jax.vmap(plan_of_sequence)(logits_BLE, mask_BL)
        ranking_TE = plans_BLE.reshape(-1, num_experts)
    ranking_TE = mask_blocked(ranking_TE, inputs.is_blocked_E)
    experts_TK = select(ranking_TE, inputs.mask_T, config.top_k, inputs.is_blocked_E)
    return routing_by_scores(inputs, log_scores_TE, ranking_TE, experts_TK, config)


def log_plan(
    logits_LE: Float[Array, "L E"], mask_L: Bool[Array, "L"], iterations: int
) -> Float[Array, "L E"]:
    """Returns the logarithm of a balanced transport plan.

    Its rows sum to 1, and its columns approach an equal share of the real tokens. Each iteration
    scales columns, to 1 instead of their share since a common factor cancels, then rows.
    """
    is_token_L1 = mask_L[:, None]

    def iterate(_, log_LE):
        log_LE = log_LE - jax.nn.logsumexp(log_LE, axis=0, keepdims=True)
        log_LE = log_LE - jax.nn.logsumexp(log_LE, axis=1, keepdims=True)
        return jnp.where(is_token_L1, log_LE, NO_MASS)

    start_LE = jnp.where(is_token_L1, logits_LE, NO_MASS)
    return jax.lax.fori_loop(0, iterations, iterate, start_LE)
