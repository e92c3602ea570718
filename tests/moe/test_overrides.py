"""Overrides of the routing are data: stacked, by layer, and against layers made that way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.moe import info_of
from cases.training import OTHER_CASES, ROUTER_CASES, packed_batch, small_config
from moejax.config import MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.models import Decoder
from moejax.moe.layer import MoE
from moejax.moe.overrides import OverridesError, RoutingOverrides

B, L, D, E = 2, 16, 8, 4


def layer_of(case, **leaves):
    sizes = {"num_experts": E, "top_k": 2, "d_expert": 6, "grouped_matmul": "dense"}
    config = derive_moe(MoeConfig(**sizes | case), L)
    return MoE(config, D, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=1), **leaves)


def run_layer(layer, overrides, *, is_stacked=False):
    """The layer's output and statistics, of each of several overrides if they are stacked."""
    rng = np.random.default_rng(3)
    x_BLD = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
    mask_BL = rng.random((B, L)) < 0.85
    graphdef, state = nnx.split(layer)

    def apply(state, overrides):
        info = info_of(layer.config, mask_BL, overrides=overrides)
        return nnx.merge(graphdef, state)(x_BLD, info)

    run = jax.vmap(apply, in_axes=(None, 0)) if is_stacked else apply
    return jax.device_get(jax.jit(run)(state, overrides))


def each_expert(num):
    return jnp.eye(num, dtype=bool)


STACKS = {
    "blocked": ({"router": "sigmoid_topk"}, RoutingOverrides(is_blocked_E=each_expert(E))),
    "ablated": ({}, RoutingOverrides(is_ablated_E=each_expert(E))),
    "active K": ({}, RoutingOverrides(active_top_k=jnp.arange(1, 3))),
    "capacity": ({}, RoutingOverrides(capacity_factor=jnp.array([0.5, 1.0, 4.0]))),
    "two at once": (
        {},
        RoutingOverrides(is_blocked_E=each_expert(E), active_top_k=jnp.array([1, 2, 1, 2])),
    ),
}


@pytest.mark.parametrize("case", STACKS)
def test_stacked_overrides_give_what_each_gives_alone(case):
    changes, stacked = STACKS[case]
    layer = layer_of(changes)
    together = run_layer(layer, stacked, is_stacked=True)
    num = len(jax.tree.leaves(stacked)[0])
    for i in range(num):
        alone = run_layer(layer, jax.tree.map(lambda array_I, i=i: array_I[i], stacked))
        one_of_all = jax.tree.map(lambda array_I, i=i: array_I[i], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one_of_all, alone
        )
    assert len({array.tobytes() for array in together[0]}) == num


ABLATED = {
    "output": {},
    "input and biases": {"weight_on": "input", "expert_bias": True},
    "expert_choice": {"router": "expert_choice"} | ROUTER_CASES["expert_choice"],
    "soft": {"router": "soft"} | ROUTER_CASES["soft"],
}


@pytest.mark.parametrize("case", ABLATED)
def test_an_ablated_expert_is_one_whose_output_weights_are_zero(case):
    layer = layer_of(ABLATED[case])
    trained_BLD, trained = run_layer(layer, RoutingOverrides())
    overrides = RoutingOverrides(is_ablated_E=jnp.arange(E) == 1)
    y_BLD, stats = run_layer(layer, overrides)
    for name in ("down", "down_bias"):
        if hasattr(layer.experts, name):
            variable = getattr(layer.experts, name)
            variable[...] = variable[...].at[1].set(0.0)
    zero_BLD, _ = run_layer(layer, RoutingOverrides())
    np.testing.assert_allclose(y_BLD, zero_BLD, rtol=1e-6, atol=1e-6)
    assert np.abs(y_BLD - trained_BLD).max() > 1e-3
    np.testing.assert_array_equal(stats.assignments_E, trained.assignments_E)
    assert stats.gate_mass == trained.gate_mass


