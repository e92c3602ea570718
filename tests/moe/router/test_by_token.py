"""Token-level routing in one form, co-activation and churn, against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.router.by_token import (
    choices_by_token,
    churn,
    coactivation,
    experts_by_token,
    scores_by_token,
)
from moejax.moe.router.routing import Routing, SlotRouting, SoftRouting
from oracle import losses as oracle_losses

N, T, K, E = 2, 12, 2, 5


def draw(seed):
    rng = np.random.default_rng(seed)
    experts_NTK = np.array([[rng.permutation(E)[:K] for _ in range(T)] for _ in range(N)], np.int32)
    experts_NTK[:, 3] = E  # padding
    return experts_NTK


def in_oracle(experts_TK):
    return np.where(experts_TK == E, -1, experts_TK)


def test_coactivation_counts_pairs_as_a_loop_does():
    experts_NTK = draw(0)
    expected = [oracle_losses.coactivation(in_oracle(experts_TK), E) for experts_TK in experts_NTK]
    found_NEE = np.asarray(coactivation(jnp.asarray(experts_NTK), E))
    assert found_NEE.dtype == np.int32
    np.testing.assert_array_equal(found_NEE, expected)


def test_churn_is_the_fraction_of_experts_that_a_token_no_longer_visits():
    before_NTK, after_NTK = draw(0), draw(1)
    expected = [
        oracle_losses.churn(in_oracle(a), in_oracle(b))
        for a, b in zip(before_NTK, after_NTK, strict=True)
    ]
    np.testing.assert_allclose(
        churn(jnp.asarray(before_NTK), jnp.asarray(after_NTK), E), expected, rtol=1e-6
    )
    assert not np.any(churn(jnp.asarray(before_NTK), jnp.asarray(before_NTK[..., ::-1]), E))
    assert not np.any(
        churn(jnp.full((N, T, K), E), jnp.asarray(after_NTK), E)
    )  # no token visited an expert
    # A token that visits one expert and stays with it, and one that loses one of two: mean of
    # 0 and 1/2.
    before_NTK, after_NTK = jnp.array([[[2, E, E], [0, 1, E]]]), jnp.array([[[1, 2, 4], [1, 3, E]]])
    np.testing.assert_allclose(churn(before_NTK, after_NTK, E), [0.25])


def test_choices_of_experts_become_those_of_tokens_and_runs_of_different_widths_join():
    chosen = draw(0)
    zeros = jnp.zeros(1)
    shares = np.where(chosen < E, np.random.default_rng(2).random((N, T, K)), 0).astype(np.float32)
    routing = Routing(zeros, zeros, jnp.asarray(chosen), jnp.asarray(shares), zeros, zeros, zeros)
    # One layer, two rows of six; each expert has two slots; expert 2 takes positions 0 and 5 of the
    # first row.
    positions, weights = np.full((1, 2, E, 2), T // 2, np.int32), np.zeros((1, 2, E, 2), np.float32)
    positions[0, 0, 2], positions[0, 0, 4, 0], positions[0, 1, 2, 1] = (0, 5), 5, 3
    weights[0, 0, 2], weights[0, 0, 4, 0], weights[0, 1, 2, 1] = (0.5, 0.25), 0.75, 0.125
    slots = SlotRouting(jnp.zeros((1, T, E)), zeros, jnp.asarray(positions), jnp.asarray(weights))
    soft = SoftRouting(jnp.zeros((1, 2, T // 2, 6)), zeros, zeros)
    found, counting = (np.asarray(x) for x in choices_by_token([routing, slots, soft], E))
    np.testing.assert_array_equal(experts_by_token([routing, slots, soft], E), found)
    assert found.shape == (N + 2, T, E)
    np.testing.assert_array_equal(found[:N, :, :K], chosen)
    assert np.all(found[:N, :, K:] == E) and np.all(found[-1] == E)
    visits = [{int(e) for e in row if e < E} for row in found[N]]
    assert visits == [{2}, set(), set(), set(), set(), {2, 4}] + [set()] * 3 + [{2}, set(), set()]
    np.testing.assert_array_equal(counting[:N, :, :K], shares)
    assert not counting[found == E].any()
    assert found[N, 5].tolist() == [4, 2, E, E, E]  # the best first
    assert (
        counting[N, 5].tolist() == [0.75, 0.25, 0, 0, 0]
        and counting[N, 0, 0] == 0.5
        and counting[N, 9, 0] == 0.125
    )


def test_scores_of_soft_routing_are_those_of_experts_whatever_their_slots():
    rng = np.random.default_rng(0)
    logits_BLS = rng.normal(size=(1, 2, T // 2, 2 * E)).astype(
        np.float32
    )  # one layer, two slots of each expert
    combine_BLS = np.exp(logits_BLS) / np.exp(logits_BLS).sum(axis=-1, keepdims=True)
    soft = SoftRouting(jnp.asarray(logits_BLS), jnp.zeros(1), jnp.asarray(combine_BLS))
    topk = Routing(*(jnp.asarray(rng.normal(size=(N, T, E)).astype(np.float32)) for _ in range(7)))
    logits_NTE, probs_NTE = scores_by_token([topk, soft], E)
    np.testing.assert_array_equal(logits_NTE[:N], topk.logits_TE)
    np.testing.assert_array_equal(probs_NTE[:N], topk.probs_TE)
    expected_TE = combine_BLS.reshape(T, E, 2).sum(axis=-1)
    np.testing.assert_allclose(probs_NTE[N], expected_TE, rtol=1e-6)
    odds_TE = np.exp(np.asarray(logits_NTE[N]))
    np.testing.assert_allclose(
        odds_TE / odds_TE.sum(axis=-1, keepdims=True), expected_TE, rtol=1e-5
    )


@pytest.mark.parametrize("num_choices", [E, E + 3])
def test_zero_computation_experts_are_experts_too(num_choices):
    experts_NTK = jnp.full((1, 4, 2), E + 1 if num_choices > E else E, jnp.int32)
    assert coactivation(experts_NTK, num_choices).sum() == (0 if num_choices == E else 4 * 2 * 2)
