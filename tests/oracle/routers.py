"""The truth for routers: float64 NumPy that loops over tokens and experts, written from the papers'
formulas.

Every router here takes logits (or a table, or positions) and says which experts each token visits,
with which weights. Noise is an argument, never drawn inside. Nothing in it is from `moejax`. Ties
always go to the lowest index.

Axis letters as in `moejax/moe/__init__.py`, and `G` groups of experts, `S` slots of soft experts.
"""

import dataclasses
import math

import numpy as np

from oracle import softmax


@dataclasses.dataclass(frozen=True)
class Routed:
    """Where the tokens go; a masked token has probabilities 0, experts -1 and weights 0."""

    probs_TE: np.ndarray
    experts_TK: np.ndarray
    weights_TK: np.ndarray


def route_each(mask_T, num_experts, top_k, route_token) -> Routed:
    """Collect `route_token(t) -> (probs_E, experts, weights)` over the real tokens."""
    num_tokens = len(mask_T)
    probs_TE, weights_TK = np.zeros((num_tokens, num_experts)), np.zeros((num_tokens, top_k))
    experts_TK = np.full((num_tokens, top_k), -1)
    for t in range(num_tokens):
        if mask_T[t]:
            probs_TE[t], experts_TK[t], weights_TK[t] = route_token(t)
    return Routed(probs_TE, experts_TK, weights_TK)


# One token
# --------------------------------------------------------------------------------------------------


