"""Routers: against the oracle, against the published implementations, and what they promise about
masks and ties.
"""

import dataclasses
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
from moejax.config import MoeConfig, resolve
from moejax.moe.router import RouterInputs, route

FIXTURES = Path(__file__).parents[3] / "../shared/routing-fixtures"
T, E = 6, 4

ALLOWED = [
    ("softmax_topk", 1, False),
    ("softmax_topk", 2, False),
    ("softmax_topk", 2, True),
    ("softmax_topk", 4, False),
    ("softmax_topk", 4, True),
    ("switch", 1, False),
]


@functools.cache
def router(name, top_k, renormalize):
    """The jitted router `(logits_TE, mask_T) -> Routing`."""
    config = MoeConfig(
        num_experts=E, top_k=top_k, router=name, score="softmax", renormalize=renormalize
    )
    return jax.jit(
        lambda logits_TE, mask_T: route(RouterInputs(logits_TE, mask_T, len(mask_T)), config)
    )


def expect(logits_TE, mask_T, top_k, renormalize):
    """The oracle's probabilities, experts (E at padding) and weights."""
    num_experts = logits_TE.shape[1]
    probs, experts, weights = zip(
        *(oracle.route_one(row, top_k, renormalize) for row in logits_TE), strict=True
    )
    experts_TK = np.where(mask_T[:, None], np.array(experts), num_experts)
    return np.array(probs), experts_TK, np.where(mask_T[:, None], np.array(weights), 0)


@pytest.mark.parametrize(("name", "top_k", "renormalize"), ALLOWED)
@settings(max_examples=25, deadline=None)
@given(
    logits=st.lists(st.lists(st.integers(-40, 40), min_size=E, max_size=E), min_size=T, max_size=T),
    mask=st.lists(st.booleans(), min_size=T, max_size=T),
)
def test_any_logits_are_routed_as_the_oracle_routes_them_ties_included(
    name, top_k, renormalize, logits, mask
):
    logits_TE, mask_T = np.array(logits, np.float32) / 4, np.array(mask)
    routing = router(name, top_k, renormalize)(logits_TE, mask_T)
    probs_TE, experts_TK, weights_TK = expect(logits_TE, mask_T, top_k, renormalize)
    np.testing.assert_array_equal(routing.experts_TK, experts_TK)
    oracle.assert_close(routing.weights_TK, weights_TK)
    oracle.assert_close(routing.probs_TE, probs_TE)
    np.testing.assert_array_equal(routing.logits_TE, logits_TE)


def test_ties_go_to_the_lowest_index():
    routing = router("softmax_topk", 2, True)(jnp.zeros((T, E)), jnp.ones(T, bool))
    assert routing.experts_TK.tolist() == [[0, 1]] * T


def test_renormalised_weights_equal_the_softmax_over_the_selected_logits():
    logits_TE = jax.random.normal(jax.random.key(0), (T, E)) * 5
    routing = router("softmax_topk", 2, True)(logits_TE, jnp.ones(T, bool))
    selected_TK = np.sort(np.asarray(logits_TE), axis=1)[:, :-3:-1]
    oracle.assert_close(routing.weights_TK, [oracle.softmax(row) for row in selected_TK])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_extreme_logits_give_finite_weights_and_gradients(scale):
    logits_TE = scale * jnp.array([[1.0, -1.0, 0.5, -3.0]] * T)

    def first_weights(logits_TE):
        return router("softmax_topk", 2, True)(logits_TE, jnp.ones(T, bool)).weights_TK[:, 0].sum()

    value, gradient = jax.value_and_grad(first_weights)(logits_TE)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_masked_tokens_give_the_logits_no_gradient():
    mask_T = jnp.arange(T) < 4

    def weight(logits_TE):
        return jnp.sum(router("softmax_topk", 2, False)(logits_TE, mask_T).weights_TK[:, 0])

    gradient_TE = jax.grad(weight)(jax.random.normal(jax.random.key(2), (T, E)))
    assert np.all(np.any(gradient_TE[:4] != 0, axis=1)) and not np.any(gradient_TE[4:])


@pytest.mark.parametrize(
    ("name", "top_k", "renormalize"), [("softmax_topk", 1, True), ("switch", 1, True)]
)
def test_one_renormalised_weight_has_no_gradient_and_is_refused(name, top_k, renormalize):
    def weight(logits_TE):
        return router(name, top_k, renormalize)(logits_TE, jnp.ones(T, bool)).weights_TK.sum()

    assert not np.any(np.abs(jax.grad(weight)(jax.random.normal(jax.random.key(3), (T, E)))) > 1e-6)
    moe = dataclasses.asdict(
        MoeConfig(num_experts=E, top_k=top_k, router=name, renormalize=renormalize)
    )
    with pytest.raises(ValueError, match=r"moe\.renormalize=True with moe\.top_k=1"):
        resolve({"moe": moe})


