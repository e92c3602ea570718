"""Blocked experts: no token visits them, the next in rank takes their place, and other tokens do
not notice.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.moe import info_of
from cases.training import OTHER_CASES, ROUTER_CASES
from moejax.config import ROUTER_RULES, MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.moe.layer import MoE
from moejax.moe.overrides import OverridesError, RoutingOverrides
from moejax.moe.router import UNRANKED
from oracle import routers as truth

B, L, D = 2, 16, 8
RANKED = [name for name in ROUTER_RULES if name not in UNRANKED]
CASES = {name: {"router": name} | ROUTER_CASES[name] for name in RANKED}
CASES["groups of three"] = {
    "router": "sigmoid_topk",
    "num_experts": 6,
    "num_groups": 2,
    "selection_bias": True,
    "renormalize": False,
}
CASES["groups of four"] = {
    "router": "hierarchical", "num_experts": 8, "num_groups": 2, "top_k_groups": 2, "top_k": 4,
}  # fmt: skip
CASES["zero-computation experts"] = OTHER_CASES["experts"]["moe"] | {
    "expert_dropout": 0.0,
    "shared_combine": "sum",
}
CASES["next"] = {"dispatch": "capacity", "eval_capacity_factor": 0.7, "overflow": "next"}


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, x_BLD, info):
    return nnx.merge(graphdef, state)(x_BLD, info)


def layer_of(case):
    """A layer whose router and bias matter."""
    config = derive_moe(
        MoeConfig(
            **{"num_experts": 4, "top_k": 2, "d_expert": 6, "grouped_matmul": "dense"} | case
        ),
        L,
    )
    layer = MoE(config, D, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=1))
    rng = np.random.default_rng(0)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    if "router" in params:
        params["router"] = jax.tree.map(
            lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype), params["router"]
        )
    if config.has_selection_bias:
        rest["selection_bias"].set_value(
            jnp.asarray(rng.normal(size=config.num_choices) / 4, jnp.float32)
        )
    return nnx.merge(graphdef, params, rest)


def route(layer, experts):
    """The layer's output and token-level routing without some experts, on the host."""
    is_blocked_E = np.isin(np.arange(layer.config.num_choices), experts)
    overrides = RoutingOverrides(is_blocked_E=jnp.asarray(is_blocked_E))
    rng = np.random.default_rng(3)
    x_BLD, mask_BL = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32), rng.random((B, L)) < 0.85
    info = info_of(layer.config, mask_BL, trace=True, overrides=overrides)
    y_BLD, stats = apply(*nnx.split(layer), x_BLD, info)
    return mask_BL.ravel(), np.asarray(y_BLD).reshape(-1, D), jax.device_get(stats)


@pytest.mark.parametrize("case", CASES)
def test_the_next_in_rank_takes_a_blocked_experts_place_and_other_tokens_do_not_notice(case):
    layer = layer_of(CASES[case])
    none, top_k = layer.config.num_choices, layer.config.top_k
    mask_T, y_TD, trained = route(layer, [])
    expert = int(np.argmax(trained.assignments_E))
    _, changed_TD, changed = route(layer, [expert])
    before_TK, after_TK = trained.routing.experts_TK, changed.routing.experts_TK
    assert changed.assignments_E[expert] == 0 and not (after_TK == expert).any()
    assert not changed.routing.weights_TK[after_TK == none].any() and np.isfinite(changed_TD).all()
    if expert < layer.config.num_experts:  # nothing comes out of it
        down = layer.experts.down
        layer.experts.down = down.replace(down[...].at[expert].set(1e6))
        np.testing.assert_array_equal(route(layer, [expert])[1], changed_TD)
    if layer.config.num_groups > 1 and layer.config.router != "hierarchical":
        return  # without the expert another group may rank before its own: see below
    affected_T = (before_TK == expert).any(axis=1)
    assert 0 < affected_T.sum() < len(mask_T) or top_k == none
    np.testing.assert_array_equal(after_TK[~affected_T], before_TK[~affected_T])
    # With overflow="next" tokens share the experts' room; sparse_mixer's weights are shares among
    # all that are near.
    if case not in ("next", "sparse_mixer"):
        np.testing.assert_array_equal(changed_TD[~affected_T], y_TD[~affected_T])
    for token in np.flatnonzero(affected_T):
        stays = [e for e in before_TK[token] if e != expert]
        new = [e for e in after_TK[token] if e not in stays]
        assert len(new) == 1 and set(stays) < {*after_TK[token]}
        ranking_E = trained.routing.ranking_TE[token].copy()
        ranking_E[before_TK[token]] = -np.inf
        if (
            layer.config.router == "hierarchical"
        ):  # the next of its group, if a token does not visit all of that
            group_E = np.arange(none) * layer.config.num_groups // none
            ranking_E[group_E != group_E[expert]] = -np.inf
        if (
            layer.config.router == "hierarchical" and ranking_E.max() == -np.inf
        ):  # and else of another one
            assert new != [none]
        elif layer.config.router != "random":  # which ranks by a draw
            assert new == [np.argmax(ranking_E) if ranking_E.max() > -np.inf else none]


