"""Two-level routing: groups of experts first, then experts within each chosen group."""

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.moe.routers.routing import RouterInputs, Routing, no_expert
from moejax.moe.routers.scored import GROUP_NOISE, NOISE
from moejax.moe.routers.selection import eligible, named


def route_hierarchical(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Chooses K1 groups, then K / K1 experts in each; the weight is the product of both gates.

    Both levels are noisy top-K in training: a gate is a softmax over what was chosen at its level. Experts come group
    by group, the best group first. The router's distribution is the product of the softmax over groups and the one
    within the group; raw logits are the sums of both.

    Source: Shazeer et al. 2017, appendix B, equations 12 to 14.
    """
    groups, chosen_groups = config.num_groups, config.top_k_groups
    size, per_group = config.num_experts // groups, config.top_k // chosen_groups
    group_logits_TG, logits_TE = inputs.group_logits_TG, inputs.logits_TE
    noisy_TG, noisy_TE = group_logits_TG, logits_TE
    if inputs.is_training:
        noise_TG = inputs.draw(GROUP_NOISE, jax.random.normal, groups)
        noisy_TG = noisy_TG + inputs.noise * inputs.group_noise_scale_TG * noise_TG
        noise_TE = inputs.draw(NOISE, jax.random.normal, config.num_experts)
        noisy_TE = noisy_TE + inputs.noise * inputs.noise_scale_TE * noise_TE

    _, groups_TM = jax.lax.top_k(jax.lax.stop_gradient(noisy_TG), chosen_groups)
    ranking_TE = eligible(noisy_TE, inputs.is_blocked_E)  # groups are chosen as ever
    within_TGS = jax.lax.stop_gradient(ranking_TE).reshape(-1, groups, size)
    _, places_TGP = jax.lax.top_k(within_TGS, per_group)
    places_TMP = jnp.take_along_axis(places_TGP, groups_TM[:, :, None], axis=1)
    experts_TK = named((groups_TM[:, :, None] * size + places_TMP).reshape(-1, config.top_k))

    group_gates_TM = jax.nn.softmax(jnp.take_along_axis(noisy_TG, experts_TK[:, ::per_group] // size, axis=1), axis=-1)
    gates_TK = jnp.take_along_axis(noisy_TE, experts_TK, axis=1)
    is_blocked_TK = None if inputs.is_blocked_E is None else inputs.is_blocked_E[experts_TK]
    if is_blocked_TK is not None:  # a group with too few others; finite, so that one without any gives no NaN
        gates_TK = jnp.where(is_blocked_TK, -1e30, gates_TK)
    gates_TMP = jax.nn.softmax(gates_TK.reshape(-1, chosen_groups, per_group), axis=-1)
    weights_TK = (group_gates_TM[:, :, None] * gates_TMP).reshape(-1, config.top_k) * config.route_scale

    if is_blocked_TK is not None:
        weights_TK = jnp.where(is_blocked_TK, 0.0, weights_TK)
        experts_TK = jnp.where(is_blocked_TK, config.num_experts, experts_TK)

    log_groups_TG1 = jax.nn.log_softmax(group_logits_TG, axis=-1)[:, :, None]
    log_within_TGS = jax.nn.log_softmax(logits_TE.reshape(-1, groups, size), axis=-1)
    log_probs_TE = (log_groups_TG1 + log_within_TGS).reshape(logits_TE.shape)
    return Routing(
        logits_TE=logits_TE + jnp.repeat(group_logits_TG, size, axis=1),
        probs_TE=jnp.exp(log_probs_TE),
        experts_TK=no_expert(experts_TK, inputs.mask_T, config.num_experts),
        weights_TK=jnp.where(inputs.mask_T[:, None], weights_TK, 0.0),
        ranking_TE=jax.lax.stop_gradient(log_probs_TE),
        log_scores_TE=log_probs_TE,
    )
