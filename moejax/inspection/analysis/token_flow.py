"""Which paths tokens take through the experts of successive layers."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int64


class TokenFlow(NamedTuple):
    """Tokens between experts of neighbouring MoE layers; M = N - 1 steps.

    Attributes:
      counts_MEE: `[m, i, j]` tokens that visit expert i in MoE layer m and expert j in layer m + 1.
      expected_MEE: the same if a token's experts in neighbouring layers were independent.
    """

    counts_MEE: Int64[np.ndarray, "M E E"]
    expected_MEE: Float64[np.ndarray, "M E E"]


def token_flow(
    experts_NTK: Int[np.ndarray, "N T K"],
    num_experts: int,
    num_choices: int | None = None,
) -> TokenFlow:
    """Counts tokens that go from one expert to another in the next MoE layer.

    Args:
      experts_NTK: num_experts for no expert.
      num_experts: E.
      num_choices: only each token's first k choices count, 1 for the top-1 choice; None: all, and a
        token is in as many cells as it has pairs of experts.

    Returns:
      Counts, and those expected: row sum times column sum over the sum.
    """
    chosen_NTK = experts_NTK[:, :, :num_choices]
    chosen_NTK = chosen_NTK.astype(np.int64)
    num_steps = max(len(chosen_NTK) - 1, 0)
    counts_MEE = np.zeros((num_steps, num_experts, num_experts), np.int64)
    for m in range(num_steps):
        counts_MEE[m] = _count(chosen_NTK[m], chosen_NTK[m + 1], num_experts)
    leaving_ME1 = counts_MEE.sum(axis=2, keepdims=True)
    arriving_M1E = counts_MEE.sum(axis=1, keepdims=True)
    total_M11 = counts_MEE.sum(axis=(1, 2), keepdims=True)
    share_M1E = arriving_M1E / np.maximum(total_M11, 1)
    expected_MEE = leaving_ME1 * share_M1E
    return TokenFlow(counts_MEE, expected_MEE)


def _count(from_TK: np.ndarray, to_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts one choice with one choice at a time, which needs memory for T cells only."""
    width = num_experts + 1  # with a row and a column for none
    num_cells = width**2
    counts = np.zeros(num_cells, np.int64)
    for from_T, to_T in itertools.product(from_TK.T, to_TK.T):
        cell_T = from_T * width + to_T
        counts += np.bincount(cell_T, minlength=num_cells)
    counts_ee = counts.reshape(width, width)
    return counts_ee[:num_experts, :num_experts]
