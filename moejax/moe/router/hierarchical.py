"""Two-level routing: groups of experts first, then experts within each chosen group."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, Routing, Stream, no_expert
from moejax.moe.router.scores import NO_WEIGHT
from moejax.moe.router.selection import mask_blocked, save_for_remat


def route_hierarchical(inputs: RouterInputs, config: MoeConfig) -> Routing:
    """Chooses K1 groups, then K / K1 experts in each; the weight is the product of both gates.

    Both levels are noisy top-K in training: a gate is a softmax over what was chosen at its level.
    Experts come group by group, the best group first. The router's distribution is the product of
    the softmax over groups and the one within the group; raw logits are the sums of both.

    Source: Shazeer et al. 2017, appendix B, equations 12 to 14.
    """
    groups = config.num_groups
    group_logits_TG, logits_TE = inputs.group_logits_TG, inputs.logits_TE
    noisy_TG, noisy_TE = group_logits_TG, logits_TE
    if inputs.is_training:
        noise_TG = inputs.draw(Stream.GROUP_NOISE, jax.random.normal, groups)
        noisy_TG = noisy_TG + inputs.noise * inputs.group_noise_scale_TG * noise_TG
        noise_TE = inputs.draw(Stream.NOISE, jax.random.normal, config.num_experts)
        noisy_TE = noisy_TE + inputs.noise * inputs.noise_scale_TE * noise_TE

    values_TG, values_TE = jax.lax.stop_gradient((noisy_TG, noisy_TE))
    if inputs.is_blocked_E is not None:
        values_TE = mask_blocked(values_TE, inputs.is_blocked_E)
        values_TG = mask_blocked(values_TG, inputs.is_blocked_E.reshape(groups, -1).all(axis=1))
    experts_TK, ranking_TE = _select(values_TG, values_TE, config)
    if inputs.is_blocked_E is not None:
        joint_TE = jax.lax.stop_gradient(_log_probs(noisy_TG, noisy_TE))
        experts_TK = _fill_up(experts_TK, mask_blocked(joint_TE, inputs.is_blocked_E))
    experts_TK = save_for_remat(no_expert(experts_TK, inputs.mask_T, config.num_experts))
    log_weights_TK = _log_gates(noisy_TG, noisy_TE, experts_TK)
    weights_TK = jnp.where(
        experts_TK < config.num_experts, jnp.exp(log_weights_TK) * config.route_scale, 0.0
    )
    log_probs_TE = _log_probs(group_logits_TG, logits_TE)
    return Routing(
        logits_TE=logits_TE + jnp.repeat(group_logits_TG, config.num_experts // groups, axis=1),
        probs_TE=jnp.exp(log_probs_TE),
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        ranking_TE=ranking_TE,
        log_scores_TE=log_probs_TE,
        log_weights_TK=log_weights_TK,
    )


def _select(
    values_TG: Float[Array, "T G"], values_TE: Float[Array, "T E"], config: MoeConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T E"]]:
    """The experts, E where a chosen group has too few that may be selected, and what they were ranked by.

    Experts compete within their group: the rank is the distance to the last that is selected there,
    so that it is 0 for the last of every group. It is -inf in groups that are not chosen, but for
    those that tie with the last chosen one.
    """
    num_tokens, groups = values_TG.shape
    size, per_group = config.num_experts // groups, config.top_k // config.top_k_groups
    group_values_TM, groups_TM = jax.lax.top_k(values_TG, config.top_k_groups)
    within_TGS = values_TE.reshape(num_tokens, groups, size)
    best_TGP, places_TGP = jax.lax.top_k(within_TGS, per_group)
    experts_TGP = places_TGP + jnp.arange(groups)[None, :, None] * size
    can_TGP = (best_TGP > -jnp.inf) & (values_TG > -jnp.inf)[:, :, None]
    experts_TGP = jnp.where(can_TGP, experts_TGP, config.num_experts)
    experts_TMP = jnp.take_along_axis(experts_TGP, groups_TM[:, :, None], axis=1)

    last_TG1 = jnp.where(can_TGP, best_TGP, jnp.inf).min(axis=2, keepdims=True)
    is_near_TG1 = (values_TG >= group_values_TM[:, -1:])[:, :, None]
    ranking_TGS = jnp.where(is_near_TG1, within_TGS - last_TG1, -jnp.inf)
    return experts_TMP.reshape(num_tokens, config.top_k), ranking_TGS.reshape(values_TE.shape)


def _fill_up(experts_TK: Int[Array, "T K"], values_TE: Float[Array, "T E"]) -> Int[Array, "T K"]:
    """The same, with the best of the other experts in place of E, as far as there are any with a value above -inf."""
    top_k, num_experts = experts_TK.shape[1], values_TE.shape[1]
    token_T1 = jnp.arange(experts_TK.shape[0])[:, None]
    above_1K = 1.0 + jnp.arange(top_k, 0, -1, dtype=jnp.float32)[None] + values_TE.max(initial=0.0)
    first_TK = jnp.broadcast_to(above_1K, experts_TK.shape)
    values_TE = values_TE.at[token_T1, experts_TK].set(first_TK, mode="drop")
    values_TK, experts_TK = jax.lax.top_k(values_TE, top_k)
    return jnp.where(values_TK > -jnp.inf, experts_TK, num_experts)


def _log_gates(
    noisy_TG: Float[Array, "T G"], noisy_TE: Float[Array, "T E"], experts_TK: Int[Array, "T K"]
) -> Float[Array, "T K"]:
    """Logarithms of the products of both gates; of no meaning, but finite, where there is no expert."""
    num_experts, size = noisy_TE.shape[1], noisy_TE.shape[1] // noisy_TG.shape[1]
    is_expert_TK = experts_TK < num_experts
    expert_TK = jnp.where(is_expert_TK, experts_TK, 0)
    group_TK = expert_TK // size
    is_same_TKK = _pairs(group_TK) & is_expert_TK[:, None, :]
    values_TK = jnp.take_along_axis(noisy_TE, expert_TK, axis=1)
    values_TKK = jnp.where(is_same_TKK, values_TK[:, None, :], NO_WEIGHT)
    log_within_TK = values_TK - jax.nn.logsumexp(values_TKK, axis=2)
    # Each chosen expert of a group stands for an equal part of it, so that a group counts once.
    num_same_TK = jnp.maximum(is_same_TKK.sum(axis=2), 1)
    group_values_TK = jnp.take_along_axis(noisy_TG, group_TK, axis=1)
    parts_TK = jnp.where(is_expert_TK, group_values_TK - jnp.log(num_same_TK), NO_WEIGHT)
    log_group_TK = group_values_TK - jax.nn.logsumexp(parts_TK, axis=1, keepdims=True)
    return jnp.where(is_expert_TK, log_within_TK + log_group_TK, NO_WEIGHT)


def _pairs(group_TK: Int[Array, "T K"]) -> Bool[Array, "T K K"]:
    """Which choices of a token are of the same group."""
    return group_TK[:, :, None] == group_TK[:, None, :]


def _log_probs(
    group_logits_TG: Float[Array, "T G"], logits_TE: Float[Array, "T E"]
) -> Float[Array, "T E"]:
    """Logarithms of the softmax over groups times the one within the group."""
    log_groups_TG1 = jax.nn.log_softmax(group_logits_TG, axis=-1)[:, :, None]
    log_within_TGS = jax.nn.log_softmax(logits_TE.reshape(*group_logits_TG.shape, -1), axis=-1)
    return (log_groups_TG1 + log_within_TGS).reshape(logits_TE.shape)
