"""Dispatch and combine: plans that lose no choice, and gathers whose transposes are gathers."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from moejax.moe.dispatch.plan import (
    Plan,
    _sort_with_index,
    combine,
    dispatch,
    dispatch_weights,
    plan_capacity,
    plan_dropless,
)

FIXTURES = Path(__file__).parents[3] / "../shared/routing-fixtures"
B, L, K, E, C, D = 2, 5, 2, 4, 2, 3
T = B * L

choices = st.lists(
    st.tuples(st.permutations(range(E)), st.sampled_from([True, True, True, False])),
    min_size=T,
    max_size=T,
)

dropless = jax.jit(functools.partial(plan_dropless, num_experts=E))
capacity = jax.jit(functools.partial(plan_capacity, num_experts=E, slots=C))
run_dispatch, run_combine = jax.jit(dispatch), jax.jit(combine)


def as_array(drawn):
    """Experts [T, K]; E where the token is masked."""
    return np.array([list(order[:K]) if real else [E] * K for order, real in drawn], np.int32)


def check_inverse(plan: Plan, num_rows):
    """`row_TK` and `choice_R` say the same: each choice with a row is the choice of that row."""
    row_S, choice_R = np.asarray(plan.row_TK).ravel(), np.asarray(plan.choice_R)
    assert len(choice_R) == num_rows
    for choice, row in enumerate(row_S):
        assert row == num_rows or choice_R[row] == choice
    for row, choice in enumerate(choice_R):
        assert choice == T * K or row_S[choice] == row


@settings(max_examples=50, deadline=None)
@given(choices)
def test_a_dropless_plan_gives_every_real_choice_one_row_in_order_of_expert_then_token(drawn):
    experts_TK = as_array(drawn)
    plan = dropless(experts_TK)
    check_inverse(plan, T * K)
    expected = [c for e in range(E) for c in range(T * K) if experts_TK.ravel()[c] == e]
    assert np.asarray(plan.choice_R)[: len(expected)].tolist() == expected
    assert np.all(np.asarray(plan.choice_R)[len(expected) :] == T * K)
    assert plan.group_sizes_E.tolist() == [int(np.sum(experts_TK == e)) for e in range(E)]
    assert plan.expert_R.tolist() == sorted(experts_TK.ravel())


@settings(max_examples=50, deadline=None)
@given(choices)
def test_a_capacity_plan_keeps_the_first_choices_by_position_and_drops_what_the_oracle_drops(drawn):
    experts_TK = as_array(drawn)
    plan = capacity(experts_TK.reshape(B, L, K))
    check_inverse(plan, E * B * C)
    ids_BLK = np.where(experts_TK < E, experts_TK, -1).reshape(B, L, K)
    kept_BLK = oracle.keep_within_capacity(ids_BLK, E, C)
    row_BLK = np.asarray(plan.row_TK).reshape(B, L, K)
    np.testing.assert_array_equal(row_BLK < E * B * C, kept_BLK)
    # A row lies within its expert's block of rows.
    np.testing.assert_array_equal(row_BLK[kept_BLK] // (B * C), ids_BLK[kept_BLK])
    assert plan.group_sizes_E.tolist() == [B * C] * E
    assert plan.expert_R.tolist() == sorted([*range(E)] * (B * C))


@settings(max_examples=20, deadline=None)
@given(choices, st.sampled_from(["dropless", "capacity"]), st.integers(0, 9))
def test_dispatch_copies_tokens_and_combine_adds_rows_as_loops_over_choices_do(drawn, kind, seed):
    experts_TK = as_array(drawn)
    plan = dropless(experts_TK) if kind == "dropless" else capacity(experts_TK.reshape(B, L, K))
    rows = len(plan.choice_R)
    rng = np.random.default_rng(seed)
    x_TD, y_RD, weights_TK = (
        rng.normal(size=s).astype(np.float32) for s in ((T, D), (rows, D), (T, K))
    )
    expected_RD, expected_TD = np.zeros((rows, D)), np.zeros((T, D))
    for t, k in np.ndindex(T, K):
        row = plan.row_TK[t, k]
        if row < rows:
            expected_RD[row] = x_TD[t]
            expected_TD[t] += weights_TK[t, k].astype(np.float64) * y_RD[row]
    oracle.assert_close(run_dispatch(x_TD, plan), expected_RD)
    oracle.assert_close(run_combine(y_RD, weights_TK, plan), expected_TD)


@pytest.fixture(scope="module", params=["dropless", "capacity"])
def plan(request):
    rng = np.random.default_rng(0)
    experts_TK = np.array([rng.permutation(E)[:K] for _ in range(T)], np.int32)
    experts_TK[3] = E
    if request.param == "dropless":
        return dropless(experts_TK)
    plan = capacity(experts_TK.reshape(B, L, K))
    assert np.sum(np.asarray(plan.row_TK) == len(plan.choice_R)) > K  # some choices are dropped
    return plan


def test_dispatch_and_combine_with_weight_1_are_each_others_transposes(plan):
    x_TD = jax.random.normal(jax.random.key(0), (T, D))
    y_RD = jax.random.normal(jax.random.key(1), (len(plan.choice_R), D))
    ones_TK = jnp.ones((T, K))

    @jax.jit
    def both_ways(x_TD, y_RD, plan):
        _, transpose_of_dispatch = jax.vjp(lambda x: dispatch(x, plan), x_TD)
        _, transpose_of_combine = jax.vjp(lambda y: combine(y, ones_TK, plan), y_RD)
        return transpose_of_dispatch(y_RD)[0], transpose_of_combine(x_TD)[0]

    dispatched_RD, combined_TD = run_dispatch(x_TD, plan), run_combine(y_RD, ones_TK, plan)
    oracle.assert_close(both_ways(x_TD, y_RD, plan), (combined_TD, dispatched_RD))
    oracle.assert_close(np.vdot(dispatched_RD, y_RD), np.vdot(x_TD, combined_TD))


def test_the_gradients_of_dispatch_and_combine_equal_those_of_plain_indexing(plan):
    rows = len(plan.choice_R)
    x_TD, y_RD, weights_TK, dx_RD, dy_TD = (
        jax.random.normal(jax.random.key(i), s)
        for i, s in enumerate([(T, D), (rows, D), (T, K), (rows, D), (T, D)])
    )

    def plain(x_TD, y_RD, weights_TK):
        source_R = jnp.append(jnp.repeat(jnp.arange(T), K), T)[plan.choice_R]
        x_RD = jnp.concatenate([x_TD, jnp.zeros((1, D))])[source_R]
        y_TKD = jnp.concatenate([y_RD, jnp.zeros((1, D))])[plan.row_TK]
        return jnp.sum(x_RD * dx_RD) + jnp.sum((weights_TK[..., None] * y_TKD).sum(1) * dy_TD)

    def ours(x_TD, y_RD, weights_TK):
        return jnp.sum(dispatch(x_TD, plan) * dx_RD) + jnp.sum(
            combine(y_RD, weights_TK, plan) * dy_TD
        )

    arguments = (x_TD, y_RD, weights_TK)
    oracle.assert_close(
        *(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (ours, plain))
    )


def test_the_weight_of_a_row_is_that_of_its_choice_and_its_gradient_finds_the_way_back(plan):
    weights_TK = jax.random.normal(jax.random.key(0), (T, K))
    cotangent_R = jax.random.normal(jax.random.key(1), plan.choice_R.shape)

    def plain(weights_TK):
        return jnp.append(weights_TK.reshape(-1), 0.0)[plan.choice_R]

    weight_R, pull = jax.vjp(lambda w: dispatch_weights(w, plan), weights_TK)
    oracle.assert_close(weight_R, plain(weights_TK))
    oracle.assert_close(pull(cotangent_R), jax.vjp(plain, weights_TK)[1](cotangent_R))
    assert not [p for p in oracle.primitives(jax.make_jaxpr(pull)(cotangent_R)) if "scatter" in p]


def test_neither_direction_of_dispatch_and_combine_scatters_floating_point_numbers(plan):
    def there_and_back(x_TD, weights_TK):
        return jnp.sum(combine(jnp.tanh(dispatch(x_TD, plan)), weights_TK, plan) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(there_and_back, argnums=(0, 1)))(
        jnp.ones((T, D)), jnp.ones((T, K))
    )
    assert not [name for name in oracle.primitives(jaxpr) if "scatter" in name]
    # And such a scatter would be seen:
    plain = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(x[plan.choice_R // K])))(jnp.ones((T, D)))
    assert [name for name in oracle.primitives(plain) if "scatter" in name]


def test_planning_scatters_without_adding():
    jaxpr = jax.make_jaxpr(lambda e: (dropless(e.reshape(T, K)), capacity(e)))(
        jnp.zeros((B, L, K), jnp.int32)
    )
    assert not {"scatter-add", "scatter_add"} & set(oracle.primitives(jaxpr))


def test_capacity_drops_the_tokens_that_switch_transformers_drops():
    if not FIXTURES.exists():
        pytest.skip(f"the fixtures of published routers are not at {FIXTURES}")
    slots = json.loads((FIXTURES / "index.json").read_text())["switch_transformers"]["config"][
        "expert_capacity"
    ]
    arrays = np.load(FIXTURES / "switch_transformers.npz")
    num_dropped, plan_of = 0, jax.jit(functools.partial(plan_capacity, num_experts=8, slots=slots))
    for name in arrays.files:
        if name.endswith(".kept"):
            experts_T1, kept_T1 = (
                arrays[name.replace(".kept", ".indices")],
                arrays[name].astype(bool),
            )
            plan = plan_of(jnp.asarray(experts_T1.reshape(2, -1, 1), jnp.int32))  # 2 sequences
            np.testing.assert_array_equal(np.asarray(plan.row_TK) < len(plan.choice_R), kept_T1)
            num_dropped += np.sum(~kept_T1)
    assert num_dropped > 10


@pytest.mark.parametrize("num_experts", [E, 2**31 // (T * K)])
def test_choices_are_sorted_alike_whether_key_and_index_fit_one_integer_or_not(num_experts):
    experts_TK = np.random.default_rng(0).integers(0, num_experts + 1, (T, K)).astype(np.int32)
    experts_TK[::3] = num_experts  # masked tokens have the largest key
    expert_S, choice_S = jax.jit(functools.partial(_sort_with_index, num_experts=num_experts))(
        experts_TK.ravel()
    )
    expected_S = np.argsort(experts_TK.ravel(), kind="stable")
    np.testing.assert_array_equal(choice_S, expected_S)
    np.testing.assert_array_equal(expert_S, experts_TK.ravel()[expected_S])
