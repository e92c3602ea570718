"""The truth for balancing losses and metrics: float64 NumPy that loops over tokens and experts,
from the formulas.

Inputs are what a router returns: `probs_TE`, `experts_TK` (-1 at masked tokens), `weights_TK`, and
`mask_T`. Masked tokens enter no count, no mean, no loss. Without any real token a loss is 0.
Nothing in it is from `moejax`.

Axis letters as in `moejax/moe/__init__.py`.
"""

import math

import numpy as np

from oracle import logsumexp
from oracle.routers import largest, select_one


def real_tokens(mask_T):
    """Indices of the tokens that are not padding."""
    return [t for t in range(len(mask_T)) if mask_T[t]]


def count(experts_TK, num_experts):
    """c_e: how many choices fell on expert e; -1 is no choice."""
    counts_E = np.zeros(num_experts)
    for expert in np.ravel(experts_TK):
        if expert >= 0:
            counts_E[expert] += 1
    return counts_E


def mean(values):
    """The mean, and 0 of nothing."""
    values = list(values)
    return float(sum(values) / len(values)) if values else 0.0


# Balance
# --------------------------------------------------------------------------------------------------


def balance_loss(probs_TE, experts_TK, mask_T, convention="normalized"):
    """E * sum_e f_e P_e, f_e = c_e / (K T), P_e = mean of p_e; 1 at balance (Fedus 2021, eqs. 4 to
    6). `first_choice`:
    f_e from each token's first expert only (GShard, algorithm 1); `times_k`: f_e = c_e / T, K at
    balance (Mixtral in Transformers); `over_k`: f_e = c_e / (K^2 T), 1/K at balance (Levanter).
    """
    tokens, (num_experts, top_k) = (
        real_tokens(mask_T),
        (np.shape(probs_TE)[1], np.shape(experts_TK)[1]),
    )
    if not tokens:
        return 0.0
    if convention == "first_choice":
        experts_TK = [row[:1] for row in experts_TK]
    per_token = {"normalized": top_k, "first_choice": 1, "times_k": 1, "over_k": top_k**2}[
        convention
    ]
    counts_E = count([experts_TK[t] for t in tokens], num_experts)
    total = 0.0
    for e in range(num_experts):
        total += counts_E[e] / (per_token * len(tokens)) * mean(probs_TE[t][e] for t in tokens)
    return num_experts * total


def scoped_balance_loss(probs_TE, experts_TK, mask_T, num_scopes, convention="normalized"):
    """Mean of the losses of equal contiguous runs of tokens (sequences, microbatches, devices); a
    run without a real
    token does not count, any other counts as 1 however many it has.
    """
    size = len(mask_T) // num_scopes
    losses = []
    for start in range(0, num_scopes * size, size):
        here = slice(start, start + size)
        if any(mask_T[here]):
            losses.append(balance_loss(probs_TE[here], experts_TK[here], mask_T[here], convention))
    return mean(losses)


def sequence_balance_loss(scores_TE, mask_T, top_k, length):
    """DeepSeek-V3, eqs. 17 to 20, without alpha: mean over sequences with a real token of sum_e f_e
    P_e, where f_e =
    E / (K L) * (tokens with e in the top K of the unbiased s, groups ignored), P_e = mean of s_e /
    sum_j s_j, and L counts the sequence's real tokens.
    """
    num_experts, losses = np.shape(scores_TE)[1], []
    for start in range(0, len(mask_T), length):
        tokens = [t for t in range(start, start + length) if mask_T[t]]
        if tokens:
            counts_E = count([select_one(scores_TE[t], top_k) for t in tokens], num_experts)
            loss = 0.0
            for e in range(num_experts):
                fraction = num_experts / (top_k * len(tokens)) * counts_E[e]
                loss += fraction * mean(scores_TE[t][e] / sum(scores_TE[t]) for t in tokens)
            losses.append(loss)
    return mean(losses)


# Importance and load
# ----------------------------------------------------------------------------------------------


def cv_squared(values_E):
    """Population variance / mean^2; Shazeer 2017, eq. 7. 0 where all are 0."""
    centre = mean(values_E)
    return mean((value / centre - 1) ** 2 for value in values_E) if centre else 0.0


def importance(experts_TK, weights_TK, num_experts):
    """importance_e = sum over tokens of the gate of e, 0 where e is not selected; Shazeer 2017, eq.
    6.
    """
    importance_E = np.zeros(num_experts)
    for expert, weight in zip(np.ravel(experts_TK), np.ravel(weights_TK), strict=True):
        if expert >= 0:
            importance_E[expert] += weight
    return importance_E


def importance_loss(experts_TK, weights_TK, num_experts):
    """CV^2 of the importance; Shazeer 2017, eq. 7, without its weight."""
    return cv_squared(importance(experts_TK, weights_TK, num_experts))


def importance_vmoe(probs_TE, mask_T):
    """importance_e = sum over tokens of p_e before selection and noise; Riquelme 2021 (V-MoE),
    appendix A.
    """
    return sum(
        (np.asarray(probs_TE[t], np.float64) for t in real_tokens(mask_T)),
        np.zeros(np.shape(probs_TE)[1]),
    )


