"""Specialisation: counts against a loop, and a ranking that finds planted tokens only."""

import math

import numpy as np
import pytest

from moejax.inspection.analysis.specialisation import (
    count_tokens_by_expert,
    over_represented_tokens,
)


def test_counts_equal_those_of_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    N, T, K, E, V = 3, 200, 2, 5, 11
    tokens, experts, mask = (
        rng.integers(0, V, T),
        rng.integers(0, E, (N, T, K)),
        rng.random(T) < 0.7,
    )
    expected = np.zeros((N, E, V), np.int64)
    for n in range(N):
        for t in range(T):
            for k in range(K):
                expected[n, experts[n, t, k], tokens[t]] += mask[t]
    counts = count_tokens_by_expert(tokens, experts, V, E, mask)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.int64
    assert counts.sum() == N * K * mask.sum()


def test_padding_may_hold_any_id():
    counts = count_tokens_by_expert(
        np.array([1, -1]),
        np.array([[[0], [99]]]),
        vocab_size=3,
        num_experts=2,
        mask_T=np.array([True, False]),
    )
    assert counts.tolist() == [[[0, 1, 0], [0, 0, 0]]]


def test_a_batch_of_padding_counts_nothing():
    counts = count_tokens_by_expert(
        np.zeros(4, int), np.zeros((2, 4, 1), int), 3, 2, np.zeros(4, bool)
    )
    assert counts.shape == (2, 2, 3)
    assert counts.sum() == 0


def test_ids_outside_their_range_are_refused():
    experts, mask = np.zeros((1, 2, 1), int), np.ones(2, bool)
    with pytest.raises(
        ValueError, match=r"tokens_T has values from 0 to 3; they must be in \[0, 3\)"
    ):
        count_tokens_by_expert(np.array([0, 3]), experts, 3, 2, mask)
    with pytest.raises(ValueError, match=r"experts_NTK has values from -1 to -1"):
        count_tokens_by_expert(np.array([0, 1]), experts - 1, 3, 2, mask)


def test_the_ratio_is_that_of_a_hand_worked_example():
    # Expert 0 gets 300 of 400 assignments. Of the 100 assignments of token 2 it gets 25: expected
    # are 75 for it, 25 for expert 1. So expert 1's 75 are 3 times its share. Token 1: 200 of 200 at
    # expert 0, expected 150, ratio 4/3.
    counts = np.array([[[75, 200, 25], [25, 0, 75]]])
    first, second = over_represented_tokens(counts)[0]
    assert [(t.token, t.num_assignments) for t in first] == [(1, 200)]
    assert first[0].ratio == pytest.approx(4 / 3)
    assert second == [(2, 75, pytest.approx(0.75), pytest.approx(3.0))]


def test_the_rank_is_the_signed_root_of_the_log_likelihood_ratio():
    # z = sqrt(2 n KL(c/n || q)) by hand, for tokens of one expert of two with q close to 1/2.
    seen = np.array([100, 1000, 40, 100_000])
    counts = np.array([[[80, 620, 40, 50_000], [20, 380, 0, 50_000]]])
    q = counts[0, 0].sum() / counts.sum()

    def z(c, n):
        rest = (1 - c / n) * math.log((1 - c / n) / (1 - q)) if c < n else 0.0
        return math.sqrt(2 * n * (c / n * math.log(c / n / q) + rest))

    expected = sorted(range(3), key=lambda v: -z(counts[0, 0, v], seen[v]))
    assert [t.token for t in over_represented_tokens(counts)[0][0]] == expected


def test_routing_that_ignores_identity_shows_nothing():
    rng = np.random.default_rng(1)
    frequency = 1 / np.arange(1, 2001)
    tokens = rng.choice(2000, 100_000, p=frequency / frequency.sum())
    shares = np.array([0.4, 0.3, 0.2, 0.1])  # an unequal load is no specialisation
    experts = rng.choice(4, (2, 100_000, 1), p=shares)
    counts = count_tokens_by_expert(tokens, experts, 2000, 4, np.ones(100_000, bool))
    assert sum(len(tokens) for layer in over_represented_tokens(counts) for tokens in layer) <= 1


def test_planted_tokens_are_found_and_rare_ones_do_not_lead():
    rng = np.random.default_rng(2)
    counts = rng.poisson(200, (1, 4, 50))
    counts[0, :, 7] = 0, 0, 2000, 0  # frequent and entirely at expert 2
    counts[0, :, 8] = 300, 300, 900, 300  # frequent, three times the others
    counts[0, :, 9] = 0, 0, 21, 0  # rare, entirely at expert 2
    counts[0, :, 10] = 0, 0, 19, 0  # below min_count
    ranked = [t.token for t in over_represented_tokens(counts)[0][2]]
    assert ranked == [7, 8, 9]
    assert [t.token for t in over_represented_tokens(counts, top=2)[0][2]] == [7, 8]
    assert 10 in [t.token for t in over_represented_tokens(counts, min_count=10)[0][2]]


def test_a_layer_without_tokens_and_an_expert_without_load_list_nothing():
    counts = np.zeros((2, 3, 5), np.int64)
    counts[1, 0] = 100
    assert over_represented_tokens(counts) == [[[], [], []], [[], [], []]]
