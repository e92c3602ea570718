"""Portraits, saturation, flow and similarity of experts, against loops and hand-worked cases."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.inspection.analysis.expert_profile import (
    ProfileError,
    by_weight,
    coactivation_shares,
    domain_specialisation,
    vocabulary_specialisation,
)
from moejax.inspection.analysis.expert_similarity import (
    linear_cka,
    output_cosine,
    unit_similarity,
    weight_cosine,
)
from moejax.inspection.analysis.saturation import router_saturation
from moejax.inspection.analysis.token_flow import token_flow
from moejax.moe.router.by_token import coactivation

N, T, K, V, E, D = 3, 400, 2, 20, 5, 4


def routing(seed=0):
    """Tokens, domains and distinct experts of each token; not uniform.

    Some tokens have fewer than K experts.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, T)
    domains = rng.integers(-1, D - 1, T)  # -1 is unknown; the last domain has no token
    scores = rng.random((N, T, E)) + 0.8 * (np.arange(E) == tokens[:, None] % E)
    experts = np.argsort(-scores, axis=-1)[..., :K]
    experts[..., 1] = np.where(rng.random((N, T)) < 0.2, E, experts[..., 1])
    experts[:, rng.random(T) < 0.1] = E
    return tokens, domains, experts


def test_experts_are_sorted_by_weight_with_none_last():
    experts, weights = (
        np.array([[[3, 0, 1]], [[3, 3, 2]]]),
        np.array([[[0.0, 0.2, 0.5]], [[0.0, 0.0, 1.0]]]),
    )
    assert by_weight(experts, weights).tolist() == [[[1, 0, 3]], [[2, 3, 3]]]


def test_vocabulary_specialisation_equals_counting_in_a_loop():
    tokens, _, experts = routing()
    tokens[:30] = -1  # left out
    found = vocabulary_specialisation(tokens, experts, V, E, min_count=17)
    for n in range(N):
        shares = {}
        for v in range(V):
            of_token = [
                experts[n, t, 0] for t in range(T) if tokens[t] == v and experts[n, t, 0] < E
            ]
            counts = [of_token.count(e) for e in range(E)]
            if len(of_token) < 17:
                assert math.isnan(found.share_NV[n, v])
                assert found.expert_NV[n, v] == E
                continue
            shares[v] = max(counts) / len(of_token)
            assert found.share_NV[n, v] == shares[v]
            assert found.expert_NV[n, v] == counts.index(max(counts))
        assert 5 < len(shares) < V
        assert found.mean_N[n] == pytest.approx(np.mean(list(shares.values())))
        for e in range(E):
            of_expert = [share for v, share in shares.items() if found.expert_NV[n, v] == e]
            assert found.mean_NE[n, e] == pytest.approx(
                np.mean(of_expert) if of_expert else math.nan, nan_ok=True
            )


def test_chance_keeps_loads_and_exceeds_them_for_rare_tokens():
    # 400 tokens of the vocabulary seen 10 times each, at random, half of them at expert 0: the
    # largest of the shares of two experts is on average 1/2 + E|X - 5| / 10 for X ~ Binomial(10,
    # 1/2), which is 1/2 + 1.2305 / 10 = 0.623.
    rng = np.random.default_rng(1)
    tokens = np.repeat(np.arange(400), 10)
    experts = rng.integers(0, 2, (1, 4000, 1))
    found = vocabulary_specialisation(tokens, experts, 400, 2)
    assert found.chance_N == pytest.approx(0.623, abs=0.02)
    assert found.mean_N == pytest.approx(found.chance_N, abs=0.03)
    decided = vocabulary_specialisation(tokens, (tokens % 2)[None, :, None], 400, 2)
    assert decided.mean_N == 1
    assert decided.chance_N == pytest.approx(0.623, abs=0.02)
    assert decided.mean_NE.tolist() == [[1, 1]]


def test_chance_is_known_where_some_tokens_have_no_expert():
    rng = np.random.default_rng(2)
    tokens = np.repeat(np.arange(60), 12)
    experts = rng.integers(0, 2, (1, 720, 1))
    experts[0, rng.random(720) < 0.15] = 2
    found = vocabulary_specialisation(tokens, experts, 60, 2)
    assert found.chance_N == pytest.approx(found.mean_N, abs=0.06)


