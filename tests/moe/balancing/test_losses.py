"""Losses and metrics: golden values, and what padding, splitting and order must not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from moejax.config import MoeConfig
from moejax.moe.balancing.load import cv_squared, load_fractions
from moejax.moe.balancing.losses import auxiliary_losses, balance_loss, z_loss
from moejax.moe.balancing.metrics import routing_metrics
from moejax.moe.balancing.stats import add_stats, collect
from moejax.moe.balancing.sums import count_assignments, count_ties, expected_load
from moejax.moe.dispatch.capacity import CombineWeights
from moejax.moe.router import RouterInputs, Routing, route
from oracle import losses as oracle_losses
from oracle import routers as oracle_routers

T, E = 16, 8


def softmax_config(top_k, num_experts=E):
    return MoeConfig(num_experts=num_experts, top_k=top_k, score="softmax", renormalize=False)


@functools.cache
def collector(config):
    @jax.jit
    def run(logits_TE, mask_T, kept_TK):
        routing = route(RouterInputs(logits_TE, mask_T, len(mask_T)), config)
        combined = CombineWeights(
            routing.experts_TK,
            jnp.where(kept_TK, routing.weights_TK, 0),
            mask_T[:, None] & ~kept_TK,
            jnp.zeros_like(kept_TK),
        )
        stats = collect(routing, mask_T, combined, config, length=len(mask_T))
        return jax.tree.map(lambda x: x[None], stats)  # as if stacked by layer

    return run


def stats_of(logits_TE, top_k, mask_T=None, kept_TK=None):
    mask_T = np.ones(len(logits_TE), bool) if mask_T is None else mask_T
    kept_TK = np.ones((len(logits_TE), top_k), bool) if kept_TK is None else kept_TK
    return collector(softmax_config(top_k))(jnp.asarray(logits_TE, jnp.float32), mask_T, kept_TK)


def cyclic_logits(top_k):
    """Token t likes experts t, t + 1, ... best: every expert is chosen equally often and equally
    probable.
    """
    logits_TE = np.zeros((T, E))
    for t in range(T):
        for k in range(top_k):
            logits_TE[t, (t + k) % E] = 3.0 - 0.1 * k
    return logits_TE


def collapsed_logits(top_k):
    """Every token sends everything to experts 0 to K - 1, equally."""
    return np.where(np.arange(E) < top_k, 60.0, 0.0) + np.zeros((T, E))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_balance_loss_is_1_when_uniform_and_experts_over_k_when_collapsed(top_k):
    oracle.assert_close(balance_loss(stats_of(cyclic_logits(top_k), top_k)), [1.0])
    oracle.assert_close(balance_loss(stats_of(collapsed_logits(top_k), top_k)), [E / top_k])
    oracle.assert_close(
        balance_loss(stats_of(np.zeros((T, E)), top_k)), [1.0]
    )  # uniform probabilities suffice


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balance_loss_grows_with_every_further_token_that_collapses(top_k):
    uniform, collapsed = cyclic_logits(top_k), collapsed_logits(top_k)
    # Two more tokens, of the two that like expert e best, at a time; the last experts first.
    values = []
    for first_loyal in range(E, -1, -1):
        collapses_T = np.arange(T) % E >= first_loyal
        logits_TE = np.where(collapses_T[:, None], collapsed, uniform)
        values.append(float(balance_loss(stats_of(logits_TE, top_k))[0]))
    assert values[0] == pytest.approx(1, rel=1e-5) and values[-1] == pytest.approx(
        E / top_k, rel=1e-5
    )
    assert np.all(np.diff(values) > 1e-3)


def test_the_gradient_of_the_balance_loss_lowers_the_probability_of_the_overloaded_expert():
    logits_TE = cyclic_logits(2)
    logits_TE[:4] = 0
    logits_TE[:4, 3] = 5.0

    def loss(logits_TE):
        return balance_loss(stats_of(logits_TE, 2))[0]

    gradient_TE = jax.grad(loss)(jnp.float32(logits_TE))
    # f is a constant: the derivative is E / T * sum_e f_e dp_e.
    load_E = load_fractions(stats_of(logits_TE, 2))[0]
    assert np.all(gradient_TE[:, np.argmax(load_E)] > 0)
    expected = jax.grad(lambda x: E / T * jnp.sum(jax.nn.softmax(x) @ load_E))(
        jnp.float32(logits_TE)
    )
    oracle.assert_close(gradient_TE, expected)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_ties_are_counted_as_the_oracle_does_and_16_bits_make_them(top_k):
    logits_TE, mask_T, kept_TK = random_case(top_k)
    few = routing_metrics(stats_of(logits_TE, top_k, mask_T, kept_TK))["ties"]
    rounded_TE = np.float32((logits_TE * 4).round() / 4)
    many = routing_metrics(stats_of(rounded_TE, top_k, mask_T, kept_TK))["ties"]
    np.testing.assert_allclose(
        many, oracle.metrics(as_result(rounded_TE, mask_T, kept_TK, top_k))["ties"], rtol=1e-6
    )
    assert few == 0 and (many == 0) == (top_k == 8)  # among all experts there is no boundary


def test_a_tie_is_at_the_last_choice_that_a_token_makes():
    ranking_TE = jnp.array([[3.0, 1, 1, 0], [3, 1, 1, 0], [3, 3, 1, 0], [2, 2, 2, 2]])
    # The first token chooses expert 1 over the equal 2; the second and third make one choice, and 4
    # is no expert.
    experts_TK = jnp.array([[0, 1], [0, 4], [0, 4], [0, 1]])
    zeros_TE, weights_TK = jnp.zeros((4, 4)), jnp.zeros((4, 2))
    routing = Routing(zeros_TE, zeros_TE, experts_TK, weights_TK, ranking_TE, zeros_TE, weights_TK)
    assert (
        float(count_ties(routing, jnp.array([True, True, True, False]))) == 2
    )  # the first and the third


def random_case(top_k, seed=0):
    rng = np.random.default_rng(seed)
    logits_TE = rng.normal(size=(T, E)) * 3 + np.linspace(2, 0, E)
    mask_T = rng.random(T) < 0.8
    return logits_TE.astype(np.float32), mask_T, rng.random((T, top_k)) < 0.6


def as_result(logits_TE, mask_T, kept_TK, top_k):
    """The oracle's view of a routing without a layer."""
    routed = [oracle.route_one(row, top_k, False) for row in logits_TE]
    real = mask_T[:, None]
    return oracle.LayerResult(
        y_BLD=np.zeros((1, T, 1)),
        logits_BLE=np.where(real, logits_TE, 0).astype(np.float64)[None],
        probs_BLE=np.where(real, [r[0] for r in routed], 0)[None],
        experts_BLK=np.where(real, [r[1] for r in routed], -1)[None],
        weights_BLK=np.where(real, [r[2] for r in routed], 0)[None],
        kept_BLK=(real & kept_TK)[None],
        mask_BL=mask_T[None],
    )


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_every_metric_equal_the_oracles_with_padding_and_dropping(top_k, seed):
    case = random_case(top_k, seed)
    stats, expected = stats_of(case[0], top_k, *case[1:]), as_result(*case, top_k)
    oracle.assert_close(balance_loss(stats), [oracle.balance_loss(expected)])
    oracle.assert_close(z_loss(stats), [oracle.z_loss(expected)])
    ours, theirs = routing_metrics(stats), oracle.metrics(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Differences of numbers near 1 (perfect balance at K = E) are exact to an ulp of 1, not of
        # themselves.
        np.testing.assert_allclose(ours[name], [value], rtol=1e-5, atol=1e-6, err_msg=name)
    assert stats.assignments_E[0].tolist() == oracle.counts(expected).tolist()


def test_padding_appended_changes_no_sum_whatever_it_holds():
    logits_TE, mask_T, kept_TK = random_case(2)
    without = stats_of(logits_TE, 2, mask_T, kept_TK)
    padded_TE = np.concatenate([logits_TE, np.full((T, E), 1e4)])
    no_token = np.zeros(T, bool)
    with_padding = stats_of(
        padded_TE, 2, np.append(mask_T, no_token), np.concatenate([kept_TK, np.zeros((T, 2), bool)])
    )
    oracle.assert_close(with_padding, without)


def test_statistics_of_two_batches_add_up_to_those_of_both_together():
    cases = [random_case(2, seed) for seed in range(2)]
    parts = [stats_of(case[0], 2, *case[1:]) for case in cases]
    both = [np.concatenate(arrays) for arrays in zip(*cases, strict=True)]
    oracle.assert_close(add_stats(*parts), stats_of(both[0], 2, *both[1:]))


def test_the_balance_loss_of_the_whole_differs_from_the_mean_of_the_losses_of_its_parts():
    halves = [np.zeros((T, E)), np.zeros((T, E))]
    halves[0][:, 0], halves[1][:, 1] = 9.0, 9.0
    parts = [stats_of(half, 1) for half in halves]
    mean_of_parts = np.mean([balance_loss(part)[0] for part in parts])
    assert balance_loss(add_stats(*parts))[0] < 0.6 * mean_of_parts


def test_counts_stay_exact_integers_past_what_bfloat16_can_count():
    experts_TK = jnp.zeros((4000, 1), jnp.int32).at[3999].set(3)
    counts_E = count_assignments(experts_TK, 4)
    assert counts_E.dtype == jnp.int32 and counts_E.tolist() == [3999, 0, 0, 1]


def test_ids_of_masked_tokens_count_nowhere():
    assert count_assignments(jnp.array([[4, 4], [0, 3]]), 4).tolist() == [1, 0, 0, 1]


def test_a_batch_without_tokens_has_finite_losses_and_metrics():
    stats = stats_of(np.zeros((T, E)), 2, np.zeros(T, bool), np.zeros((T, 2), bool))
    values = [balance_loss(stats), z_loss(stats), *routing_metrics(stats).values()]
    assert np.all(np.isfinite(values))


def test_a_single_expert_has_finite_metrics():
    # moe.num_experts=1 with top_k=1 passes validation; its load is perfectly balanced.
    everyone = jnp.ones(T, bool)
    stats = collector(softmax_config(1, num_experts=1))(
        jnp.ones((T, 1)), everyone, everyone[:, None]
    )
    for name, value in routing_metrics(stats).items():
        assert np.all(np.isfinite(value)), name


# The other losses, against the oracle
# -----------------------------------------------------------------------------


def loss_case(top_k=2, length=4, seed=0, **changes):
    """Statistics of a router with everything switched on, and what the oracle needs to know."""
    config = MoeConfig(
        num_experts=E,
        top_k=top_k,
        router="noisy_topk",
        score="softmax",
        renormalize=True,
        importance_weight=1.0,
        load_weight=1.0,
        vmoe_load_weight=1.0,
        sequence_balance_weight=1.0,
        vmoe_importance_weight=1.0,
        **changes,
    )
    rng = np.random.default_rng(seed)
    logits_TE = (rng.normal(size=(T, E)) + np.linspace(1, -1, E)).astype(np.float32)
    mask_T = rng.random(T) < 0.8
    mask_T[length : 2 * length] = False  # a sequence of padding
    sigma_TE = np.full((T, E), 0.5, np.float32)
    inputs = RouterInputs(
        jnp.asarray(logits_TE), jnp.asarray(mask_T), length, noise_scale_TE=jnp.asarray(sigma_TE),
        keys_B=jax.random.split(jax.random.key(seed), T // length), is_training=True,
    )  # fmt: skip
    routing = route(inputs, config)
    none_TK = jnp.zeros(routing.experts_TK.shape, bool)
    combined = CombineWeights(routing.experts_TK, routing.weights_TK, none_TK, none_TK)
    stats = collect(routing, inputs.mask_T, combined, config, length=length, num_devices=2)
    experts_TK = np.where(mask_T[:, None], routing.experts_TK, -1)
    stacked = jax.tree.map(lambda x: x[None], stats)
    return config, stacked, jax.device_get(routing), experts_TK, mask_T, logits_TE, sigma_TE


@pytest.mark.parametrize("seed", range(3))
def test_importance_load_and_sequence_losses_equal_the_oracles(seed):
    config, stats, routing, experts_TK, mask_T, logits_TE, sigma_TE = loss_case(seed=seed)
    found = auxiliary_losses(stats, config)
    load_E = oracle_losses.load_shazeer(logits_TE, routing.noisy_TE, sigma_TE, mask_T, 2)
    vmoe_E = oracle_losses.load_vmoe(logits_TE, routing.noisy_TE, mask_T, 2)
    expected = {
        "balance": oracle_losses.balance_loss(routing.probs_TE, experts_TK, mask_T),
        "z": oracle_losses.z_loss(logits_TE, mask_T),
        "importance": oracle_losses.importance_loss(experts_TK, routing.weights_TK, E),
        "vmoe_importance": oracle_losses.cv_squared(
            oracle_losses.importance_vmoe(routing.probs_TE, mask_T)
        ),
        "load": oracle_losses.cv_squared(load_E),
        "vmoe_load": oracle_losses.cv_squared(vmoe_E),
    }
    for name, value in expected.items():
        oracle.assert_close(found[name].value_N, [value], err_msg=name)
        oracle.assert_close(found[name].term_N, found[name].value_N)
    assert found.keys() == {*expected, "sequence_balance"}


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_sequence_loss_counts_the_best_scores_without_bias_and_groups(score, top_k):
    how = {
        "num_groups": 4,
        "top_k_groups": 2,
        "selection_bias": True,
        "sequence_balance_weight": 1.0,
    }
    config = MoeConfig(
        num_experts=E, top_k=top_k, router="sigmoid_topk", score=score, renormalize=False, **how
    )
    rng = np.random.default_rng(0)
    logits_TE, mask_T = rng.normal(size=(T, E)).astype(np.float32), rng.random(T) < 0.7
    bias_E = jnp.asarray(rng.normal(size=E), jnp.float32)
    routing = route(
        RouterInputs(jnp.asarray(logits_TE), jnp.asarray(mask_T), 4, bias_E=bias_E), config
    )
    none_TK = jnp.zeros(routing.experts_TK.shape, bool)
    stats = collect(
        routing,
        jnp.asarray(mask_T),
        CombineWeights(routing.experts_TK, routing.weights_TK, none_TK, none_TK),
        config,
        length=4,
    )
    scores_TE = [oracle_routers.scores_one(row, score) for row in logits_TE]
    expected = oracle_losses.sequence_balance_loss(scores_TE, mask_T, top_k, 4)
    found = auxiliary_losses(jax.tree.map(lambda x: x[None], stats), config)["sequence_balance"]
    oracle.assert_close(found.value_N, [expected])


@pytest.mark.parametrize(
    ("scope", "scopes"), [("sequence", 4), ("device", 2), ("microbatch", 1), ("global", 1)]
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_a_scope_averages_before_the_product(scope, scopes, top_k):
    _, stats, routing, experts_TK, mask_T, *_ = loss_case(top_k=top_k, balance_scope=scope)
    expected = oracle_losses.scoped_balance_loss(routing.probs_TE, experts_TK, mask_T, scopes)
    oracle.assert_close(balance_loss(stats), [expected])
    # Over two microbatches the scopes of both are averaged, and the global scope is one product.
    _, other, other_routing, other_experts_TK, other_mask_T, *_ = loss_case(
        top_k=top_k, balance_scope=scope, seed=7
    )
    both = (
        np.concatenate([routing.probs_TE, other_routing.probs_TE]),
        np.concatenate([experts_TK, other_experts_TK]),
        np.concatenate([mask_T, other_mask_T]),
    )
    num_scopes = 1 if scope == "global" else 2 * scopes
    together = balance_loss(add_stats(stats, other))
    oracle.assert_close(together, [oracle_losses.scoped_balance_loss(*both, num_scopes)])


@pytest.mark.parametrize(
    ("convention", "at_balance"),
    [("normalized", 1.0), ("times_k", 2.0), ("over_k", 0.5), ("first_choice", 1.0)],
)
def test_a_convention_changes_the_term_and_never_the_logged_value(convention, at_balance):
    config, stats, routing, experts_TK, mask_T, *_ = loss_case(balance_convention=convention)
    loss = auxiliary_losses(stats, config)["balance"]
    oracle.assert_close(
        loss.value_N, [oracle_losses.balance_loss(routing.probs_TE, experts_TK, mask_T)]
    )
    oracle.assert_close(
        loss.term_N, [oracle_losses.balance_loss(routing.probs_TE, experts_TK, mask_T, convention)]
    )
    uniform = jax.tree.map(lambda x: x, stats)
    uniform = dataclasses.replace(
        uniform,
        num_tokens=jnp.full(1, 8.0),
        assignments_E=jnp.full((1, E), 2),
        probs_E=jnp.full((1, E), 1.0),
        first_assignments_E=jnp.full((1, E), 1),
    )
    oracle.assert_close(auxiliary_losses(uniform, config)["balance"].term_N, [at_balance])


def test_a_loss_without_a_weight_is_not_computed_and_one_with_a_weight_never_absent():
    base = {"num_experts": E, "top_k": 2, "router": "noisy_topk", "score": "softmax"}
    for name in ("sequence_balance", "importance", "load", "vmoe_load"):
        _, stats, *_ = loss_case()
        on = MoeConfig(**base, **{f"{name}_weight": 0.5})
        assert auxiliary_losses(stats, on).keys() == {"balance", "z", name}
    assert auxiliary_losses(stats, MoeConfig(**base)).keys() == {"balance", "z"}


@pytest.mark.parametrize(("scope", "scopes"), [("sequence", 4), ("device", 2), ("microbatch", 1)])
def test_first_choices_are_averaged_over_the_scope_too(scope, scopes):
    how = {"balance_scope": scope, "balance_convention": "first_choice"}
    config, stats, routing, experts_TK, mask_T, *_ = loss_case(**how)
    loss = auxiliary_losses(stats, config)["balance"]
    arguments = (routing.probs_TE, experts_TK, mask_T, scopes)
    oracle.assert_close(loss.value_N, [oracle_losses.scoped_balance_loss(*arguments)])
    oracle.assert_close(
        loss.term_N, [oracle_losses.scoped_balance_loss(*arguments, "first_choice")]
    )
    assert abs(loss.term_N[0] - loss.value_N[0]) > 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_the_variation_of_weights_does_not_depend_on_their_scale(scale):
    values_NE = np.array([[1.0, 3.0, 0.0, 4.0]], np.float32)
    oracle.assert_close(cv_squared(scale * values_NE), cv_squared(values_NE))
    slope_NE = jax.grad(lambda values_NE: cv_squared(values_NE)[0])(jnp.float32(scale) * values_NE)
    assert abs(np.sum(slope_NE * scale * values_NE)) < 1e-6  # nothing is won by lowering all
    assert float(cv_squared(0 * values_NE)[0]) == 0


def test_an_expected_load_without_noise_counts_choices_and_has_no_gradient():
    logits_TE = jnp.zeros((6, 4)).at[:, 2].set(jnp.arange(6.0))
    mask_T = jnp.ones(6, bool)

    def load(scale):
        zeros_TK = jnp.zeros((6, 2))
        routing = Routing(
            logits_TE,
            logits_TE,
            zeros_TK.astype(int),
            zeros_TK,
            logits_TE,
            logits_TE,
            zeros_TK,
            logits_TE,
            scale,
        )
        return expected_load(routing, mask_T, 2)

    load_E, slope_E = load(jnp.float32(0)), jax.jacobian(load)(jnp.float32(0))
    assert np.isfinite(load_E).all() and np.isfinite(slope_E).all()
    assert float(load_E[2]) == 5.5  # a token of equal logits counts half