def test_a_constant_expert_is_ablated_like_one_with_weights():
    case = OTHER_CASES["experts"]["moe"] | {"expert_dropout": 0.0}
    layer = layer_of(case)
    last = layer.config.num_choices - 1
    is_ablated_E = jnp.arange(layer.config.num_choices) == last
    y_BLD, _ = run_layer(layer, RoutingOverrides(is_ablated_E=is_ablated_E))
    trained_BLD, _ = run_layer(layer, RoutingOverrides())
    vectors = layer.zero_computation_experts.vectors
    vectors[...] = vectors[...].at[-1].set(0.0)
    expected_BLD, _ = run_layer(layer, RoutingOverrides())
    np.testing.assert_allclose(y_BLD, expected_BLD, rtol=1e-6, atol=1e-6)
    assert np.abs(y_BLD - trained_BLD).max() > 1e-3


def test_the_active_k_of_an_override_takes_the_place_of_the_scheduled_one():
    scheduled = layer_of({}, active_top_k=2)
    of_one = run_layer(scheduled, RoutingOverrides(active_top_k=jnp.int32(1)))
    expected = run_layer(layer_of({}, active_top_k=1), RoutingOverrides())
    jax.tree.map(np.testing.assert_array_equal, of_one, expected)
    assert of_one[1].assignments_E.sum() == of_one[1].num_tokens


def test_a_capacity_factor_is_that_of_an_evaluation_with_capacity():
    overridden = run_layer(layer_of({}), RoutingOverrides(capacity_factor=jnp.float32(0.5)))
    with_capacity = layer_of({"dispatch": "capacity", "eval_capacity_factor": 0.5})
    expected = run_layer(with_capacity, RoutingOverrides())
    jax.tree.map(np.testing.assert_array_equal, overridden, expected)
    assert overridden[1].dropped > 0


def test_every_moe_layer_of_a_model_has_its_own_overrides():
    config = small_config(moe={"every": 2}, model={"num_layers": 5})  # layers 1 and 3 are MoE
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    batch = jax.tree.map(jnp.asarray, packed_batch(config))
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, overrides):
        arrays = (batch.tokens_BL, batch.segments_BL, batch.positions_BL)
        return nnx.merge(graphdef, state)(*arrays, overrides=overrides)

    is_blocked_NE = jnp.arange(E)[None] == jnp.array([[1], [3]])
    _, (stats,) = run(state, RoutingOverrides(is_blocked_E=is_blocked_NE))
    assert ((stats.assignments_E == 0) == is_blocked_NE).all()
    too_many = RoutingOverrides(is_blocked_E=jnp.zeros((3, E), bool))
    with pytest.raises(
        OverridesError, match=r"is_blocked_E has shape \(3, 4\); its first axis must be the 2 MoE"
    ):
        run(state, too_many)


REFUSED = {
    "blocked shape": ({}, {"is_blocked_E": jnp.zeros(3, bool)}, r"shape \(3,\); it must be \(4,\)"),
    "ablated shape": ({}, {"is_ablated_E": jnp.zeros(5, bool)}, r"shape \(5,\); it must be \(4,\)"),
    "K shape": ({}, {"active_top_k": jnp.ones(1, int)}, r"shape \(1,\); it must be \(\)"),
    "factor shape": ({}, {"capacity_factor": jnp.ones(2)}, r"shape \(2,\); it must be \(\)"),
    "fixed K": ({"router": "sparse_mixer"}, {"active_top_k": jnp.int32(1)}, "a fixed moe.top_k"),
    "no capacity": (
        {"router": "soft"} | ROUTER_CASES["soft"],
        {"capacity_factor": jnp.float32(1)},
        "moe.router=soft: experts choose, and none can overflow",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_overrides_that_a_layer_cannot_follow_are_refused(case):
    changes, fields, words = REFUSED[case]
    with pytest.raises(OverridesError, match=words):
        run_layer(layer_of(changes), dataclasses.replace(RoutingOverrides(), **fields))