def test_no_token_is_often_enough_to_be_special():
    found = vocabulary_specialisation(np.array([0, 1]), np.zeros((1, 2, 1), int), 2, 3)
    assert np.isnan(found.mean_N).all()
    assert np.isnan(found.chance_N).all()
    assert np.isnan(found.mean_NE).all()


def test_domain_specialisation_equals_counting_in_a_loop():
    _, domains, experts = routing()
    found = domain_specialisation(domains, experts, D, E)
    for n in range(N):
        for d in range(D - 1):
            here = [t for t in range(T) if domains[t] == d]
            assert found.tokens_D[d] == len(here)
            for e in range(E):
                assert found.share_NDE[n, d, e] == sum(e in experts[n, t] for t in here) / len(here)
        known = [t for t in range(T) if domains[t] >= 0]
        visits = [sum(e < E for e in experts[n, t]) for t in known]
        assert found.uniform_N[n] == pytest.approx(np.mean(visits) / E)
        assert found.overall_NE[n, 2] == pytest.approx(
            sum(2 in experts[n, t] for t in known) / len(known)
        )
    assert found.tokens_D[-1] == 0
    assert np.isnan(found.share_NDE[:, -1]).all()


def test_coactivation_shares_are_of_the_row_s_tokens():
    _, _, experts = routing()
    experts[0][experts[0] == 4] = E  # an expert without tokens
    shares = coactivation_shares(np.asarray(coactivation(jnp.asarray(experts), E)))
    for n in range(N):
        for i in range(E):
            mine = [t for t in range(T) if i in experts[n, t]]
            for j in range(E):
                expected = sum(j in experts[n, t] for t in mine) / len(mine) if mine else math.nan
                assert shares[n, i, j] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(shares[0, 4]).all()
    assert not np.isnan(shares[1]).any()


# Saturation
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, None])
def test_saturation_equals_intersections_of_sets(k):
    checkpoints = [routing(seed)[2] for seed in range(3)]
    checkpoints[0] = np.concatenate([checkpoints[0], np.full((N, T, 1), E)], axis=2)  # another K
    found = router_saturation(checkpoints, E, k)
    for s, early in enumerate(checkpoints):
        for n in range(N):
            shares = []
            for t in range(T):
                last = set(checkpoints[-1][n, t, :k].tolist()) - {E}
                if last:
                    shares.append(len(last & set(early[n, t, :k].tolist())) / len(last))
            assert found[s, n] == pytest.approx(np.mean(shares))
    assert np.all(found[-1] == 1)
    assert np.all(found[:-1] < 0.9)


def test_saturation_of_a_layer_without_choices_is_unknown():
    assert np.isnan(router_saturation([np.full((1, 4, 2), E)], E)).all()


def test_checkpoints_that_do_not_match_are_refused():
    with pytest.raises(ProfileError, match="at least one checkpoint"):
        router_saturation([], E)
    with pytest.raises(ProfileError, match=r"\[\(1, 3\), \(1, 4\)\]"):
        router_saturation([np.zeros((1, 4, 2), int), np.zeros((1, 3, 2), int)], E)


# Flow
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, None])
def test_flow_equals_counting_in_a_loop(k):
    _, _, experts = routing()
    found = token_flow(experts, E, k)
    assert found.counts_MEE.shape == (N - 1, E, E)
    for m in range(N - 1):
        expected = np.zeros((E, E), int)
        for t in range(T):
            for i in experts[m, t, :k]:
                for j in experts[m + 1, t, :k]:
                    if i < E and j < E:
                        expected[i, j] += 1
        np.testing.assert_array_equal(found.counts_MEE[m], expected)


def test_expected_flow_is_that_of_independent_layers():
    # Four tokens 0 -> 0, 0 -> 1, 0 -> 1, 1 -> 1. Rows 3 and 1, columns 1 and 3, of 4:
    # expected 3 * 1 / 4, 3 * 3 / 4; 1 * 1 / 4, 1 * 3 / 4.
    found = token_flow(np.array([[[0], [0], [0], [1]], [[0], [1], [1], [1]]]), 2)
    assert found.counts_MEE.tolist() == [[[1, 2], [0, 1]]]
    assert found.expected_MEE.tolist() == [[[0.75, 2.25], [0.25, 0.75]]]
    assert token_flow(np.full((2, 3, 1), 2), 2).expected_MEE.sum() == 0
    assert token_flow(np.zeros((1, 3, 1), int), 2).counts_MEE.shape == (0, 2, 2)