MANY = {"num_experts": 12, "num_groups": 4, "top_k_groups": 2, "top_k": 4}
VISITS = CASES | {
    "two best of each group": MANY | {"router": "sigmoid_topk", "selection_bias": True},
    "best of each group": MANY
    | {"router": "softmax_topk", "group_score": "max", "selection_bias": True},
    "two levels": MANY | {"router": "hierarchical"},
}


@pytest.mark.parametrize("case", VISITS)
def test_a_token_visits_top_k_experts_wherever_that_many_are_left(case):
    layer = layer_of(VISITS[case])
    none, config, rng = layer.config.num_choices, layer.config, np.random.default_rng(4)
    bias_E = np.asarray(layer.selection_bias[...]) if config.has_selection_bias else np.zeros(none)
    for num_blocked in range(1, none):
        blocked = {int(e) for e in rng.choice(none, num_blocked, replace=False)}
        mask_T, _, stats = route(layer, list(blocked))
        experts_TK = stats.routing.experts_TK
        num_visits_T = (experts_TK < none).sum(axis=1)
        if case != "next":  # where slots run out
            assert set(num_visits_T[mask_T]) == {min(config.top_k, none - num_blocked)}, blocked
        assert not blocked & set(experts_TK.ravel().tolist())
        if case in ("two best of each group", "best of each group", "groups of three"):
            for token in np.flatnonzero(mask_T):
                values_E = truth.scores_one(stats.routing.logits_TE[token], config.score) + bias_E
                groups = config.num_groups, config.top_k_groups, config.group_score
                allowed = truth.allowed_by_groups(values_E.tolist(), *groups, blocked, config.top_k)
                expected = truth.select_one(values_E, config.top_k, allowed)
                assert experts_TK[token][: len(expected)].tolist() == expected
        weights_TK = stats.routing.weights_TK
        assert np.isfinite(weights_TK).all()
        if config.router == "hierarchical":  # shares of what a token visits
            np.testing.assert_allclose(weights_TK.sum(axis=1)[mask_T], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "case", ["softmax_topk", "sparse_mixer", "hierarchical", "dense", "random", "sinkhorn"]
)
def test_where_too_few_experts_are_left_tokens_have_fewer_or_none(case):
    layer = layer_of(CASES[case])
    num = layer.config.num_choices
    _, y_TD, stats = route(layer, range(1, num))
    visited = stats.routing.experts_TK
    assert set(visited.ravel().tolist()) <= {0, num} and ((visited == 0).sum(axis=1) <= 1).all()
    assert stats.assignments_E[0] > 0
    assert np.isfinite(y_TD).all() and np.isfinite(stats.routing.weights_TK).all()
    assert not stats.routing.weights_TK[visited == num].any()
    _, y_TD, stats = route(layer, range(num))
    assert not y_TD.any() and not stats.assignments_E.any() and not stats.routing.weights_TK.any()


def test_those_who_are_left_share_the_weight_if_the_run_normalises():
    layer = layer_of({"router": "dense", "top_k": 4})
    mask_T, _, trained = route(layer, [])
    _, _, changed = route(layer, [2])
    for token in np.flatnonzero(mask_T):
        probs_E = trained.routing.probs_TE[token]
        expected = np.delete(probs_E, 2) / np.delete(probs_E, 2).sum()
        weights = dict(
            zip(changed.routing.experts_TK[token], changed.routing.weights_TK[token], strict=True)
        )
        np.testing.assert_allclose([weights[e] for e in (0, 1, 3)], expected, rtol=1e-5)
        assert weights[4] == 0


@pytest.mark.parametrize("router", UNRANKED)
def test_a_router_that_ranks_no_experts_refuses(router):
    layer = layer_of({"router": router} | ROUTER_CASES[router])
    with pytest.raises(
        OverridesError, match=rf"moe.router={router} ranks no expert.*any router but hash, balanced"
    ):
        route(layer, [])
