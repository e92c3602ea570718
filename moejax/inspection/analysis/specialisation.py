"""Finds the tokens that each expert gets more of than chance would give it, from counts.

Routing by word identity is the specialisation that early MoE papers saw first (Shazeer et al. 2017,
appendix E; Zoph et al. 2022, section 7). To see it, count how often each expert got each token of
the vocabulary, and compare with what the expert would get if routing ignored identity.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64

# One token in 30,000 exceeds this by chance when routing ignores identity: a vocabulary yields
# about none per expert.
MIN_Z = 4.0


class TokenShare(NamedTuple):
    """A token that an expert gets more often than its share.

    Attributes:
      token: id.
      num_assignments: times the expert got it.
      share: of the token's visits to experts of the layer; at most 1 / K, where each of its K
        choices is another.
      ratio: times over the number expected if routing ignored identity.
    """

    token: int
    num_assignments: int
    share: float
    ratio: float


def count_tokens_by_expert(
    tokens_T: Int[np.ndarray, "T"],
    experts_NTK: Int[np.ndarray, "N T K"],
    vocab_size: int,
    num_experts: int,
    mask_T: Bool[np.ndarray, "T"],
) -> Int64[np.ndarray, "N E V"]:
    """Counts how often each expert of each layer was chosen for each token of the vocabulary.

    Batches add up: sum the results.

    Args:
      tokens_T: token ids in [0, vocab_size).
      experts_NTK: the experts each MoE layer chose for each token, in [0, num_experts), or
        num_experts for none.
      vocab_size: V.
      num_experts: E.
      mask_T: False for padding, which is counted nowhere.

    Returns:
      counts_NEV; where every token has K experts its sum is N * K * (number of real tokens).

    Raises:
      ValueError: an id outside its range.
    """
    tokens_t = tokens_T[mask_T].astype(np.int64)
    _check_range("tokens_T", tokens_t, vocab_size)
    num_layers = len(experts_NTK)
    counts_NEV = np.zeros((num_layers, num_experts, vocab_size), np.int64)
    # One layer after the other, for memory; the last row counts the choices of no expert.
    num_rows = num_experts + 1
    num_cells = num_rows * vocab_size
    for counts_EV, experts_TK in zip(counts_NEV, experts_NTK, strict=True):
        experts_tk = experts_TK[mask_T].astype(np.int64)
        _check_range("experts_NTK", experts_tk, num_rows)
        cells_tk = experts_tk * vocab_size + tokens_t[:, None]
        counts = np.bincount(cells_tk.ravel(), minlength=num_cells)
        counts_eV = counts.reshape(num_rows, vocab_size)
        counts_EV[:] = counts_eV[:num_experts]
    return counts_NEV


def _check_range(name: str, values: np.ndarray, size: int) -> None:
    """Raises for a value outside [0, size)."""
    if not values.size:
        return
    low, high = values.min(), values.max()
    if low < 0 or high >= size:
        raise ValueError(f"{name} has values from {low} to {high}; they must be in [0, {size})")


def over_represented_tokens(
    counts_NEV: Int[np.ndarray, "N E V"],
    top: int = 12,
    min_count: int = 20,
) -> list[list[list[TokenShare]]]:
    """Ranks the tokens that an expert gets significantly more often than its share of the load.

    If routing ignored identity, each of the n_v assignments of token v would go to expert e with
    that expert's share q_e of the layer's load, and e's count c of v would be binomial. The rank is
    the signed root of the log-likelihood ratio (Dunning 1993, "Accurate Methods for the Statistics
    of Surprise and Coincidence"),

      z = sqrt(2 n_v KL(c / n_v || q_e)),   positive where c > n_v q_e,

    close to standard normal under that hypothesis, also for small counts. It grows with the
    evidence, so a rare token must be very lopsided to rank next to a frequent one; ranking by the
    ratio itself would list only rare tokens. The log-odds with a Dirichlet prior (Monroe et al.
    2008) is a common alternative, but it hides a token that no other expert gets, because the
    variance of the log of a count of zero is huge: just the tokens we look for. The K experts of
    one token differ, which makes counts less variable than binomial: z errs on the low side.

    Args:
      counts_NEV: from `count_tokens_by_expert`.
      top: tokens per expert, at most.
      min_count: tokens that the expert got less often are left out.

    Returns:
      For each layer, for each expert, a list of `TokenShare`, strongest first; empty if
      nothing stands out.
    """
    return [_rank_layer(counts_EV, top, min_count) for counts_EV in counts_NEV]


def _rank_layer(counts_EV: np.ndarray, top: int, min_count: int) -> list[list[TokenShare]]:
    """Returns the tokens that stand out, for each expert of a layer."""
    z_EV, ratio_EV = _surprise(counts_EV)
    seen_V = counts_EV.sum(axis=0)
    share_EV = counts_EV / np.maximum(seen_V, 1)
    of_layer = []
    for e in range(len(counts_EV)):
        of_expert = []
        for v in _rank(counts_EV[e], z_EV[e], top, min_count):
            token_share = TokenShare(
                token=int(v),
                num_assignments=int(counts_EV[e, v]),
                share=float(share_EV[e, v]),
                ratio=float(ratio_EV[e, v]),
            )
            of_expert.append(token_share)
        of_layer.append(of_expert)
    return of_layer


def _surprise(
    counts_EV: Int[np.ndarray, "E V"],
) -> tuple[Float64[np.ndarray, "E V"], Float64[np.ndarray, "E V"]]:
    """Returns the signed root z of the log-likelihood ratio, and the count over that expected.

    Both are 0 for unseen tokens.
    """
    counts_EV = counts_EV.astype(np.float64)
    seen_V = counts_EV.sum(axis=0)
    load_E1 = counts_EV.sum(axis=1, keepdims=True)
    share_E1 = load_E1 / max(seen_V.sum(), 1)
    expected_EV = share_E1 * seen_V
    others_EV = seen_V - counts_EV
    expected_others_EV = (1 - share_E1) * seen_V
    own_term_EV = _x_log_ratio(counts_EV, expected_EV)
    others_term_EV = _x_log_ratio(others_EV, expected_others_EV)
    deviance_EV = 2 * (own_term_EV + others_term_EV)
    # Rounding can make a deviance of 0 slightly negative.
    root_EV = np.sqrt(np.maximum(deviance_EV, 0))
    sign_EV = np.sign(counts_EV - expected_EV)
    z_EV = sign_EV * root_EV
    zeros_EV = np.zeros_like(counts_EV)
    ratio_EV = np.divide(counts_EV, expected_EV, out=zeros_EV, where=expected_EV > 0)
    return z_EV, ratio_EV


def _x_log_ratio(
    x: Float64[np.ndarray, "E V"],
    y: Float64[np.ndarray, "E V"],
) -> Float64[np.ndarray, "E V"]:
    """Returns x * log(x / y), which is 0 where x is 0."""
    ones = np.ones_like(x)
    ratio = np.divide(x, y, out=ones, where=x > 0)
    return x * np.log(ratio)


def _rank(
    counts_V: Int[np.ndarray, "V"],
    z_V: Float64[np.ndarray, "V"],
    top: int,
    min_count: int,
) -> Int64[np.ndarray, "n"]:
    """Returns the tokens that stand out, strongest first; of equal ranks the lower id first."""
    is_frequent_V = counts_V >= min_count
    is_surprising_V = z_V >= MIN_Z
    tokens_n = np.flatnonzero(is_frequent_V & is_surprising_V)
    order_n = np.argsort(-z_V[tokens_n], kind="stable")
    ranked_n = tokens_n[order_n]
    return ranked_n[:top]