# Similarity
# -----------------------------------------------------------------------------


def test_cosines_of_weights_are_those_of_flattened_arrays():
    weights = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    weights[0, 2] = -3 * weights[0, 0]
    weights[1, 1] = 0
    found = weight_cosine(weights)
    assert found[0, 0, 2] == pytest.approx(-1)
    assert found[0, 1, 1] == pytest.approx(1)
    dot = float((weights[0, 0] * weights[0, 1]).sum())
    assert found[0, 0, 1] == pytest.approx(
        dot / math.sqrt(float((weights[0, 0] ** 2).sum() * (weights[0, 1] ** 2).sum())), rel=1e-5
    )
    assert np.all(found[1, 1] == 0)


def test_unit_similarity_forgets_order_and_sign_of_hidden_units():
    rng = np.random.default_rng(0)
    units = rng.normal(size=(1, 3, 12, 30))
    units[0, 1] = 2 * units[0, 0][rng.permutation(12)] * rng.choice([-1, 1], (12, 1))
    found = unit_similarity(units)
    assert found[0, 0, 1] == pytest.approx(1)
    crossed, own = (np.linalg.norm(units[0, 0] @ units[0, i].T) ** 2 for i in (2, 0))
    expected = np.linalg.norm(units[0, 0] @ units[0, 2].T) ** 2 / (
        np.linalg.norm(units[0, 0] @ units[0, 0].T) * np.linalg.norm(units[0, 2] @ units[0, 2].T)
    )
    assert found[0, 0, 2] == pytest.approx(expected)
    assert crossed < own
    assert found[0, 0, 2] == pytest.approx(12 / (30 + 12), abs=0.08)
    assert abs(weight_cosine(units)[0, 0, 1]) < 0.3


def test_cosine_of_outputs_is_a_mean_over_inputs():
    # Inputs 0 and 1 by expert: (1, 0) and (0, 2); (1, 0) and (0, -1); 0 and (0, 1).
    outputs = np.array([[[1, 0], [0, 2]], [[1, 0], [0, -1]], [[0, 0], [0, 1]]], np.float32)
    assert output_cosine(outputs).tolist() == [[1, 0, 0.5], [0, 1, -0.5], [0.5, -0.5, 0.5]]


def unbiased_hsic(k, m):
    """Song et al. 2012, equation 5, of Gram matrices."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    return (
        np.trace(k @ m)
        + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (ones @ k @ m @ ones)
    ) / (n * (n - 3))


def test_linear_cka_is_the_ratio_of_unbiased_estimates():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(3, 20, 6)) + rng.normal(size=(3, 1, 6))
    outputs[1] += outputs[0]
    found = linear_cka(outputs)
    for i in range(3):
        for j in range(3):
            a, b = outputs[i] @ outputs[i].T, outputs[j] @ outputs[j].T
            expected = unbiased_hsic(a, b) / math.sqrt(unbiased_hsic(a, a) * unbiased_hsic(b, b))
            assert found[i, j] == pytest.approx(expected)


def test_linear_cka_is_1_for_a_rotated_expert_and_about_0_for_unrelated_ones():
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    first, other = rng.normal(size=(2, 37, 64))  # fewer inputs than dimensions
    constant = np.broadcast_to(rng.normal(size=64), (37, 64))
    outputs = np.stack([first, 3 * first @ rotation + 1, other, constant])
    found = linear_cka(outputs.astype(np.float32))
    assert found[0, 1] == pytest.approx(1, abs=1e-5)
    assert abs(found[0, 2]) < 0.1
    assert np.all(found[3] == 0)
    found = linear_cka(np.stack([first, constant]))  # float64, where the mean is rounded
    assert np.all(found[1] == 0)
    with pytest.raises(ProfileError, match="3 tokens and needs at least 4"):
        linear_cka(np.zeros((2, 3, 5)))
