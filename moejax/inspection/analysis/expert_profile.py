"""Portraits of experts by what they get: vocabulary, domains, and the other experts of a token.

The measures follow OLMoE (Muennighoff et al. 2024, section 5). Arrays `experts_NTK` hold expert
ids, `num_experts` for no (further) expert. Those of most routers come in falling order of the score
that selects, so that the first is the top-1 choice; where experts choose tokens they come in order
of id: sort them with `by_weight`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Int64

from moejax.inspection.analysis.specialisation import count_tokens_by_expert
from moejax.seeds import check_seed

MIN_EXPECTED = 5.0  # tokens of a pair of experts, below which a ratio is noise
ITERATIONS = 300  # of proportional fitting


class ProfileError(ValueError):
    """Arrays that a measure of experts cannot be computed from."""


def by_weight(
    experts_NTK: Int[np.ndarray, "N T K"],
    weights_NTK: Float[np.ndarray, "N T K"],
) -> Int[np.ndarray, "N T K"]:
    """Returns the experts of each token in falling order of their combine weights.

    `num_experts`, which stands for none and has weight 0, comes last.
    """
    order_NTK = np.argsort(-weights_NTK, axis=-1, kind="stable")
    return np.take_along_axis(experts_NTK, order_NTK, axis=-1)


class VocabularySpecialisation(NamedTuple):
    """How far each token of the vocabulary belongs to one expert.

    Attributes:
      share_NV: of the token's occurrences, the fraction that has its favourite expert as the top-1
        choice: the largest N(x, e) / N(x) over e; NaN for tokens seen less than `min_count` times.
      expert_NV: the favourite, of several the lowest id; num_experts where the share is NaN.
      mean_N: mean share over tokens of the vocabulary, each with weight 1; NaN without any.
      chance_N: the same where experts are dealt out to tokens at random, with their loads
        kept. Well above the largest load, because the favourite of a rare token has a large
        share by chance.
      mean_NE: mean share of the tokens whose favourite is the expert; NaN for an expert that
        is the favourite of none.
    """

    share_NV: Float64[np.ndarray, "N V"]
    expert_NV: Int64[np.ndarray, "N V"]
    mean_N: Float64[np.ndarray, "N"]
    chance_N: Float64[np.ndarray, "N"]
    mean_NE: Float64[np.ndarray, "N E"]


def vocabulary_specialisation(
    tokens_T: Int[np.ndarray, "T"],
    experts_NTK: Int[np.ndarray, "N T K"],
    vocab_size: int,
    num_experts: int,
    *,
    min_count: int = 10,
    seed: int = 0,
) -> VocabularySpecialisation:
    """Returns, for each token of the vocabulary, the share that its favourite expert gets.

    Follows the vocabulary specialisation of OLMoE, N(x, e) / N(x) with k = 1: of the N(x)
    occurrences of token x, the fraction whose top-1 choice is expert e, summarised by the largest
    over e and its mean over the vocabulary. Departs from it by leaving rare tokens out of the mean
    too, and by reporting chance next to it.

    Args:
      tokens_T: ids in [0, vocab_size), negative to leave a token out. The input tokens give
        the version for inputs; the next tokens, `attributes.next_token(...).values_T`, that
        for outputs.
      experts_NTK: the first of K is the top-1 choice; tokens without one are left out.
      vocab_size: V.
      num_experts: E.
      min_count: occurrences with an expert that a token needs.
      seed: of the deal that chance is measured with.

    Raises:
      ValueError: an id outside its range.
    """
    check_seed("seed", seed)
    rng = np.random.default_rng(seed)
    layers = []
    for experts_TK in experts_NTK:  # one after the other, for counts of all layers can be large
        top_T = experts_TK[:, 0]
        mask_T = (tokens_T >= 0) & (top_T < num_experts)
        # Only tokens that have an expert are dealt one.
        dealt_T = top_T.copy()
        dealt_T[mask_T] = rng.permutation(top_T[mask_T])
        counts_EV = _count_top_1(tokens_T, top_T, vocab_size, num_experts, mask_T)
        chance_EV = _count_top_1(tokens_T, dealt_T, vocab_size, num_experts, mask_T)
        layers.append(_favourites(counts_EV, chance_EV, min_count))
    fields = map(np.array, zip(*layers, strict=True))
    return VocabularySpecialisation(*fields)


def _count_top_1(
    tokens_T: np.ndarray,
    top_T: np.ndarray,
    vocab_size: int,
    num_experts: int,
    mask_T: np.ndarray,
) -> np.ndarray:
    """Counts how often each expert is the top-1 choice for each token of the vocabulary."""
    top_1T1 = top_T[None, :, None]
    (counts_EV,) = count_tokens_by_expert(tokens_T, top_1T1, vocab_size, num_experts, mask_T)
    return counts_EV


def _favourites(
    counts_EV: np.ndarray,
    chance_EV: np.ndarray,
    min_count: int,
) -> tuple[np.ndarray | float, ...]:
    """Returns one layer of `VocabularySpecialisation`."""
    num_experts = len(counts_EV)
    share_V = _largest_share(counts_EV, min_count)
    chance_V = _largest_share(chance_EV, min_count)
    is_known_V = ~np.isnan(share_V)
    favourite_V = counts_EV.argmax(axis=0)
    expert_V = np.where(is_known_V, favourite_V, num_experts)
    shares_v = share_V[is_known_V]
    experts_v = expert_V[is_known_V]
    ones_v = np.ones_like(shares_v)
    sum_E = np.bincount(experts_v, shares_v, minlength=num_experts)
    num_tokens_E = np.bincount(experts_v, ones_v, minlength=num_experts)
    mean_E = _divide(sum_E, num_tokens_E)
    mean = _mean(shares_v)
    chance = _mean(chance_V[is_known_V])
    return share_V, expert_V, mean, chance, mean_E


def _largest_share(counts_EV: np.ndarray, min_count: int) -> np.ndarray:
    """Returns the largest share that an expert has of each token; NaN for rare tokens."""
    seen_V = counts_EV.sum(axis=0)
    is_frequent_V = seen_V >= max(min_count, 1)
    frequent_seen_V = np.where(is_frequent_V, seen_V, 0)
    largest_V = counts_EV.max(axis=0)
    return _divide(largest_V, frequent_seen_V)


def _mean(values: np.ndarray) -> float:
    """Returns the mean; NaN of no values."""
    if not values.size:
        return float("nan")
    return float(values.mean())


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Returns part over whole, NaN where the whole is 0."""
    nan = np.full(np.shape(whole), np.nan)
    return np.divide(part, whole, out=nan, where=whole > 0)