FAMILIES = {
    "mixtral": {"score": "softmax"},
    "olmoe": {"score": "softmax", "renormalize": False},
    "qwen2_moe": {"score": "softmax", "renormalize": False},
    "switch_transformers": {"router": "switch", "score": "softmax", "renormalize": False},
    "gpt_oss": {"score": "softmax_after"},
    "deepseek_v3": {
        "router": "sigmoid_topk",
        "score": "sigmoid",
        "num_groups": 4,
        "top_k_groups": 2,
        "route_scale": 2.5,
        "selection_bias": True,
    },
}


def check_family(logits_TE, experts_TK, weights_TK, config, **more):
    """Checks that experts are equal in any order; returns both weights by expert."""
    inputs = RouterInputs(
        jnp.asarray(logits_TE), jnp.ones(len(logits_TE), bool), len(logits_TE), **more
    )
    routing = jax.device_get(route(inputs, config))
    order_TK, their_order_TK = (
        np.argsort(routing.experts_TK, axis=1),
        np.argsort(experts_TK, axis=1),
    )
    np.testing.assert_array_equal(
        np.take_along_axis(routing.experts_TK, order_TK, 1),
        np.take_along_axis(experts_TK, their_order_TK, 1),
    )
    ours_TK, theirs_TK = (
        np.take_along_axis(w, o, 1)
        for w, o in ((routing.weights_TK, order_TK), (weights_TK, their_order_TK))
    )
    return ours_TK, theirs_TK


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_equals_that_of_the_published_implementation(family):
    if not FIXTURES.exists():
        pytest.skip(f"the fixtures of published routers are not at {FIXTURES}")
    rule = json.loads((FIXTURES / "index.json").read_text())[family]["config"]
    arrays = np.load(FIXTURES / f"{family}.npz")
    layers = [name.removesuffix(".logits") for name in arrays.files if name.endswith(".logits")]
    assert len(layers) >= 2
    for layer in layers:
        logits_TE, experts_TK, weights_TK = (
            arrays[f"{layer}.{what}"] for what in ("logits", "indices", "weights")
        )
        config = MoeConfig(
            num_experts=logits_TE.shape[1],
            top_k=rule.get("num_experts_per_tok", 1),
            **FAMILIES[family],
        )
        bias = f"bias.{layer.split('.')[-1]}"
        bias_E = jnp.asarray(arrays[bias]) if bias in arrays.files else None
        assert (bias_E is not None) == config.selection_bias
        ours_TK, theirs_TK = check_family(logits_TE, experts_TK, weights_TK, config, bias_E=bias_E)
        if (
            f"{layer}.kept" in arrays
        ):  # there, dropped choices have weight 0; dropping is not the router's in moejax
            theirs_TK = np.where(arrays[f"{layer}.kept"], theirs_TK, ours_TK)
        oracle.assert_close(ours_TK, theirs_TK)


MORE_FAMILIES = {
    "phimoe": {"router": "sparse_mixer", "mixer_threshold": 0.1},
    "ernie4_5_moe": {"selection_bias": True},
    "llama4": {"router": "sigmoid_topk", "score": "sigmoid", "renormalize": False, "top_k": 1},
    "granitemoe": {"score": "softmax_after"},
    "deepseek_v2": {
        "num_groups": 4,
        "top_k_groups": 2,
        "group_score": "max",
        "renormalize": False,
        "route_scale": 2.5,
    },
    "minimax_m2": {"router": "sigmoid_topk", "score": "sigmoid", "selection_bias": True},
    "longcat_flash": {
        "selection_bias": True,
        "renormalize": False,
        "route_scale": 2.5,
        "num_experts": 10,
        "num_identity_experts": 6,
    },
    "glm4_moe": {
        "router": "sigmoid_topk",
        "score": "sigmoid",
        "selection_bias": True,
        "route_scale": 2.5,
    },
    "jamba": {"renormalize": False},
    "deepseek_v4": {
        "router": "sigmoid_topk",
        "score": "sqrt_softplus",
        "selection_bias": True,
        "route_scale": 2.5,
    },
    "deepseek_v4_hash": {"router": "hash", "score": "sqrt_softplus", "route_scale": 2.5},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_routing_equals_that_of_further_published_implementations(family):
    with np.load(
        Path(__file__).parents[2] / "files/published_routing.npz", allow_pickle=False
    ) as file:
        arrays = {
            name.split(".")[1]: file[name] for name in file.files if name.startswith(f"{family}.")
        }
    top_k = arrays["indices"].shape[1]
    config = MoeConfig(
        **({"num_experts": 16, "top_k": top_k, "score": "softmax"} | MORE_FAMILIES[family])
    )
    optional = {"bias_E": "bias", "table_VK": "table", "tokens_T": "tokens"}
    more = {field: jnp.asarray(arrays[name]) for field, name in optional.items() if name in arrays}
    assert ("bias_E" in more) == config.selection_bias
    oracle.assert_close(
        *check_family(arrays["logits"], arrays["indices"], arrays["weights"], config, **more)
    )
