"""Two-level routing: groups of experts first, then experts within each chosen group."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    group_logits_TG, logits_TE = inputs.group_logits_TG, inputs.logits_TE
    noisy_TG, noisy_TE = _add_noise(inputs, config)
    experts_TK, ranking_TE = _select_unblocked(inputs, noisy_TG, noisy_TE, config)
    experts_TK = save_for_remat(no_expert(experts_TK, inputs.mask_T, config.num_experts))
    log_weights_TK = _log_gates(noisy_TG, noisy_TE, experts_TK)
    is_expert_TK = experts_TK < config.num_experts
    weights_TK = jnp.where(is_expert_TK, jnp.exp(log_weights_TK) * config.route_scale, 0.0)
    log_probs_TE = _log_probs(group_logits_TG, logits_TE)
    group_size = config.num_experts // config.num_groups
    group_logits_TE = jnp.repeat(group_logits_TG, group_size, axis=1)
    return Routing(
        logits_TE=logits_TE + group_logits_TE,
        probs_TE=jnp.exp(log_probs_TE),
        experts_TK=experts_TK,
        weights_TK=weights_TK,
        ranking_TE=ranking_TE,
        log_scores_TE=log_probs_TE,
        log_weights_TK=log_weights_TK,
    )


def _add_noise(
    inputs: RouterInputs, config: MoeConfig
) -> tuple[Float[Array, "T G"], Float[Array, "T E"]]:
    """Returns the logits of groups and of experts, in training with noise."""
    noisy_TG, noisy_TE = inputs.group_logits_TG, inputs.logits_TE
    if not inputs.is_training:
        return noisy_TG, noisy_TE
    noise_TG = inputs.draw(Stream.GROUP_NOISE, jax.random.normal, config.num_groups)
    noisy_TG = noisy_TG + inputs.noise * inputs.group_noise_scale_TG * noise_TG
    noise_TE = inputs.draw(Stream.NOISE, jax.random.normal, config.num_experts)
    noisy_TE = noisy_TE + inputs.noise * inputs.noise_scale_TE * noise_TE
    return noisy_TG, noisy_TE


def _select_unblocked(
    inputs: RouterInputs,
    noisy_TG: Float[Array, "T G"],
    noisy_TE: Float[Array, "T E"],
    config: MoeConfig,
) -> tuple[Int[Array, "T K"], Float[Array, "T E"]]:
    """Selects among the experts that are not blocked; returns what they were ranked by too."""
    values_TG, values_TE = jax.lax.stop_gradient((noisy_TG, noisy_TE))
    is_blocked_E = inputs.is_blocked_E
    if is_blocked_E is None:
        return _select(values_TG, values_TE, config)
    values_TE = mask_blocked(values_TE, is_blocked_E)
    is_blocked_G = is_blocked_E.reshape(config.num_groups, -1).all(axis=1)
    values_TG = mask_blocked(values_TG, is_blocked_G)
    experts_TK, ranking_TE = _select(values_TG, values_TE, config)
    joint_TE = jax.lax.stop_gradient(_log_probs(noisy_TG, noisy_TE))
    experts_TK = _replace_missing(experts_TK, mask_blocked(joint_TE, is_blocked_E))
    return experts_TK, ranking_TE


def _select(
    values_TG: Float[Array, "T G"], values_TE: Float[Array, "T E"], config: MoeConfig
) -> tuple[Int[Array, "T K"], Float[Array, "T E"]]:
    """Selects groups and experts within them; returns what experts were ranked by too.

    An expert is E where a chosen group has too few that may be selected. Experts compete within
    their group: the rank is the distance to the last that is selected there, so that it is 0 for
    the last of every group. It is -inf in groups that are not chosen, but for those that tie with
    the last chosen one.
    """
    num_tokens, num_groups = values_TG.shape
    size = config.num_experts // num_groups
    per_group = config.top_k // config.top_k_groups
    group_values_TM, groups_TM = jax.lax.top_k(values_TG, config.top_k_groups)
    within_TGS = values_TE.reshape(num_tokens, num_groups, size)
    best_TGP, places_TGP = jax.lax.top_k(within_TGS, per_group)
    first_1G1 = jnp.arange(num_groups)[None, :, None] * size
    experts_TGP = places_TGP + first_1G1
    is_open_TGP = best_TGP > -jnp.inf
    is_open_group_TG1 = (values_TG > -jnp.inf)[:, :, None]
    may_select_TGP = is_open_TGP & is_open_group_TG1
    experts_TGP = jnp.where(may_select_TGP, experts_TGP, config.num_experts)
    experts_TMP = jnp.take_along_axis(experts_TGP, groups_TM[:, :, None], axis=1)

    selected_TGP = jnp.where(may_select_TGP, best_TGP, jnp.inf)
    last_TG1 = selected_TGP.min(axis=2, keepdims=True)
    last_group_T1 = group_values_TM[:, -1:]
    is_near_TG1 = (values_TG >= last_group_T1)[:, :, None]
    ranking_TGS = jnp.where(is_near_TG1, within_TGS - last_TG1, -jnp.inf)
    experts_TK = experts_TMP.reshape(num_tokens, config.top_k)
    return experts_TK, ranking_TGS.reshape(values_TE.shape)


def _replace_missing(
    experts_TK: Int[Array, "T K"], values_TE: Float[Array, "T E"]
) -> Int[Array, "T K"]:
    """Returns the experts, with the best of the others in place of E.

    E stays where no other has a value above -inf.
    """
    num_tokens, top_k = experts_TK.shape
    num_experts = values_TE.shape[1]
    token_T1 = jnp.arange(num_tokens)[:, None]
    # The experts that a token has rank above all others, in their order.
    rank_1K = jnp.arange(top_k, 0, -1, dtype=jnp.float32)[None]
    above_1K = 1.0 + rank_1K + values_TE.max(initial=0.0)
    first_TK = jnp.broadcast_to(above_1K, experts_TK.shape)
    values_TE = values_TE.at[token_T1, experts_TK].set(first_TK, mode="drop")
    values_TK, experts_TK = jax.lax.top_k(values_TE, top_k)
    return jnp.where(values_TK > -jnp.inf, experts_TK, num_experts)


def _log_gates(
    noisy_TG: Float[Array, "T G"], noisy_TE: Float[Array, "T E"], experts_TK: Int[Array, "T K"]
) -> Float[Array, "T K"]:
    """Returns the logarithms of the products of both gates.

    They are finite but have no meaning where there is no expert.
    """
    num_experts = noisy_TE.shape[1]
    size = num_experts // noisy_TG.shape[1]
    is_expert_TK = experts_TK < num_experts
    expert_TK = jnp.where(is_expert_TK, experts_TK, 0)
    group_TK = expert_TK // size
    is_same_group_TKK = group_TK[:, :, None] == group_TK[:, None, :]
    is_same_TKK = is_same_group_TKK & is_expert_TK[:, None, :]
    values_TK = jnp.take_along_axis(noisy_TE, expert_TK, axis=1)
    values_TKK = jnp.where(is_same_TKK, values_TK[:, None, :], NO_WEIGHT)
    log_sum_TK = jax.nn.logsumexp(values_TKK, axis=2)
    log_within_TK = values_TK - log_sum_TK
    # Each chosen expert of a group stands for an equal part of it, so that a group counts once.
    num_same_TK = jnp.maximum(is_same_TKK.sum(axis=2), 1)
    group_values_TK = jnp.take_along_axis(noisy_TG, group_TK, axis=1)
    parts_TK = group_values_TK - jnp.log(num_same_TK)
    parts_TK = jnp.where(is_expert_TK, parts_TK, NO_WEIGHT)
    log_sum_T1 = jax.nn.logsumexp(parts_TK, axis=1, keepdims=True)
    log_group_TK = group_values_TK - log_sum_T1
    return jnp.where(is_expert_TK, log_within_TK + log_group_TK, NO_WEIGHT)


def _log_probs(
    group_logits_TG: Float[Array, "T G"], logits_TE: Float[Array, "T E"]
) -> Float[Array, "T E"]:
    """Returns the logarithms of the softmax over groups times the one within the group."""
    log_groups_TG = jax.nn.log_softmax(group_logits_TG, axis=-1)
    log_groups_TG1 = log_groups_TG[:, :, None]
    logits_TGS = logits_TE.reshape(*group_logits_TG.shape, -1)
    log_within_TGS = jax.nn.log_softmax(logits_TGS, axis=-1)
    log_probs_TGS = log_groups_TG1 + log_within_TGS
    return log_probs_TGS.reshape(logits_TE.shape)
