"""Router saturation: how early in training tokens find the experts that they have in the end."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

from moejax.inspection.analysis.expert_profile import ProfileError


def router_saturation(
    experts_S: Sequence[Int[np.ndarray, "..."]],
    num_experts: int,
    num_choices: int | None = None,
) -> Float64[np.ndarray, "S N"]:
    """Returns, of each token's experts at the last checkpoint, the fraction it had at each one.

    The router saturation of OLMoE, section 5. Routing at random shows K / E, and more where loads
    are unequal.

    Args:
      experts_S: `[N, T, K]` of each checkpoint in order, of the same tokens: `experts` of the files
        in `routing/evaluations`. K may differ between checkpoints.
      num_experts: E, which stands for no expert.
      num_choices: k, only the first k choices of both count, 1 for the top-1 choice; None: all.
        Only for routers whose choices come in order of their score.

    Returns:
      Mean over the tokens that have an expert at the last checkpoint, NaN if none has; the
      last row is 1.

    Raises:
      ProfileError: no checkpoint, or checkpoints of other layers or tokens.
    """
    if not experts_S:
        raise ProfileError("router saturation needs at least one checkpoint, and there is none")
    shapes = sorted({experts_NTK.shape[:2] for experts_NTK in experts_S})
    if len(shapes) > 1:
        raise ProfileError(
            f"checkpoints differ in layers and tokens, [N, T]: {shapes}; use evaluations of one run"
        )
    chosen_S = [experts_NTK[:, :, :num_choices] for experts_NTK in experts_S]
    last_NTK = chosen_S[-1]
    kept_SN = [_kept(early_NTK, last_NTK, num_experts) for early_NTK in chosen_S]
    return np.stack(kept_SN)


def _kept(early_NTK: np.ndarray, last_NTK: np.ndarray, num_experts: int) -> np.ndarray:
    """Returns, by layer, the mean fraction of the last experts that are among the early ones."""
    num_layers, num_tokens, top_k = last_NTK.shape
    is_expert_NTK = last_NTK < num_experts
    kept_NT = np.zeros((num_layers, num_tokens), np.int64)
    for k in range(top_k):
        last_NT = last_NTK[:, :, k]
        is_same_NTK = early_NTK == last_NT[:, :, None]
        is_found_NT = is_same_NTK.any(axis=2)
        kept_NT += is_found_NT & is_expert_NTK[:, :, k]
    visits_NT = is_expert_NTK.sum(axis=2)
    has_expert_NT = visits_NT > 0
    share_NT = np.zeros(kept_NT.shape)
    np.divide(kept_NT, visits_NT, out=share_NT, where=has_expert_NT)
    total_N = share_NT.sum(axis=1)
    num_tokens_N = has_expert_NT.sum(axis=1)
    mean_N = np.full(num_tokens_N.shape, np.nan)
    np.divide(total_N, num_tokens_N, out=mean_N, where=num_tokens_N > 0)
    return mean_N