def normal_cdf(z):
    """Phi(z)."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def load_shazeer(clean_TE, noisy_TE, sigma_TE, mask_T, top_k):
    """load_e = sum over tokens of Phi((l_e - threshold_e) / sigma_e), the chance that e is in the
    top K if only its
    own noise is redrawn. threshold_e is the K-th largest noisy logit of the others; K < E. Shazeer
    2017, eqs. 8 to 10.
    """
    num_experts = np.shape(clean_TE)[1]
    load_E = np.zeros(num_experts)
    for t in real_tokens(mask_T):
        for e in range(num_experts):
            threshold = largest(
                [noisy_TE[t][other] for other in range(num_experts) if other != e], top_k
            )
            load_E[e] += normal_cdf((clean_TE[t][e] - threshold) / sigma_TE[t][e])
    return load_E


def load_vmoe(clean_TE, noisy_TE, mask_T, top_k):
    """As `load_shazeer` with one threshold, the K-th largest noisy logit of all, and sigma = 1/E;
    V-MoE's code. Too
    low: a selected expert must beat the K-th of all, perhaps itself, where the (K+1)-th would do.
    """
    num_experts = np.shape(clean_TE)[1]
    load_E = np.zeros(num_experts)
    for t in real_tokens(mask_T):
        threshold = largest(noisy_TE[t], top_k)
        for e in range(num_experts):
            load_E[e] += normal_cdf((clean_TE[t][e] - threshold) * num_experts)
    return load_E


def monte_carlo_load(clean_TE, noisy_TE, sigma_TE, mask_T, top_k, draws, rng):
    """What `load_shazeer` computes, by experiment: redraw the noise of one expert, keep the others,
    and count how often
    it is among the top K. The standard error of an entry is at most sqrt(T / (4 draws)).
    """
    num_experts = np.shape(clean_TE)[1]
    load_E = np.zeros(num_experts)
    for t in real_tokens(mask_T):
        for e in range(num_experts):
            redrawn_E = list(noisy_TE[t])
            for noise in rng.standard_normal(draws):
                redrawn_E[e] = clean_TE[t][e] + sigma_TE[t][e] * noise
                load_E[e] += (e in select_one(redrawn_E, top_k)) / draws
    return load_E


# Logits
# --------------------------------------------------------------------------------------------------


def z_loss(logits_TE, mask_T):
    """Mean of logsumexp(l)^2 of raw logits, before noise and bias; Zoph 2022 (ST-MoE), eq. 5."""
    return mean(logsumexp(logits_TE[t]) ** 2 for t in real_tokens(mask_T))


def logit_rms(logits_TE, mask_T):
    """sqrt(mean of l^2) over real tokens and experts."""
    return math.sqrt(mean(float(logit) ** 2 for t in real_tokens(mask_T) for logit in logits_TE[t]))


def logit_max(logits_TE, mask_T):
    """The largest l, with its sign, over real tokens and experts."""
    return max(float(logit) for t in real_tokens(mask_T) for logit in logits_TE[t])


# Metrics of the load
# ----------------------------------------------------------------------------------------------


def max_violation(counts_E):
    """MaxVio = max c / mean c - 1; 0 at balance, E - 1 at collapse with K = 1; Wang 2024."""
    return max(counts_E) / mean(counts_E) - 1


def coefficient_of_variation(counts_E):
    """Population standard deviation / mean."""
    centre = mean(counts_E)
    return math.sqrt(mean((value - centre) ** 2 for value in counts_E)) / centre


def load_entropy(counts_E):
    """-sum f log f in nats, f = c / sum c; log E at balance."""
    return -sum(
        value / sum(counts_E) * math.log(value / sum(counts_E)) for value in counts_E if value > 0
    )


def coactivation(experts_TK, num_experts):
    """[a, b] = how many tokens chose both a and b: symmetric, with the counts of experts on the
    diagonal.
    """
    together_EE = np.zeros((num_experts, num_experts))
    for experts_K in experts_TK:
        chosen = [e for e in experts_K if e >= 0]
        for a in chosen:
            for b in chosen:
                together_EE[a, b] += 1
    return together_EE


def churn(first_TK, second_TK):
    """Mean over real tokens of the fraction of the first's experts that the second does not choose,
    in any order.
    """
    changed = []
    for first_K, second_K in zip(first_TK, second_TK, strict=True):
        if first_K[0] >= 0:
            changed.append(mean(e not in list(second_K) for e in first_K))
    return mean(changed)


# Metrics of the router
# --------------------------------------------------------------------------------------------


def router_entropy(probs_TE, mask_T):
    """Mean over tokens of -sum_e p log p, in nats."""
    return mean(-sum(p * math.log(p) for p in probs_TE[t] if p > 0) for t in real_tokens(mask_T))


def top_prob(probs_TE, mask_T):
    """Mean over tokens of the largest p."""
    return mean(max(probs_TE[t]) for t in real_tokens(mask_T))


def margin(probs_TE, mask_T, top_k):
    """Mean over tokens of the K-th largest p minus the (K+1)-th, which is 0 if K = E."""
    return mean(
        largest(probs_TE[t], top_k) - largest([*probs_TE[t], 0.0], top_k + 1)
        for t in real_tokens(mask_T)
    )


def gate_mass(weights_TK, mask_T):
    """Mean over tokens of the sum of their weights."""
    return mean(sum(weights_TK[t]) for t in real_tokens(mask_T))
