"""Every router against loops over tokens, with ties, padding, biases, groups and noise."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from moejax.config import MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.moe.balancing.state import update_bias, update_quantiles
from moejax.moe.balancing.sums import (
    count_ties,
    expected_load,
    expected_load_vmoe,
    quantile_margins,
)
from moejax.moe.router import RouterInputs, route, route_expert_choice, route_soft
from moejax.moe.router.fixed import route_random
from moejax.moe.router.modules import MIN_NOISE
from moejax.moe.router.routing import Stream
from moejax.moe.router.routing import draw as draw_numbers
from moejax.moe.router.sparse_mixer import route_sparse_mixer
from oracle import losses as oracle_losses
from oracle import routers as truth

B, L, E = 3, 5, 8
T = B * L


def config_of(**changes):
    return derive_moe(MoeConfig(num_experts=E, d_expert=8, allow_noncausal=True, **changes), L)


def draw(seed, spread=16):
    """Logits on a grid, so that they tie, and a mask; rows of one document each."""
    rng = np.random.default_rng(seed)
    logits_TE = rng.integers(-spread, spread + 1, (T, E)).astype(np.float32) / 8
    return logits_TE, rng.random(T) < 0.8


def grids(seed, *shape, step=1 / 16, size=6):
    """Values on a grid, exact in float32."""
    return (np.random.default_rng(seed).integers(-size, size + 1, shape) * step).astype(np.float32)


def check(routing, expected: truth.Routed, mask_T):
    mask_T = np.asarray(mask_T)
    np.testing.assert_array_equal(
        routing.experts_TK, np.where(mask_T[:, None], expected.experts_TK, E)
    )
    oracle.assert_close(routing.weights_TK, expected.weights_TK)
    oracle.assert_close(np.asarray(routing.probs_TE)[mask_T], expected.probs_TE[mask_T])


@functools.cache
def router(config, **fixed):
    """Jitted `(arrays) -> Routing`, with the arrays as fields of `RouterInputs`."""
    return jax.jit(lambda arrays: route(RouterInputs(length=L, **arrays, **fixed), config))


SCORED = [
    *itertools.product(["softmax_topk"], ["softmax", "softmax_after"], [2, 3], [True], ["score"]),
    *itertools.product(["softmax_topk"], ["softmax"], [1, 2, E], [False], ["score", "logits"]),
    *itertools.product(["switch"], ["softmax"], [1], [False], ["score"]),
    *itertools.product(
        ["sigmoid_topk"], ["sigmoid", "sqrt_softplus"], [1, 3], [False], ["score", "logits"]
    ),
    *itertools.product(["sigmoid_topk", "cosine"], ["sigmoid"], [2, E], [True], ["score"]),
    ("dense", "softmax", E, False, "score"),
]


@pytest.mark.parametrize(("name", "score", "top_k", "renormalize", "select_by"), SCORED)
@pytest.mark.parametrize("with_bias", [False, True])
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_a_scored_router_is_the_loop_over_tokens(
    name, score, top_k, renormalize, select_by, with_bias, seed
):
    if name == "dense" and with_bias:
        return
    how = {"score": score, "top_k": top_k, "renormalize": renormalize, "select_by": select_by}
    config = config_of(router=name, route_scale=2.5, **how)
    logits_TE, mask_T = draw(seed)
    bias_E = grids(seed, E, step=1 / 4) if with_bias else None
    routing = router(config)({"logits_TE": logits_TE, "mask_T": mask_T, "bias_E": bias_E})
    check(routing, truth.route_scored(logits_TE, mask_T, scale=2.5, bias_E=bias_E, **how), mask_T)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_are_divided_by_no_less_than_the_floor(score):
    logits_TE, mask_T = draw(3)
    if score == "sigmoid":
        logits_TE -= 2.5  # sums of two scores are on both sides of the floor
    how = {"score": score, "top_k": 2, "renormalize": True}
    for floor in (0.6, 1e-12):
        name = "softmax_topk" if score == "softmax" else "sigmoid_topk"
        config = config_of(router=name, renormalize_floor=floor, **how)
        routing = router(config)({"logits_TE": logits_TE, "mask_T": mask_T, "bias_E": None})
        check(routing, truth.route_scored(logits_TE, mask_T, floor=floor, **how), mask_T)
        sums_T = np.asarray(routing.weights_TK.sum(axis=1))[mask_T]
        assert (sums_T < 0.999).any() == (floor == 0.6) and sums_T.max() > 0.999


@pytest.mark.parametrize("score", ["softmax", "softmax_after", "sigmoid"])
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 2.0, 40.0]))
def test_weights_are_divided_by_their_norm(score, seed, weight_norm):
    how = {"score": score, "top_k": 3, "renormalize": True, "weight_norm": weight_norm}
    name = "sigmoid_topk" if score == "sigmoid" else "softmax_topk"
    logits_TE, mask_T = draw(seed)
    routing = router(config_of(router=name, **how))({"logits_TE": logits_TE, "mask_T": mask_T})
    check(routing, truth.route_scored(logits_TE, mask_T, **how), mask_T)


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, -8.0]))
def test_group_limited_selection_is_the_loop_over_groups_for_negative_values_too(
    group_score, score, seed, shift
):
    how = {"score": score, "top_k": 3, "renormalize": True, "num_groups": 4, "top_k_groups": 2}
    how["group_score"] = group_score
    config = config_of(
        router="softmax_topk" if score == "softmax" else "sigmoid_topk", selection_bias=True, **how
    )
    logits_TE, mask_T = draw(seed)
    bias_E = grids(seed, E, step=1 / 4) + np.float32(shift)
    routing = router(config)({"logits_TE": logits_TE, "mask_T": mask_T, "bias_E": bias_E})
    expected = truth.route_scored(logits_TE, mask_T, bias_E=bias_E, **how)
    check(routing, expected, mask_T)
    assert all(
        len({int(e) // 2 for e in row}) <= 2 for row in np.asarray(routing.experts_TK)[mask_T]
    )


def keys():
    return jax.random.split(jax.random.key(7), B)


@pytest.mark.parametrize("score", ["softmax_after", "softmax"])
def test_noisy_top_k_selects_and_weighs_by_noisy_logits_in_training_and_by_clean_ones_in_evaluation(
    score,
):
    how = {"score": score, "top_k": 2, "renormalize": score == "softmax_after"}
    config = config_of(router="noisy_topk", **how)
    logits_TE, mask_T = draw(0)
    sigma_TE = np.abs(grids(1, T, E)) + np.float32(0.5)
    arrays = {"logits_TE": logits_TE, "mask_T": mask_T, "noise_scale_TE": sigma_TE}
    clean = router(config)(arrays)
    check(clean, truth.route_scored(logits_TE, mask_T, **how), mask_T)
    noisy = router(config, is_training=True, noise=0.5)(arrays | {"keys_B": keys()})
    check(noisy, truth.route_noisy(logits_TE, np.asarray(noisy.noisy_TE), mask_T, **how), mask_T)
    np.testing.assert_array_equal(noisy.logits_TE, logits_TE)
    assert np.any(noisy.experts_TK != clean.experts_TK)
    oracle.assert_close(noisy.noise_scale_TE, 0.5 * sigma_TE)


def test_the_noise_is_normal_with_the_learned_deviation_and_different_for_every_entry():
    config = config_of(router="noisy_topk")
    length = 2000
    logits_TE = np.zeros((B * length, E), np.float32)
    sigma_TE = np.broadcast_to(np.linspace(0.1, 2.0, E, dtype=np.float32), logits_TE.shape)
    inputs = RouterInputs(
        jnp.asarray(logits_TE),
        jnp.ones(B * length, bool),
        length,
        noise_scale_TE=sigma_TE,
        keys_B=keys(),
        is_training=True,
    )
    noise_TE = np.asarray(jax.jit(lambda: route(inputs, config).noisy_TE)()) / sigma_TE
    assert abs(noise_TE.mean()) < 0.02 and np.all(np.abs(noise_TE.std(axis=0) - 1) < 0.05)
    assert np.mean(np.abs(noise_TE) < 1) == pytest.approx(0.6827, abs=0.01)
    assert len(np.unique(noise_TE)) > 0.99 * noise_TE.size
    oracle.assert_close(truth.noise_sigma([[0.0]]), [[np.log(2) + MIN_NOISE]])


@pytest.mark.parametrize("score", ["uniform", "softmax", "sigmoid"])
def test_a_hash_router_follows_its_table(score):
    config = config_of(router="hash", top_k=3, score=score, route_scale=2.0)
    logits_TE, mask_T = draw(0)
    rng = np.random.default_rng(1)
    table_VK = np.array([rng.permutation(E)[:3] for _ in range(11)], np.int32)
    tokens_T = rng.integers(0, 11, T).astype(np.int32)
    logits_TE = np.zeros_like(logits_TE) if score == "uniform" else logits_TE
    arrays = {"logits_TE": logits_TE, "mask_T": mask_T, "table_VK": table_VK, "tokens_T": tokens_T}
    expected = truth.route_hash(table_VK, tokens_T, mask_T, logits_TE, score, scale=2.0)
    check(router(config)(arrays), expected, mask_T)


def test_the_balanced_router_goes_round_and_loads_every_expert_alike():
    config = config_of(router="balanced", top_k=3)
    positions_T = np.tile(np.arange(L, dtype=np.int32), B)
    arrays = {
        "logits_TE": np.zeros((T, E), np.float32),
        "mask_T": draw(0)[1],
        "positions_T": positions_T,
    }
    check(
        router(config)(arrays),
        truth.route_balanced(positions_T, arrays["mask_T"], 3, E),
        arrays["mask_T"],
    )
    length = 64
    inputs = RouterInputs(
        jnp.zeros((length, E)), jnp.ones(length, bool), length, positions_T=jnp.arange(length)
    )
    assert set(np.bincount(np.asarray(route(inputs, config).experts_TK).ravel())) == {
        length * 3 // E
    }


def test_the_random_router_draws_pairs_evenly_and_repeats_in_evaluation():
    config = config_of(router="random", top_k=2)
    length = 4000
    tokens_T = jnp.arange(B * length, dtype=jnp.int32) % 50
    inputs = RouterInputs(
        jnp.zeros((B * length, E)),
        jnp.ones(B * length, bool),
        length,
        tokens_T,
        tokens_T,
        keys_B=keys(),
        is_training=True,
    )
    experts_TK = np.asarray(route_random(inputs, config).experts_TK)
    assert np.all(experts_TK[:, 0] != experts_TK[:, 1])
    pairs = np.bincount(experts_TK[:, 0] * E + experts_TK[:, 1], minlength=E * E).reshape(E, E)
    expected = B * length / (E * (E - 1))
    assert np.all(np.abs(pairs[~np.eye(E, dtype=bool)] - expected) < 5 * expected**0.5)
    evaluation = dataclasses.replace(inputs, is_training=False, keys_B=None)
    first, second = (np.asarray(route_random(evaluation, config).experts_TK) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    # A function of token id and position: here both repeat after 50.
    np.testing.assert_array_equal(first[:50], first[50:100])
    assert np.all(np.bincount(first[:50].ravel(), minlength=E) > 0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000))
def test_hierarchical_routing_is_a_product_of_two_gates(seed):
    config = config_of(
        router="hierarchical", num_groups=4, top_k_groups=2, top_k=4, route_scale=2.0
    )
    logits_TE, mask_T = draw(seed)
    group_logits_TG = grids(seed + 1, T, 4)
    how = {"top_k_groups": 2, "per_group": 2, "scale": 2.0}
    expected = truth.route_hierarchical(group_logits_TG, logits_TE, mask_T, **how)
    arrays = {"logits_TE": logits_TE, "mask_T": mask_T, "group_logits_TG": group_logits_TG}
    arrays |= {
        "noise_scale_TE": np.ones((T, E), np.float32),
        "group_noise_scale_TG": np.ones((T, 4), np.float32),
    }
    check(router(config)(arrays), expected, mask_T)
    silent = router(config, is_training=True, noise=0.0)(arrays | {"keys_B": keys()})
    check(silent, expected, mask_T)


def test_noise_at_both_levels_of_a_hierarchy_changes_groups_and_experts():
    config = config_of(router="hierarchical", num_groups=4, top_k_groups=2, top_k=4)
    scales = {
        "noise_scale_TE": np.ones((T, E), np.float32),
        "group_noise_scale_TG": np.ones((T, 4), np.float32),
    }
    arrays = {
        "logits_TE": draw(0)[0],
        "mask_T": np.ones(T, bool),
        "group_logits_TG": grids(0, T, 4),
        "keys_B": keys(),
    }
    for quiet, constant in (("group_noise_scale_TG", True), ("noise_scale_TE", False)):
        some = arrays | scales | {quiet: np.zeros_like(scales[quiet])}
        clean, noisy = (
            np.asarray(router(config, is_training=True, noise=n)(some).experts_TK)
            for n in (0.0, 3.0)
        )
        assert np.array_equal(clean[:, ::2] // 2, noisy[:, ::2] // 2) == constant
        assert np.any(clean != noisy)


@pytest.mark.parametrize(("top_k", "score"), [(1, "sigmoid"), (2, "softmax_after"), (2, "softmax")])
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_sinkhorn_selects_by_the_plan_of_each_sequence_in_training(top_k, score, seed, training):
    how = {"top_k": top_k, "score": score, "renormalize": score == "softmax_after"}
    config = config_of(router="sinkhorn", sinkhorn_iterations=5, **how)
    rng = np.random.default_rng(seed)  # off the grid: plans of tied logits differ by rounding alone
    logits_TE, mask_T = rng.normal(size=(T, E)).astype(np.float32), rng.random(T) < 0.8
    routing = router(config, is_training=training)({"logits_TE": logits_TE, "mask_T": mask_T})
    expected = truth.route_sinkhorn(
        logits_TE, mask_T, length=L, iterations=5, training=training, **how
    )
    check(routing, expected, mask_T)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2]))
def test_sparse_mixer_takes_the_best_in_evaluation(seed, threshold):
    config = config_of(router="sparse_mixer", mixer_threshold=threshold)
    logits_TE, mask_T = draw(seed, spread=5)
    # Off the edge of the threshold, where float32 and float64 may differ.
    logits_TE += np.random.default_rng(seed).normal(size=logits_TE.shape).astype(np.float32) / 64
    routing = router(config)({"logits_TE": logits_TE, "mask_T": mask_T})
    check(
        routing, truth.route_sparse_mixer(logits_TE, mask_T, top_k=2, threshold=threshold), mask_T
    )


def test_sparse_mixer_samples_and_scales_with_the_published_probabilities():
    logits_E = np.array([1.0, 0.9, 0.85, 0.2], np.float32)
    config = dataclasses.replace(
        config_of(router="sparse_mixer", mixer_threshold=0.2), num_experts=4
    )
    length = 20_000
    inputs = RouterInputs(
        jnp.tile(logits_E, (length, 1)),
        jnp.ones(length, bool),
        length,
        keys_B=keys()[:1],
        is_training=True,
    )
    routing = jax.jit(lambda: route_sparse_mixer(inputs, config))()
    experts_TK, weights_TK = np.asarray(routing.experts_TK), np.asarray(routing.weights_TK)
    for pair in itertools.permutations(range(4), 2):
        chance = truth.sparse_mixer_sequence_probability(logits_E, list(pair), 0.2)
        share = np.mean(np.all(experts_TK == pair, axis=1))
        assert abs(share - chance) < 5 * (chance / length) ** 0.5 + 1e-9, pair
    best = experts_TK[:, 0] == 0
    plain_E = truth.sparse_mixer_support(logits_E, [], 0.2)
    ratios = weights_TK[:, 0] / plain_E[experts_TK[:, 0]]
    oracle.assert_close(ratios[best], np.ones(best.sum()))
    factors = truth.sparse_mixer_factors(False)
    whole = np.isclose(ratios[~best], 1.0)
    assert np.allclose(ratios[~best][~whole], 1 / 3, rtol=1e-5)
    assert abs(whole.mean() - factors[1.0]) < 5 * (0.25 * 0.75 / whole.size) ** 0.5


def test_the_gradient_of_a_sampled_weight_is_that_of_the_plain_weight():
    config = config_of(router="sparse_mixer", mixer_threshold=0.5)
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(T, E)) / 4 + 1, jnp.float32)
    common = {"mask_T": jnp.ones(T, bool), "length": L, "keys_B": keys(), "is_training": True}

    def weights(logits_TE):
        routing = route_sparse_mixer(RouterInputs(logits_TE, **common), config)
        return routing.weights_TK.sum(), routing.experts_TK

    gradient_TE, experts_TK = jax.grad(weights, has_aux=True)(logits_TE)

    def plain(logits_E, experts, supports):
        chosen = zip(experts, supports, strict=True)
        return sum(
            jax.nn.softmax(jnp.where(support, logits_E, -jnp.inf))[e] for e, support in chosen
        )

    for t, row in enumerate(experts_TK[:5].tolist()):
        supports = [
            truth.sparse_mixer_support(np.asarray(logits_TE[t]), row[:k], 0.5) > 0 for k in range(2)
        ]
        oracle.assert_close(gradient_TE[t], jax.grad(plain)(logits_TE[t], row, supports))


# Experts choose
# --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]))
def test_each_expert_takes_the_tokens_that_the_loop_takes(seed, slots):
    config = config_of(router="expert_choice", route_scale=1.5)
    logits_TE, mask_T = draw(seed)
    routing = route_expert_choice(
        RouterInputs(jnp.asarray(logits_TE), jnp.asarray(mask_T), L), config, slots
    )
    weights_BLE = np.zeros((B, L + 1, E))
    for b, e, c in np.ndindex(B, E, slots):
        weights_BLE[b, routing.positions_BEC[b, e, c], e] += routing.weights_BEC[b, e, c]
    expected = truth.route_expert_choice(
        logits_TE.reshape(B, L, E), mask_T.reshape(B, L), slots, 1.5
    )
    oracle.assert_close(weights_BLE[:, :L], expected)
    assert not weights_BLE[:, L].any()


def test_soft_routing_is_the_two_softmaxes_of_the_loop_and_zero_for_a_row_of_padding():
    logits_BLS = np.random.default_rng(0).normal(size=(B, L, 6)).astype(np.float32)
    mask_BL = np.array([[True] * L, [True] * 2 + [False] * (L - 2), [False] * L])
    routing = route_soft(jnp.asarray(logits_BLS), jnp.asarray(mask_BL))
    dispatch_BLS, combine_BLS = truth.soft_moe(logits_BLS, mask_BL)
    oracle.assert_close(routing.dispatch_BLS, dispatch_BLS)
    oracle.assert_close(routing.combine_BLS, combine_BLS)


# State
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
def test_the_bias_moves_as_the_loop_moves_it(centered):
    rng = np.random.default_rng(0)
    counts_NE = rng.integers(0, 5, (3, E))
    counts_NE[0] = 2  # balanced: nothing moves
    bias_NE = rng.normal(size=(3, E)).astype(np.float32)
    updated = update_bias(
        jnp.asarray(bias_NE), jnp.asarray(counts_NE), jnp.float32(0.1), is_centered=centered
    )
    expected = [
        truth.bias_update(b, c.tolist(), 0.1, centered)
        for b, c in zip(bias_NE, counts_NE, strict=True)
    ]
    oracle.assert_close(updated, np.array(expected))


@pytest.mark.parametrize("top_k", [1, 3])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_quantile_step_is_the_one_of_the_loop_and_balances_what_it_has_seen(top_k, seed):
    config = config_of(router="quantile", top_k=top_k, score="sigmoid", renormalize=top_k > 1)
    logits_TE, mask_T = draw(seed)
    beta_E = grids(seed + 1, E)
    routing = router(config)({"logits_TE": logits_TE, "mask_T": mask_T, "bias_E": -beta_E})
    how = {"top_k": top_k, "score": "sigmoid", "renormalize": top_k > 1}
    check(routing, truth.route_quantile(logits_TE, mask_T, beta_E, **how), mask_T)
    num_tokens_N = jnp.float32(mask_T.sum())[None]
    updated = update_quantiles(
        quantile_margins(routing, jnp.asarray(mask_T), top_k)[None], num_tokens_N, top_k
    )[0]
    if mask_T.any():
        oracle.assert_close(
            updated, -truth.quantile_update(beta_E, logits_TE, mask_T, top_k), rtol=2e-5
        )


# The load estimator
# -----------------------------------------------------------------------------------------------


def test_the_expected_load_is_what_redrawing_the_noise_counts():
    config = config_of(router="noisy_topk")
    logits_TE, mask_T = draw(0, spread=4)
    sigma_TE = np.full((T, E), 1 / E, np.float32)  # V-MoE's own, so that only its threshold differs
    arrays = {
        "logits_TE": logits_TE,
        "mask_T": mask_T,
        "noise_scale_TE": sigma_TE,
        "keys_B": keys(),
    }
    routing = router(config, is_training=True)(arrays)
    noisy_TE = np.asarray(routing.noisy_TE)
    load_E = np.asarray(expected_load(routing, jnp.asarray(mask_T), 2))
    oracle.assert_close(
        load_E, oracle_losses.load_shazeer(logits_TE, noisy_TE, sigma_TE, mask_T, 2)
    )
    vmoe_E = expected_load_vmoe(routing, jnp.asarray(mask_T), 2)
    oracle.assert_close(vmoe_E, oracle_losses.load_vmoe(logits_TE, noisy_TE, mask_T, 2))
    draws, rng = 400, np.random.default_rng(1)
    counted_E = oracle_losses.monte_carlo_load(logits_TE, noisy_TE, sigma_TE, mask_T, 2, draws, rng)
    assert np.abs(load_E - counted_E).max() < 4 * (mask_T.sum() / (4 * draws)) ** 0.5


# Extremes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus", "softmax"])
@pytest.mark.parametrize("level", [-300.0, 0.0, 80.0])
def test_scores_that_vanish_or_saturate_still_make_probabilities_and_weights_that_sum_to_one(
    score, level
):
    """A normaliser with a small constant would let a router lower its balance loss by lowering all
    its scores.
    """
    config = config_of(
        router="softmax_topk" if score == "softmax" else "sigmoid_topk", score=score, top_k=2
    )
    logits_TE = jnp.full((T, E), level) + jnp.asarray(draw(0)[0]) / 8

    def sums(logits_TE):
        routing = route(RouterInputs(logits_TE, jnp.ones(T, bool), L), config)
        return routing.probs_TE.sum(axis=1), routing.weights_TK.sum(axis=1), routing.probs_TE

    probs_T, weights_T, probs_TE = sums(logits_TE)
    oracle.assert_close(probs_T, np.ones(T))
    oracle.assert_close(weights_T, np.ones(T))
    gradient_TE = jax.grad(lambda x: jnp.sum(sums(x)[2] * draw(1)[0]))(logits_TE)
    assert np.all(np.isfinite(gradient_TE)) and np.all(np.isfinite(probs_TE))


# Ties, what is no number, random numbers
# --------------------------------------------------------------------------


def test_noise_breaks_the_ties_of_a_hierarchy_that_has_learnt_nothing():
    config = config_of(router="hierarchical", num_groups=4, top_k_groups=2, top_k=4)
    arrays = {
        "logits_TE": np.zeros((T, E), np.float32),
        "group_logits_TG": np.zeros((T, 4), np.float32),
    }
    arrays |= {
        "noise_scale_TE": np.ones((T, E), np.float32),
        "group_noise_scale_TG": np.ones((T, 4), np.float32),
    }
    arrays["mask_T"] = np.arange(T) != 3
    noisy = router(config, is_training=True)(arrays | {"keys_B": keys()})
    assert float(count_ties(noisy, arrays["mask_T"])) == 0
    clean = router(config)(arrays)
    assert float(count_ties(clean, arrays["mask_T"])) == T - 1


def test_ties_of_a_hierarchy_are_those_within_groups_and_between_them():
    config = config_of(router="hierarchical", num_groups=2, top_k_groups=2, top_k=4)
    logits_TE = np.array(
        [[4, 3, 2, 1, 9, 8, 7, 6], [4, 3, 3, 1, 9, 8, 7, 6], [4, 4, 2, 1, 9, 8, 7, 3]], np.float32
    )
    some = {
        "noise_scale_TE": np.ones((3, E), np.float32),
        "group_noise_scale_TG": np.ones((3, 2), np.float32),
    }
    arrays = some | {
        "logits_TE": logits_TE,
        "mask_T": np.ones(3, bool),
        "group_logits_TG": np.zeros((3, 2), np.float32),
    }

    def ties(**changes):
        routing = route(RouterInputs(length=1, **arrays), dataclasses.replace(config, **changes))
        return float(count_ties(routing, arrays["mask_T"]))

    assert ties() == 1  # the second token: 3 and 3 of the first group, of which one is chosen
    assert ties(top_k_groups=1, top_k=2) == 3  # now every token might as well visit the other group
    arrays["group_logits_TG"] = np.array([[0, 1], [1, 0], [0, 1]], np.float32)
    assert ties(top_k_groups=1, top_k=2) == 1


def test_sparse_mixers_draws_leave_no_ties_in_training():
    config = config_of(router="sparse_mixer", mixer_threshold=0.2)
    arrays = {"logits_TE": np.zeros((T, E), np.float32), "mask_T": np.ones(T, bool)}
    drawn = router(config, is_training=True)(arrays | {"keys_B": keys()})
    assert float(count_ties(drawn, arrays["mask_T"])) == 0
    assert float(count_ties(router(config)(arrays), arrays["mask_T"])) == T


def test_an_offer_that_is_no_number_concerns_its_own_expert_alone():
    rng = np.random.default_rng(0)
    margins_NTE = rng.normal(size=(1, 64, E)).astype(np.float32)
    margins_NTE[:, 40:] = -np.inf  # padding
    tokens_N = jnp.full(1, 40.0)
    clean_NE = np.asarray(update_quantiles(jnp.asarray(margins_NTE), tokens_N, 2))
    margins_NTE[:, :6, 0] = np.nan
    torn_NE = np.asarray(update_quantiles(jnp.asarray(margins_NTE), tokens_N, 2))
    assert np.isfinite(torn_NE).all()
    np.testing.assert_allclose(
        np.diff(torn_NE[:, 1:]), np.diff(clean_NE[:, 1:]), rtol=1e-5, atol=1e-6
    )


def test_no_two_draws_of_a_layer_share_random_numbers():
    base = jax.random.key(0)
    many = jnp.arange(600)

    def folded(stream):
        """Key data of all choices, as `draw` derives them."""
        stream_key = jax.random.fold_in(base, stream.number)
        return jax.random.key_data(
            jax.vmap(lambda choice: jax.random.fold_in(stream_key, choice))(many)
        )

    drawn = np.concatenate([folded(stream) for stream in Stream])
    # Splitting a key, as parameters do, and folding it with a small integer give the same keys.
    split = jax.random.key_data(jax.random.split(base, 2000))
    assert len(np.unique(drawn, axis=0)) == len(Stream) * 600
    assert len(np.unique(np.concatenate([drawn, split]), axis=0)) == len(Stream) * 600 + 2000


@pytest.mark.parametrize("stream", [Stream.NOISE, Stream.KEEP])
def test_draws_differ_by_stream_choice_and_sequence(stream):
    def of(stream, choice):
        return np.asarray(draw_numbers(keys(), stream, jax.random.uniform, 4, 5, choice=choice))

    first = of(stream, 0)
    assert len(np.unique(first)) == first.size
    np.testing.assert_array_equal(first, of(stream, 0))
    for other in (of(stream, 1), of(Stream.DROPOUT, 0)):
        assert not np.any(first == other)
