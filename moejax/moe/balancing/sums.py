"""Counts and estimates for `stats.collect`: the load of each expert, and the balance of scopes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.router.routing import Routing

LEAST_NOISE = 1e-6
"""Smaller standard deviations count as this one."""


@takes_numpy
def count_assignments(
    experts_TK: Int[Array, "T K"],
    num_experts: int,
    num_parts: int = 1,
) -> Int[Array, "E"]:
    """Counts how often each expert was chosen; ids outside [0, E) are not counted.

    Args:
      experts_TK: chosen experts.
      num_experts: E.
      num_parts: into how many equal parts a mesh splits the tokens: each device sorts its own, or
        all would sort all.
    """
    # Comparing sorted ids with each boundary needs no [T, K, E] array and no scatter.
    experts_PR = experts_TK.reshape(num_parts, -1)  # a row for each device
    sorted_PR = jnp.sort(experts_PR, axis=1)

    def find_ends(sorted_R):
        expert_E = jnp.arange(num_experts)
        return jnp.searchsorted(sorted_R, expert_E, side="right")

    ends_PE = jax.vmap(find_ends)(sorted_PR)
    ends_PE = ends_PE.astype(jnp.int32)
    counts_PE = jnp.diff(ends_PE, prepend=0, axis=1)
    return counts_PE.sum(axis=0)


@takes_numpy
def sum_by_expert(
    experts_TK: Int[Array, "T K"],
    weights_TK: Float[Array, "T K"],
    num_experts: int,
) -> Float[Array, "E"]:
    """Adds up the weights with which each expert was chosen: its importance.

    Source: Shazeer et al. 2017, section 4.
    """
    experts_S = experts_TK.reshape(-1)
    weights_S = weights_TK.reshape(-1)
    zeros_E = jnp.zeros(num_experts)
    return zeros_E.at[experts_S].add(weights_S, mode="drop")


@takes_numpy
def balance_of_scopes(
    experts_TK: Int[Array, "T K"],
    probs_TE: Float[Array, "T E"],
    mask_T: Bool[Array, "T"],
    num_scopes: int,
) -> Float[Array, "2"]:
    """Returns the sum of the scopes' balance losses, and how many scopes have a token.

    The loss of a scope is E sum_e f_e P_e, with means over the scope.

    Args:
      experts_TK: selected experts, E where the token is masked.
      probs_TE: the router's probabilities.
      mask_T: False at padding.
      num_scopes: the T tokens are that many contiguous scopes of equal length.
    """
    num_experts = probs_TE.shape[-1]
    counts_SE = _count_in_scopes(experts_TK, num_scopes, num_experts)
    mask_SX = mask_T.reshape(num_scopes, -1)
    tokens_S = mask_SX.sum(axis=1, dtype=jnp.float32)
    safe_S = jnp.maximum(tokens_S, 1.0)
    safe_S1 = safe_S[:, None]
    masked_probs_TE = jnp.where(mask_T[:, None], probs_TE, 0.0)
    probs_SXE = masked_probs_TE.reshape(num_scopes, -1, num_experts)
    probs_SE = probs_SXE.sum(axis=1) / safe_S1
    total_S1 = counts_SE.sum(axis=1, keepdims=True)
    safe_total_S1 = jnp.maximum(total_S1, 1)
    load_SE = counts_SE / safe_total_S1
    balance = num_experts * jnp.sum(load_SE * probs_SE)
    has_tokens_S = tokens_S > 0
    num_with_tokens = jnp.sum(has_tokens_S, dtype=jnp.float32)
    return jnp.stack([balance, num_with_tokens])


def _count_in_scopes(experts_TK: jax.Array, num_scopes: int, num_experts: int) -> jax.Array:
    """Counts how often each expert was chosen in each scope."""
    experts_SX = experts_TK.reshape(num_scopes, -1)

    def count(experts_X):
        experts_X1 = experts_X[:, None]
        return count_assignments(experts_X1, num_experts)

    return jax.vmap(count)(experts_SX)


@takes_numpy
def unbiased_choices(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    config: MoeConfig,
) -> Int[Array, "T K"]:
    """Returns the top K of the scores alone, without bias and groups.

    DeepSeek-V3's sequence-wise loss counts them. A token has as many as it has experts.
    """
    scores_TE = jax.lax.stop_gradient(routing.log_scores_TE)
    num_choices = scores_TE.shape[-1]
    _, experts_TK = jax.lax.top_k(scores_TE, config.top_k)
    mask_T1 = mask_T[:, None]
    has_expert_TK = routing.experts_TK < num_choices
    is_chosen_TK = mask_T1 & has_expert_TK
    experts_TK = jnp.where(is_chosen_TK, experts_TK, num_choices)
    return experts_TK.astype(jnp.int32)


@takes_numpy
def sum_of_margins(
    probs_TE: Float[Array, "T E"],
    mask_T: Bool[Array, "T"],
    top_k: int,
) -> Float[Array, ""]:
    """Adds up over tokens the K-th largest probability minus the next one (0 if there is none)."""
    probs_TE = jax.lax.stop_gradient(probs_TE)
    if top_k == probs_TE.shape[-1]:
        margin_T = probs_TE.min(axis=-1)
    else:
        best_TK, _ = jax.lax.top_k(probs_TE, top_k + 1)
        kth_T = best_TK[:, -2]
        next_T = best_TK[:, -1]
        margin_T = kth_T - next_T
    margin_T = jnp.where(mask_T, margin_T, 0.0)
    return margin_T.sum()


@takes_numpy
def count_ties(routing: Routing, mask_T: Bool[Array, "T"]) -> Float[Array, ""]:
    """Counts the tokens for which an expert that was not selected ties with the last one that was.

    Ties of their ranks go to the lowest index and load low-numbered experts; float32 logits hardly
    have any.
    """
    ranking_TE = routing.ranking_TE
    num_choices = ranking_TE.shape[-1]
    is_choice_TK = routing.experts_TK < num_choices
    expert_TK = jnp.minimum(routing.experts_TK, num_choices - 1)
    chosen_TK = jnp.take_along_axis(ranking_TE, expert_TK, axis=1)
    chosen_TK = jnp.where(is_choice_TK, chosen_TK, jnp.inf)
    last_T1 = chosen_TK.min(axis=1, keepdims=True)
    num_as_high_T = _count_equal(ranking_TE, last_T1)
    num_chosen_as_high_T = _count_equal(chosen_TK, last_T1)
    is_tied_T = num_as_high_T > num_chosen_as_high_T
    last_T = last_T1[:, 0]
    is_ranked_T = jnp.isfinite(last_T)
    is_counted_T = mask_T & is_ranked_T & is_tied_T
    return is_counted_T.sum(dtype=jnp.float32)


def _count_equal(values_TE: jax.Array, value_T1: jax.Array) -> jax.Array:
    """Counts the values of each token that equal one."""
    is_equal_TE = values_TE == value_T1
    return is_equal_TE.sum(axis=1)


def _kth_largest(values_TE: jax.Array, k: int) -> jax.Array:
    """Returns each token's k-th largest value, `[T, 1]`."""
    best_TK, _ = jax.lax.top_k(values_TE, k)
    return best_TK[:, -1:]