class DomainSpecialisation(NamedTuple):
    """How the tokens of each domain spread over experts.

    Attributes:
      share_NDE: fraction of a domain's tokens that visit the expert, N(e, D) / N(D); sums to the
        number of experts that tokens visit, and is NaN for a domain without tokens.
      overall_NE: the same fraction of all tokens.
      uniform_N: the level of uniform routing, K / E, with K the mean number of experts that a
        token visits.
      tokens_D: N(D).
    """

    share_NDE: Float64[np.ndarray, "N D E"]
    overall_NE: Float64[np.ndarray, "N E"]
    uniform_N: Float64[np.ndarray, "N"]
    tokens_D: Int64[np.ndarray, "D"]


def domain_specialisation(
    domains_T: Int[np.ndarray, "T"],
    experts_NTK: Int[np.ndarray, "N T K"],
    num_domains: int,
    num_experts: int,
) -> DomainSpecialisation:
    """Returns how often the tokens of each domain visit each expert.

    The domain specialisation of OLMoE, section 5.

    Args:
      domains_T: in [0, num_domains), negative for tokens to be left out.
      experts_NTK: all choices count; pass `experts_NTK[:, :, :1]` for the top-1 version.
      num_domains: D.
      num_experts: E.

    Raises:
      ValueError: an id outside its range.
    """
    mask_T = domains_T >= 0
    counts_NED = count_tokens_by_expert(domains_T, experts_NTK, num_domains, num_experts, mask_T)
    tokens_D = np.bincount(domains_T[mask_T], minlength=num_domains)
    counts_NDE = counts_NED.swapaxes(1, 2).astype(np.float64)
    counts_NE = counts_NDE.sum(axis=1)
    num_tokens_NE = np.full(counts_NE.shape, tokens_D.sum())
    overall_NE = _divide(counts_NE, num_tokens_NE)
    tokens_NDE = np.broadcast_to(tokens_D[:, None], counts_NDE.shape)
    share_NDE = _divide(counts_NDE, tokens_NDE)
    uniform_N = overall_NE.mean(axis=1)
    return DomainSpecialisation(share_NDE, overall_NE, uniform_N, tokens_D)


