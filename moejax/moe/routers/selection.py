"""Which experts a token visits: bias, groups, top K."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moejax.config import MoeConfig
from moejax.moe.routers.routing import no_expert

SAVED_NAMES = ("routing_experts", "routing_weights")
"""Names under which selection and weights are saved by remat, so that a recomputation can never route differently."""


def select(
    values_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], top_k: int, is_blocked_E: Bool[Array, "E"] | None = None
) -> Int[Array, "T K"]:
    """The K experts of highest value, the best first; ties go to the lowest index. E where the token is masked.

    Where experts are blocked, see `eligible`, E also takes the place of choices for which too few others are left.
    """
    values_TK, experts_TK = jax.lax.top_k(jax.lax.stop_gradient(eligible(values_TE, is_blocked_E)), top_k)
    if is_blocked_E is not None:
        experts_TK = jnp.where(values_TK > -jnp.inf, experts_TK, values_TE.shape[-1])
    return named(no_expert(experts_TK, mask_T, values_TE.shape[-1]))


def eligible(values_TE: Float[Array, "T E"], is_blocked_E: Bool[Array, "E"] | None) -> Float[Array, "T E"]:
    """The values that experts are ranked by, -inf for those that are blocked; None blocks none."""
    return values_TE if is_blocked_E is None else jnp.where(is_blocked_E[None], -jnp.inf, values_TE)


def named(experts_TK: Int[Array, "T K"]) -> Int[Array, "T K"]:
    """Under the name by which remat saves a selection."""
    return checkpoint_name(experts_TK, "routing_experts")


def selection_values(
    logits_TE: Float[Array, "T E"], log_scores_TE: Float[Array, "T E"], bias_E: jax.Array | None, config: MoeConfig
) -> Float[Array, "T E"]:
    """What experts are ranked by: scores or logits, plus the selection bias, -inf outside the best groups.

    Without bias and groups, scores rank as logits do, and logits have no rounding ties.

    Source: DeepSeek-V3 (DeepSeek-AI 2024), section 2.1.2: bias, groups by the sum of their two best; DeepSeek-V2,
    section 2.2.2: groups by their best.
    """
    by_logits = config.score == "softmax_after" or config.select_by == "logits"
    is_plain = bias_E is None and config.num_groups == 1
    values_TE = logits_TE if by_logits or is_plain else jnp.exp(log_scores_TE)
    values_TE = jax.lax.stop_gradient(values_TE)
    if bias_E is not None:
        values_TE += bias_E[None]
    if config.num_groups > 1:
        values_TE = mask_groups(values_TE, config)
    return values_TE


def mask_groups(values_TE: Float[Array, "T E"], config: MoeConfig) -> Float[Array, "T E"]:
    """-inf outside the `top_k_groups` best of `num_groups` contiguous groups of experts."""
    groups = config.num_groups
    values_TGS = values_TE.reshape(-1, groups, values_TE.shape[-1] // groups)
    best = 2 if config.group_score == "top2_sum" else 1
    group_values_TG = jax.lax.top_k(values_TGS, best)[0].sum(axis=-1)
    _, kept_TM = jax.lax.top_k(group_values_TG, config.top_k_groups)
    is_kept_TG = (kept_TM[:, :, None] == jnp.arange(groups)[None, None]).any(axis=1)
    return jnp.where(is_kept_TG[:, :, None], values_TGS, -jnp.inf).reshape(values_TE.shape)