@takes_numpy
def expected_load(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    top_k: int,
) -> Float[Array, "E"]:
    """Returns the expected number of tokens of each expert if its noise alone were drawn again.

    This sums, for each token and expert, the probability that clean logit plus fresh noise exceeds
    the K-th largest of the other experts' noisy logits.

    Source: Shazeer et al. 2017, equations 8 to 10 (appendix A).
    """
    noisy_TE = routing.noisy_TE
    best_TK, _ = jax.lax.top_k(noisy_TE, top_k + 1)
    kth_T1 = best_TK[:, -2:-1]
    next_T1 = best_TK[:, -1:]
    # The K-th largest of the others is the next one for an expert among the K largest itself.
    is_largest_TE = noisy_TE >= kth_T1
    threshold_TE = jnp.where(is_largest_TE, next_T1, kth_T1)
    distance_TE = routing.logits_TE - threshold_TE
    return _sum_of_probabilities(distance_TE, routing.noise_scale_TE, mask_T)


@takes_numpy
def expected_load_vmoe(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    top_k: int,
) -> Float[Array, "E"]:
    """Returns an expected load with one threshold for all experts, and noise of 1/E.

    The threshold is the K-th largest noisy logit. As an estimate of the load it is systematically
    low; as a loss it is fine.

    Source: Riquelme et al. 2021 (V-MoE), section A.2.
    """
    threshold_T1 = _kth_largest(routing.noisy_TE, top_k)
    distance_TE = routing.logits_TE - threshold_T1
    num_choices = routing.logits_TE.shape[-1]
    noise = 1 / num_choices
    return _sum_of_probabilities(distance_TE, noise, mask_T)


def _sum_of_probabilities(
    distance_TE: jax.Array,
    scale: jax.Array | float,
    mask_T: jax.Array,
) -> jax.Array:
    """Sums over tokens the probability that normal noise of this scale is below the distance."""
    # Without noise, which a schedule may end at, the probability is 0 or 1, and its gradient 0 in
    # place of 0/0.
    safe_scale = jnp.maximum(scale, LEAST_NOISE)
    standardized_TE = distance_TE / safe_scale
    probability_TE = jax.scipy.stats.norm.cdf(standardized_TE)
    mask_T1 = mask_T[:, None]
    probability_TE = jnp.where(mask_T1, probability_TE, 0.0)
    return probability_TE.sum(axis=0)


@takes_numpy
def quantile_margins(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    top_k: int,
) -> Float[Array, "T E"]:
    """Returns each logit minus alpha_t, -inf at padding.

    alpha_t is the (K+1)-th largest of the values that the token's selection was made by.

    Source: quantile balancing, 2026; `state.update_quantiles` takes each expert's quantile of them.
    """
    alpha_T1 = _kth_largest(routing.ranking_TE, top_k + 1)
    mask_T1 = mask_T[:, None]
    logits_TE = jax.lax.stop_gradient(routing.logits_TE)
    margins_TE = logits_TE - alpha_T1
    return jnp.where(mask_T1, margins_TE, -jnp.inf)