def coactivation_shares(coactivation_NEE: Int[np.ndarray, "N E E"]) -> Float64[np.ndarray, "N E E"]:
    """Returns, of the tokens of expert i, the fraction that also visits expert j.

    N(i, j) / N(i) of OLMoE, section 5. Not symmetric, for a rare expert may be seen only together
    with a frequent one. OLMoE's own script counts only pairs that are neighbours in the order of a
    token's choices; here all pairs count, as in its text.

    Args:
      coactivation_NEE: tokens that visit both, with each expert's tokens on the diagonal
        (`moe.by_token.coactivation`).

    Returns:
      `[n, i, j]`, 1 on the diagonal; NaN in the rows of experts without tokens.
    """
    tokens_NE = np.diagonal(coactivation_NEE, axis1=1, axis2=2)
    tokens_NEE = np.broadcast_to(tokens_NE[:, :, None], coactivation_NEE.shape)
    return _divide(coactivation_NEE, tokens_NEE)


def expected_coactivation(coactivation_EE: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Returns how many tokens would visit both experts of a pair by the experts' loads alone.

    Quasi-independence: m_ij = a_i a_j for i != j, with the row sums of the counts; found by
    iterative proportional fitting (Bishop, Fienberg and Holland 1975, Discrete Multivariate
    Analysis, chapter 5). The plain product of loads would not do, for no token visits an
    expert twice.

    Args:
      coactivation_EE: symmetric; the diagonal is not used.

    Returns:
      The expected counts, NaN on the diagonal.
    """
    counts_EE = coactivation_EE.astype(np.float64)
    np.fill_diagonal(counts_EE, 0.0)
    pairs_E = counts_EE.sum(axis=1)
    total = max(pairs_E.sum(), 1.0)
    factors_E = np.sqrt(pairs_E / np.sqrt(total))
    for _ in range(ITERATIONS):
        others_E = factors_E.sum() - factors_E
        zeros_E = np.zeros_like(pairs_E)
        wanted_E = np.divide(pairs_E, others_E, out=zeros_E, where=others_E > 0)
        factors_E = np.sqrt(factors_E * wanted_E)  # half a step for both ends of a pair
    factors_E1 = factors_E[:, None]
    factors_1E = factors_E[None, :]
    expected_EE = factors_E1 * factors_1E
    np.fill_diagonal(expected_EE, np.nan)
    return expected_EE


def coactivation_ratio(coactivation_EE: Int[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Returns counts over those expected from loads alone.

    NaN on the diagonal and where too few are expected for a ratio to mean anything.
    """
    expected_EE = expected_coactivation(coactivation_EE)
    known_EE = np.nan_to_num(expected_EE)
    is_enough_EE = known_EE >= MIN_EXPECTED
    ratio_EE = np.full(expected_EE.shape, np.nan)
    np.divide(coactivation_EE, expected_EE, out=ratio_EE, where=is_enough_EE)
    return ratio_EE