def sigmoid(logit):
    """1 / (1 + exp(-l)) of one number, without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def scores_one(logits_E, score):
    """Scores s of one token: softmax(l); exp(l - max l) for a softmax after the selection;
    sigmoid(l) (DeepSeek-V3);
    sqrt(log(1 + exp l)) (DeepSeek-V4); or 1 for a router that does not ask its logits.
    """
    logits_E = np.asarray(logits_E, np.float64)
    if score == "softmax":
        return softmax(logits_E)
    if score == "softmax_after":
        return np.array([math.exp(logit - max(logits_E)) for logit in logits_E])
    if score == "sigmoid":
        return np.array([sigmoid(logit) for logit in logits_E])
    if score == "sqrt_softplus":
        return np.array([math.sqrt(np.logaddexp(0.0, logit)) for logit in logits_E])
    if score == "uniform":
        return np.ones(len(logits_E))
    raise ValueError(score)


def probs_one(logits_E, score):
    """p_e = s_e / sum_j s_j over all experts, selected or not."""
    scores_E = scores_one(logits_E, score)
    return scores_E / sum(scores_E)


def allowed_by_groups(
    values_E, num_groups, top_k_groups, group_score, blocked=frozenset(), top_k=0
):
    """Experts of the best groups. Groups are equal contiguous runs of experts; a group's score is
    its largest value
    (DeepSeek-V2, section 2.2.2) or the sum of its two largest (DeepSeek-V3; its paper sums the K/M
    largest, there 2).

    Blocked experts do as if they were not there; further groups are allowed until there are
    `top_k` experts.
    """
    size = len(values_E) // num_groups
    experts_of, scores = {}, {}
    for g in range(num_groups):
        experts_of[g] = {e for e in range(g * size, (g + 1) * size) if e not in blocked}
        best_first = sorted((values_E[e] for e in experts_of[g]), reverse=True)
        if best_first:
            scores[g] = {"top2_sum": sum(best_first[:2]), "max": best_first[0]}[group_score]
    allowed = set()
    for rank, g in enumerate(sorted(scores, key=lambda g: (-scores[g], g))):
        if rank < top_k_groups or len(allowed) < top_k:
            allowed |= experts_of[g]
    return allowed


def select_one(values_E, top_k, allowed=None):
    """The `top_k` allowed experts of largest value, best first, ties to the lowest index."""
    candidates = [e for e in range(len(values_E)) if allowed is None or e in allowed]
    return sorted(candidates, key=lambda e: (-float(values_E[e]), e))[:top_k]


def weigh_one(logits_E, experts, score, renormalize, scale=1.0, weight_norm=1.0, floor=0.0):
    """Weights of the selected: scale * s_e, or scale * s_e / (sum of s^p over the selected)^(1/p)
    with p = `weight_norm`, the root at least `floor`. The bias has no part in it.
    `softmax_after` is always a softmax over the selected logits, and `uniform` always 1/K.
    """
    scores_E = scores_one(logits_E, score)
    weights = [scores_E[e] for e in experts]
    if renormalize or score in ("softmax_after", "uniform"):
        p = 1.0 if score == "uniform" else weight_norm
        norm = max(sum(weight**p for weight in weights) ** (1 / p), floor)
        weights = [weight / norm for weight in weights]
    return [scale * weight for weight in weights]


# Token choice from logits
# -----------------------------------------------------------------------------------------


def route_scored(
    logits_TE,
    mask_T,
    *,
    top_k,
    score,
    renormalize,
    scale=1.0,
    bias_E=None,
    select_by="score",
    num_groups=1,
    top_k_groups=1,
    group_score="top2_sum",
    weight_norm=1.0,
    floor=0.0,
) -> Routed:
    """Top-K of s + b, or of l + b, within the best groups; weights from the unbiased s. Covers
    Switch, GShard, Mixtral,
    OLMoE, gpt-oss, DeepSeek-V2 and -V3. For `softmax_after` the values are l + b either way: its s
    has no fixed unit.
    """
    logits_TE = np.asarray(logits_TE, np.float64)
    num_experts = logits_TE.shape[1]
    bias_E = [0.0] * num_experts if bias_E is None else np.asarray(bias_E, np.float64)
    by_logits = select_by == "logits" or score == "softmax_after"

    def route_token(t):
        unbiased_E = logits_TE[t] if by_logits else scores_one(logits_TE[t], score)
        values_E = [unbiased_E[e] + bias_E[e] for e in range(num_experts)]
        allowed = allowed_by_groups(values_E, num_groups, top_k_groups, group_score)
        experts = select_one(values_E, top_k, allowed)
        return (
            probs_one(logits_TE[t], score),
            experts,
            weigh_one(logits_TE[t], experts, score, renormalize, scale, weight_norm, floor),
        )

    return route_each(mask_T, num_experts, top_k, route_token)


def noise_sigma(raw_TE, floor=1e-2):
    """sigma = log(1 + exp(x W_noise)) + floor, raw = x W_noise; Shazeer 2017, eq. 4; the floor is
    Tensor2Tensor's.
    """
    return np.array(
        [
            [np.logaddexp(0.0, raw) + floor for raw in raw_E]
            for raw_E in np.asarray(raw_TE, np.float64)
        ]
    )


def route_noisy(clean_TE, noisy_TE, mask_T, **how) -> Routed:
    """Noisy top-K: selection and weights from h = l + n * sigma (Shazeer 2017, eqs. 3 to 5),
    probabilities from l.
    """
    noisy = route_scored(noisy_TE, mask_T, **how)
    return dataclasses.replace(noisy, probs_TE=route_scored(clean_TE, mask_T, **how).probs_TE)


def route_quantile(logits_TE, mask_T, beta_E, **how) -> Routed:
    """Quantile balancing: top-K of l - beta; weights as without it."""
    return route_scored(
        logits_TE, mask_T, bias_E=[-beta for beta in beta_E], select_by="logits", **how
    )


def cosine_logits(x_TD, down_DR, vectors_ER, temperature):
    """l_e = cos(x P, v_e) / temperature; X-MoE, Chi 2022, section 3. A zero vector has cosine 0
    with everything.
    """
    x_TD, down_DR, vectors_ER = (np.asarray(a, np.float64) for a in (x_TD, down_DR, vectors_ER))
    logits_TE = np.zeros((len(x_TD), len(vectors_ER)))
    for t, x_D in enumerate(x_TD):
        for e, vector_R in enumerate(vectors_ER):
            logits_TE[t, e] = unit(x_D @ down_DR) @ unit(vector_R) / temperature
    return logits_TE


def unit(vector):
    """v / |v|, and 0 for 0."""
    norm = math.sqrt(sum(value**2 for value in vector))
    return vector / norm if norm > 0 else np.zeros_like(vector)


# Token choice without learning
# ------------------------------------------------------------------------------------


def route_hash(
    table_VK,
    tokens_T,
    mask_T,
    logits_TE=None,
    score="uniform",
    renormalize=True,
    scale=1.0,
    num_experts=None,
) -> Routed:
    """Token id -> the table's experts, in the table's order. Weights 1/K (Hash Layers, Roller
    2021), or the scores of
    the logits at these experts (hash layers of DeepSeek-V4). Without logits all are 0, so the
    probabilities are 1/E.
    """
    table_VK = np.asarray(table_VK)
    if logits_TE is None:
        logits_TE = np.zeros((len(tokens_T), num_experts or int(table_VK.max()) + 1))

    def route_token(t):
        experts = list(table_VK[tokens_T[t]])
        return (
            probs_one(logits_TE[t], score),
            experts,
            weigh_one(logits_TE[t], experts, score, renormalize, scale),
        )

    return route_each(mask_T, len(logits_TE[0]), table_VK.shape[1], route_token)


def route_balanced(positions_T, mask_T, top_k, num_experts) -> Routed:
    """Position p takes the experts (p K + k) mod E with weight 1/K: perfectly balanced over E
    positions.
    """

    def route_token(t):
        experts = [(int(positions_T[t]) * top_k + k) % num_experts for k in range(top_k)]
        return [1 / num_experts] * num_experts, experts, [1 / top_k] * top_k

    return route_each(mask_T, num_experts, top_k, route_token)


# Two levels
# --------------------------------------------------------------------------------------------------


def route_hierarchical(
    group_logits_TG,
    logits_TE,
    mask_T,
    *,
    top_k_groups,
    per_group,
    scale=1.0,
    clean_group_logits_TG=None,
    clean_logits_TE=None,
) -> Routed:
    """Shazeer 2017, appendix B: the gate of an expert is softmax over the kept groups times softmax
    over the kept
    experts of its group, both of (noisy) logits. Experts come group by group, best first.
    Probabilities are the same product without selection, from the clean logits (the given ones
    where there are none).
    """
    num_experts, num_groups = np.shape(logits_TE)[1], np.shape(group_logits_TG)[1]
    size = num_experts // num_groups
    clean_group_logits_TG = (
        group_logits_TG if clean_group_logits_TG is None else clean_group_logits_TG
    )
    clean_logits_TE = logits_TE if clean_logits_TE is None else clean_logits_TE

    def route_token(t):
        experts, weights = [], []
        groups = select_one(group_logits_TG[t], top_k_groups)
        for g, gate in zip(groups, softmax([group_logits_TG[t][g] for g in groups]), strict=True):
            within = select_one(logits_TE[t], per_group, set(range(g * size, (g + 1) * size)))
            experts += within
            weights += [
                scale * gate * inner for inner in softmax([logits_TE[t][e] for e in within])
            ]
        probs_E = []
        for g, prob in enumerate(softmax(clean_group_logits_TG[t])):
            probs_E += [
                prob * inner for inner in softmax(clean_logits_TE[t][g * size : (g + 1) * size])
            ]
        return probs_E, experts, weights

    return route_each(mask_T, num_experts, top_k_groups * per_group, route_token)


# Balanced by transport
# --------------------------------------------------------------------------------------------


def sinkhorn_plan(logits_LE, mask_L, iterations):
    """Start at exp(l) of the real tokens; in each iteration scale the columns to sum to (real
    tokens) / E, then the
    rows to sum to 1. Clark 2022 (S-BASE); rows of padding are 0. Common factors cancel.
    """
    num_experts, real = np.shape(logits_LE)[1], [t for t in range(len(mask_L)) if mask_L[t]]
    plan_LE = np.zeros(np.shape(logits_LE))
    for t in real:
        for e in range(num_experts):
            plan_LE[t, e] = math.exp(logits_LE[t][e] - max(max(logits_LE[r]) for r in real))
    for _ in range(iterations if real else 0):
        for e in range(num_experts):
            plan_LE[:, e] *= len(real) / num_experts / sum(plan_LE[:, e])
        for t in real:
            plan_LE[t] /= sum(plan_LE[t])
    return plan_LE


def route_sinkhorn(
    logits_TE, mask_T, *, length, top_k, iterations, training, score, renormalize, scale=1.0
) -> Routed:
    """Top-K of each sequence's transport plan in training, of the logits in evaluation; weights
    from the logits. The
    tokens are sequences of `length`. The source weighs by softmax for K > 1 and by
    sigmoid for K = 1.
    """
    values_TE = np.array(logits_TE, np.float64)
    for start in range(0, len(mask_T) if training else 0, length):
        here = slice(start, start + length)
        values_TE[here] = sinkhorn_plan(logits_TE[here], mask_T[here], iterations)

    def route_token(t):
        experts = select_one(values_TE[t], top_k)
        return (
            probs_one(logits_TE[t], score),
            experts,
            weigh_one(logits_TE[t], experts, score, renormalize, scale),
        )

    return route_each(mask_T, values_TE.shape[1], top_k, route_token)


# SparseMixer
# --------------------------------------------------------------------------------------------------


def sparse_mixer_support(logits_E, chosen, threshold):
    """Probability of each expert at the next choice: softmax over the experts still in, 0 for the
    others (Liu 2024,
    GRIN, as in Phi-3.5-MoE). With `best` the largest logit of those not chosen yet, an expert is
    out if chosen already or if (best - l) / max(|l|, best) > 2 * threshold; 0/0 is in. Training
    samples; evaluation takes the largest.
    """
    rest = [e for e in range(len(logits_E)) if e not in chosen]
    best = max(float(logits_E[e]) for e in rest)
    support = []
    for e in rest:
        gap, factor = best - float(logits_E[e]), max(abs(float(logits_E[e])), best)
        if factor == 0 or gap / factor <= 2 * threshold:  # a factor of 0 means l = best = 0
            support.append(e)
    probs_E = np.zeros(len(logits_E))
    for e, prob in zip(support, softmax([logits_E[e] for e in support]), strict=True):
        probs_E[e] = prob
    return probs_E


def sparse_mixer_one(logits_E, top_k, threshold):
    """Evaluation: K times the best of the experts left; its weight is its probability in the
    support at that choice.
    """
    experts, weights = [], []
    for _ in range(top_k):
        probs_E = sparse_mixer_support(logits_E, experts, threshold)
        experts.append(select_one(logits_E, 1, set(range(len(logits_E))) - set(experts))[0])
        weights.append(probs_E[experts[-1]])
    return experts, weights


def sparse_mixer_sequence_probability(logits_E, experts, threshold):
    """Probability that training samples exactly these experts in this order: the product over its
    choices.
    """
    return math.prod(
        sparse_mixer_support(logits_E, experts[:k], threshold)[e] for k, e in enumerate(experts)
    )


def sparse_mixer_factors(is_best):
    """Training multiplies the weight by a random factor: {factor: probability}. 1 for the best
    expert of the choice;
    for another 1 with probability 1/4, else 1/3 (Heun's third-order rule: the slope at 1/3
    counts 3/4).
    """
    return {1.0: 1.0} if is_best else {1.0: 0.25, 1 / 3: 0.75}


def route_sparse_mixer(logits_TE, mask_T, *, top_k, threshold) -> Routed:
    """`sparse_mixer_one` for every real token; probabilities are the softmax over all experts."""
    return route_each(
        mask_T,
        np.shape(logits_TE)[1],
        top_k,
        lambda t: (softmax(logits_TE[t]), *sparse_mixer_one(logits_TE[t], top_k, threshold)),
    )


# Experts choose, or everything is soft
# ----------------------------------------------------------------------------


def route_expert_choice(logits_BLE, mask_BL, slots, scale=1.0):
    """weights_BLE: in each sequence each expert takes the `slots` real tokens of highest p (softmax
    over experts), with
    weight scale * p, not renormalised; all of them if there are fewer. Zhou 2022, section 3.2,
    per sequence.
    """
    weights_BLE = np.zeros(np.shape(logits_BLE))
    for b, logits_LE in enumerate(logits_BLE):
        probs_LE = np.array([softmax(logits_E) for logits_E in logits_LE])
        for e in range(probs_LE.shape[1]):
            real = {t for t in range(len(probs_LE)) if mask_BL[b][t]}
            for t in select_one(probs_LE[:, e], slots, real):
                weights_BLE[b, t, e] = scale * probs_LE[t, e]
    return weights_BLE


def soft_logits(x_BLD, slots_DS, scale):
    """scale * (x / |x|) . (phi_s / |phi_s|); Puigcerver 2023, section 2.3 and appendix on
    normalisation.
    """
    x_BLD, slots_DS = np.asarray(x_BLD, np.float64), np.asarray(slots_DS, np.float64)
    logits_BLS = np.zeros((*x_BLD.shape[:2], slots_DS.shape[1]))
    for b, t, s in np.ndindex(logits_BLS.shape):
        logits_BLS[b, t, s] = scale * unit(x_BLD[b, t]) @ unit(slots_DS[:, s])
    return logits_BLS


def soft_moe(logits_BLS, mask_BL):
    """(dispatch_BLS, combine_BLS): softmax over a sequence's real tokens for each slot, and softmax
    over all slots for
    each token; both 0 at padding. Puigcerver 2023, eqs. 1 and 2.
    """
    logits_BLS = np.asarray(logits_BLS, np.float64)
    dispatch_BLS, combine_BLS = np.zeros(logits_BLS.shape), np.zeros(logits_BLS.shape)
    for b in range(len(logits_BLS)):
        real = [t for t in range(logits_BLS.shape[1]) if mask_BL[b][t]]
        for s in range(logits_BLS.shape[2] if real else 0):
            for t, share in zip(real, softmax([logits_BLS[b, t, s] for t in real]), strict=True):
                dispatch_BLS[b, t, s] = share
        for t in real:
            combine_BLS[b, t] = softmax(logits_BLS[b, t])
    return dispatch_BLS, combine_BLS


# State
# --------------------------------------------------------------------------------------------------


def bias_update(bias_E, counts_E, rate, centered):
    """b_e + rate * sign(mean c - c_e), then minus its mean if centered; DeepSeek-V3, section 2.1.2,
    Wang 2024.
    """
    mean = sum(counts_E) / len(counts_E)
    moved_E = [
        bias + rate * ((mean > count) - (mean < count))
        for bias, count in zip(bias_E, counts_E, strict=True)
    ]
    shift = sum(moved_E) / len(moved_E) if centered else 0.0
    return np.array([bias - shift for bias in moved_E])


def quantile_update(beta_E, logits_TE, mask_T, top_k):
    """One step of quantile balancing (Su 2026). alpha_t = (K+1)-th largest of l_t - beta; beta_e =
    the
    (floor(TK/E) + 1)-th largest over the T real tokens of l_te - alpha_t; minus the mean. No
    token, no change.
    """
    num_experts, real = len(beta_E), [t for t in range(len(mask_T)) if mask_T[t]]
    if not real:
        return np.array(beta_E, np.float64)
    alpha = {
        t: largest([logits_TE[t][e] - beta_E[e] for e in range(num_experts)], top_k + 1)
        for t in real
    }
    rank = min(len(real) * top_k // num_experts + 1, len(real))
    new_E = [largest([logits_TE[t][e] - alpha[t] for t in real], rank) for e in range(num_experts)]
    return np.array([beta - sum(new_E) / num_experts for beta in new_E])


def largest(values, rank):
    """The `rank`-th largest of the values, counted from 1."""
    return float(sorted(values, reverse=True)[rank - 1])
