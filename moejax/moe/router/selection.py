"""Which experts a token visits: bias, groups, top K."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoeConfig
from moejax.moe.router.routing import no_expert

SAVED_NAMES = ("routing_experts", "routing_weights")
"""Names under which remat saves selection and weights.

So a recomputation can never route differently.
"""


def select(
    values_TE: Float[Array, "T E"],
    mask_T: Bool[Array, "T"],
    top_k: int,
    is_blocked_E: Bool[Array, "E"] | None = None,
) -> Int[Array, "T K"]:
    """Returns the K experts of highest value, the best first; E where the token is masked.

    Ties go to the lowest index. Where some experts are blocked, with values from `mask_blocked`, E
    also stands for choices for which too few others are left.
    """
    num_choices = values_TE.shape[-1]
    values_TK, experts_TK = jax.lax.top_k(jax.lax.stop_gradient(values_TE), top_k)
    if is_blocked_E is not None:
        experts_TK = jnp.where(values_TK > -jnp.inf, experts_TK, num_choices)
    return save_for_remat(no_expert(experts_TK, mask_T, num_choices))


def mask_blocked(
    values_TE: Float[Array, "T E"], is_blocked_E: Bool[Array, "E"] | None
) -> Float[Array, "T E"]:
    """Sets the values that experts are ranked by to -inf for blocked ones; None blocks none."""
    if is_blocked_E is None:
        return values_TE
    return jnp.where(is_blocked_E[None], -jnp.inf, values_TE)


def save_for_remat(experts_TK: Int[Array, "T K"]) -> Int[Array, "T K"]:
    """Gives a selection the name by which remat saves it."""
    return checkpoint_name(experts_TK, "routing_experts")


def selection_values(
    logits_TE: Float[Array, "T E"],
    log_scores_TE: Float[Array, "T E"],
    bias_E: jax.Array | None,
    config: MoeConfig,
    is_blocked_E: Bool[Array, "E"] | None = None,
) -> Float[Array, "T E"]:
    """Returns what experts are ranked by: scores or logits, plus the selection bias.

    It is -inf for blocked experts and outside the best groups. Without bias and groups, scores rank
    as logits do, and logits have no rounding ties.

    Source: DeepSeek-V3 (DeepSeek-AI 2024), section 2.1.2: bias, groups by the sum of their two
    best; DeepSeek-V2, section 2.2.2: groups by their best.
    """
    by_logits = config.score == "softmax_after" or config.select_by == "logits"
    is_plain = bias_E is None and config.num_groups == 1
    values_TE = logits_TE if by_logits or is_plain else jnp.exp(log_scores_TE)
    values_TE = jax.lax.stop_gradient(values_TE)
    if bias_E is not None:
        values_TE += bias_E[None]
    values_TE = mask_blocked(values_TE, is_blocked_E)
    if config.num_groups == 1:
        return values_TE
    return mask_groups(values_TE, config, is_blocked_E)


def mask_groups(
    values_TE: Float[Array, "T E"], config: MoeConfig, is_blocked_E: Bool[Array, "E"] | None = None
) -> Float[Array, "T E"]:
    """Sets values to -inf outside the `top_k_groups` best of `num_groups` groups of experts.

    Groups are contiguous. Where experts are blocked, groups are ranked by the others, and as many
    more groups are kept as a token needs to find `top_k` experts.

    Args:
      values_TE: by which experts are ranked, -inf where they are blocked.
      config: for the groups.
      is_blocked_E: experts that must not be selected; None blocks none.
    """
    groups = config.num_groups
    values_TGS = values_TE.reshape(-1, groups, values_TE.shape[-1] // groups)
    num_best = 2 if config.group_score == "top2_sum" else 1
    best_TGX, _ = jax.lax.top_k(values_TGS, num_best)
    if is_blocked_E is None:
        is_kept_TG = _best_groups(best_TGX, config)
    else:
        is_kept_TG = _best_open_groups(best_TGX, is_blocked_E, config)
    masked_TGS = jnp.where(is_kept_TG[:, :, None], values_TGS, -jnp.inf)
    return masked_TGS.reshape(values_TE.shape)


def _best_groups(best_TGX: Float[Array, "T G X"], config: MoeConfig) -> Bool[Array, "T G"]:
    """Whether each group is among the `top_k_groups` with the largest sum of best values."""
    group_values_TG = best_TGX.sum(axis=-1)
    _, kept_TM = jax.lax.top_k(group_values_TG, config.top_k_groups)
    group_G = jnp.arange(config.num_groups)
    is_group_TMG = kept_TM[:, :, None] == group_G[None, None]
    return is_group_TMG.any(axis=1)


def _best_open_groups(
    best_TGX: Float[Array, "T G X"], is_blocked_E: Bool[Array, "E"], config: MoeConfig
) -> Bool[Array, "T G"]:
    """Whether each group is kept where some experts are blocked, whose values are -inf."""
    is_open_GS = (~is_blocked_E).reshape(config.num_groups, -1)
    num_open_G = is_open_GS.sum(axis=1)
    is_open_TGX = best_TGX > -jnp.inf
    open_TGX = jnp.where(is_open_TGX, best_TGX, 0.0)
    has_open_1G = (num_open_G > 0)[None]
    group_values_TG = jnp.where(has_open_1G, open_TGX.sum(axis=-1), -jnp.inf)
    return _groups_with_enough(group_values_TG, num_open_G, config)


def _groups_with_enough(
    group_values_TG: Float[Array, "T G"], num_open_G: Int[Array, "G"], config: MoeConfig
) -> Bool[Array, "T G"]:
    """Whether each group is kept: the `top_k_groups` best, and more until there are enough experts.

    Enough are `top_k` experts that are not blocked.
    """
    group_values_TG, order_TG = jax.lax.top_k(group_values_TG, config.num_groups)
    num_open_TG = num_open_G[order_TG]
    before_TG = jnp.cumsum(num_open_TG, axis=1) - num_open_TG
    is_among_best_1G = jnp.arange(config.num_groups)[None] < config.top_k_groups
    is_kept_TG = is_among_best_1G | (before_TG < config.top_k)
    place_TG = jnp.argsort(order_TG, axis=1)
    return jnp.take_along_axis(is_kept_TG, place_TG, axis=1)
