"""In a bfloat16 layer combine weights and sums over experts are float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import oracle
from cases.moe import info_of
from cases.training import ROUTER_CASES
from moejax.config import ROUTER_RULES, MoeConfig
from moejax.config.sections.moe import derive_moe
from moejax.moe.dispatch.assignment import ExpertChoice, SoftSlots, TokenChoice
from moejax.moe.dispatch.on_device import (
    run_dropless,
    run_expert_choice,
    run_soft_slots,
    run_with_capacity,
)
from moejax.moe.expert_parallel.exchange import exchange
from moejax.moe.expert_parallel.strategy import LocalExperts, Strategy
from moejax.moe.experts.experts import ExpertWeights, Network
from moejax.moe.layer import MoE
from moejax.moe.router.modules import make_router
from moejax.sharding import MESH_AXES

L, D = 16, 8
HALF = 0.5001
"""Of a unit in the last place: the error of one rounding."""


def ulp(y):
    """The distance between neighbours in bfloat16, which has 8 bits, at each value."""
    return 2.0 ** (np.floor(np.log2(np.abs(y))) - 7)


def exact_experts(num_experts, seed=0):
    """Weights of relu networks by which expert e multiplies positive inputs by a whole number,
    without rounding.
    """
    factors_E = np.random.default_rng(seed).integers(1, 8, num_experts)
    gate_up_EDPF = np.broadcast_to(np.eye(D)[None, :, None], (num_experts, D, 1, D))
    down_EFD = factors_E[:, None, None] * np.eye(D)
    weights = ExpertWeights(
        jnp.asarray(gate_up_EDPF, jnp.bfloat16),
        jnp.asarray(down_EFD, jnp.bfloat16),
        network=Network("relu"),
    )
    return factors_E, weights


def tokens(seed=0):
    """Small positive whole numbers, so that products with `exact_experts` are exact: only weights
    are not.
    """
    return np.random.default_rng(seed).integers(1, 5, (1, L, D)).astype(np.float64)


def choices(num_experts, top_k, seed=0):
    rng = np.random.default_rng(seed)
    experts_BLK = np.argsort(rng.normal(size=(1, L, num_experts)), axis=-1)[..., :top_k].astype(
        np.int32
    )
    return jnp.asarray(experts_BLK), jnp.asarray(rng.random((1, L, top_k)), jnp.float32)


def expected_of(x_BLD, factors_E, experts_BLK, weights_BLK):
    weights_BL = (np.asarray(weights_BLK, np.float64) * factors_E[np.asarray(experts_BLK)]).sum(
        axis=-1
    )
    return weights_BL[..., None] * x_BLD


def check_rounded_once(y_BLD, expected_BLD):
    assert y_BLD.dtype == jnp.bfloat16
    error_BLD = np.abs(np.asarray(y_BLD, np.float64) - expected_BLD)
    assert (error_BLD <= HALF * ulp(expected_BLD)).all()


LOCAL = {
    name: functools.partial(run_dropless, implementation=name)
    for name in ("tiled", "padded", "ragged", "dense")
}
LOCAL["capacity"] = functools.partial(run_with_capacity, slots=L)


@pytest.mark.parametrize("path", LOCAL)
def test_weighted_sums_of_bfloat16_outputs_are_rounded_once(path):
    factors_E, weights = exact_experts(8)
    experts_BLK, weights_BLK = choices(8, 8)
    x_BLD = tokens()
    run = jax.jit(LOCAL[path])
    y_BLD = run(jnp.asarray(x_BLD, jnp.bfloat16), TokenChoice(experts_BLK, weights_BLK), weights)
    check_rounded_once(y_BLD, expected_of(x_BLD, factors_E, experts_BLK, weights_BLK))


def test_gradients_of_the_weights_are_those_of_unrounded_sums():
    factors_E, weights = exact_experts(8)
    experts_BLK, weights_BLK = choices(8, 8)
    x_BLD, dy_BLD = tokens(), tokens(1)

    def objective(weights_BLK, x_BLD):
        y_BLD = LOCAL["padded"](x_BLD, TokenChoice(experts_BLK, weights_BLK), weights)
        return jnp.sum(y_BLD.astype(jnp.float32) * dy_BLD.astype(np.float32))

    run = jax.jit(jax.grad(objective, (0, 1)))
    dweights_BLK, dx_BLD = run(weights_BLK, jnp.asarray(x_BLD, jnp.bfloat16))
    expected_BLK = (x_BLD * dy_BLD).sum(axis=-1)[..., None] * factors_E[np.asarray(experts_BLK)]
    np.testing.assert_array_equal(dweights_BLK, expected_BLK)
    # Each row's gradient is rounded to bfloat16 on its way back to the token; their sum is not,
    # until the end.
    expected_BLD = expected_of(dy_BLD, factors_E, experts_BLK, weights_BLK)
    error_BLD = np.asarray(dx_BLD, np.float64) - expected_BLD
    assert np.sqrt(np.mean((error_BLD / expected_BLD) ** 2)) < 2**-8.5


def test_weights_on_the_input_are_float32():
    factors_E, weights = exact_experts(8)
    experts_BLK, weights_BLK = choices(8, 1)
    x_BLD = tokens()
    chosen = TokenChoice(experts_BLK, jnp.ones_like(weights_BLK), weights_BLK)
    y_BLD = jax.jit(LOCAL["padded"])(jnp.asarray(x_BLD, jnp.bfloat16), chosen, weights)
    error_BLD = np.abs(
        np.asarray(y_BLD, np.float64) / expected_of(x_BLD, factors_E, experts_BLK, weights_BLK) - 1
    )
    assert (
        error_BLD.max() <= 2**-8 + 2**-9
    )  # the input and the output are rounded, and the weight is not


def test_an_experts_choice_adds_many_experts_up_without_rounding_between():
    factors_E, weights = exact_experts(64)
    x_BLD, rng = tokens(), np.random.default_rng(0)
    weights_BEC = rng.random((1, 64, L)).astype(np.float32)
    positions_BEC = np.broadcast_to(np.arange(L, dtype=np.int32), weights_BEC.shape)
    slots = ExpertChoice(jnp.asarray(positions_BEC), jnp.asarray(weights_BEC))

    def run(x_BLD):
        return run_expert_choice(x_BLD, slots, weights)

    y_BLD, pull = jax.jit(lambda x: jax.vjp(run, x))(jnp.asarray(x_BLD, jnp.bfloat16))
    scale_L = (weights_BEC[0].astype(np.float64) * factors_E[:, None]).sum(axis=0)
    check_rounded_once(y_BLD, scale_L[None, :, None] * x_BLD)
    # The gradients of 64 rows, each rounded on its own, and their sum.
    dx_BLD = np.asarray(jax.jit(pull)(jnp.ones((1, L, D), jnp.bfloat16))[0], np.float64)
    assert np.sqrt(np.mean((dx_BLD / scale_L[None, :, None] - 1) ** 2)) < 2**-8.5


def test_soft_mixtures_are_rounded_once_a_way():
    factors_E, weights = exact_experts(8)
    rng = np.random.default_rng(0)
    combine_BLES = rng.random((1, L, 8, 2)).astype(np.float32)
    dispatch_BLES = np.zeros_like(combine_BLES)
    dispatch_BLES[:, 3] = 1  # the same exact token in every slot
    mixing = SoftSlots(jnp.asarray(dispatch_BLES), jnp.asarray(combine_BLES))
    x_BLD = tokens()
    y_BLD = jax.jit(run_soft_slots)(jnp.asarray(x_BLD, jnp.bfloat16), mixing, weights)
    scale_L = (combine_BLES[0].astype(np.float64) * factors_E[:, None]).sum(axis=(1, 2))
    check_rounded_once(y_BLD, scale_L[None, :, None] * x_BLD[:, 3:4])


@pytest.mark.parametrize(
    "strategy", ["gather", "ring", "all_to_all", "ragged", "dedup", "two_level"]
)
def test_weights_travel_as_float32(strategy):
    factors_E, weights = exact_experts(8)
    x_BLD = np.concatenate([tokens(seed) for seed in range(4)])
    drawn = [
        choices(8, 1, seed) for seed in range(4)
    ]  # of one device each: nothing is rounded on the way back
    experts_BLK, weights_BLK = (jnp.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    local = LocalExperts(functools.partial(run_dropless, implementation="auto"))
    mesh = jax.make_mesh(
        (1, 1, 2, 2, 1, 1), MESH_AXES, (AxisType.Auto,) * 6, devices=jax.devices()[:4]
    )
    expected_BLD = expected_of(x_BLD, factors_E, experts_BLK, weights_BLK)
    with jax.set_mesh(mesh):

        @jax.jit
        def run(x_BLD, experts_BLK, weights_BLK, weights):
            how, chosen = Strategy(strategy, 2.0), TokenChoice(experts_BLK, weights_BLK)
            return exchange(how, local, local, x_BLD, chosen, weights)[0]

        arrays = jnp.asarray(x_BLD, jnp.bfloat16), experts_BLK, weights_BLK, weights
        y_BLD = jax.device_get(run(*arrays))
    check_rounded_once(y_BLD, expected_BLD)


def run_layer(layer, x_BLD):
    """Output and token-level routing of a layer in bfloat16."""
    info = info_of(layer.config, np.ones(x_BLD.shape[:2], bool), trace=True)
    graphdef, state = nnx.split(layer)
    run = jax.jit(lambda state, x_BLD: nnx.merge(graphdef, state)(x_BLD, info))
    y_BLD, stats = run(state, jnp.asarray(x_BLD, jnp.bfloat16))
    return y_BLD, jax.device_get(stats.routing)


def layer_of(**leaves):
    config = derive_moe(MoeConfig(num_experts=4, d_expert=D, activation="relu", **leaves), L)
    return MoE(config, D, jnp.dtype("bfloat16"), vocab_size=7, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("how", ["gated", "averaged"])
def test_a_shared_experts_gate_and_sum_are_float32(how):
    layer, x_BLD = (
        layer_of(num_shared_experts=1, shared_combine=how, top_k=1, renormalize=False),
        tokens(),
    )
    factors_E, exact = exact_experts(4)
    layer.experts.gate_up[...], layer.experts.down[...] = (
        w.astype(jnp.float32) for w in (exact.gate_up_EDPF, exact.down_EFD)
    )
    if how == "gated":  # alone
        layer.experts.down[...] = jnp.zeros_like(layer.experts.down[...])
    layer.shared.gate_up[...], layer.shared.down[...] = jnp.eye(D)[:, None, :], 3 * jnp.eye(D)
    y_BLD, routing = run_layer(layer, x_BLD)
    if how == "gated":
        logits_BL1 = x_BLD @ np.asarray(layer.shared_gate[...], np.float64)
        check_rounded_once(y_BLD, 3 * x_BLD / (1 + np.exp(-logits_BL1)))
    else:  # the routed part is rounded before
        routed_BLD = (routing.weights_TK * factors_E[routing.experts_TK])[None].astype(
            np.float64
        ) * x_BLD
        check_rounded_once(
            y_BLD, (np.asarray(jnp.asarray(routed_BLD, jnp.bfloat16), np.float64) + 3 * x_BLD) / 2
        )


def test_zero_computation_experts_are_weighed_and_added_in_float32():
    layer, x_BLD = layer_of(num_identity_experts=4, num_constant_experts=4, top_k=8), tokens()
    vectors_JD = np.random.default_rng(0).integers(1, 8, (4, D))
    layer.zero_computation_experts.vectors[...] = jnp.asarray(vectors_JD, jnp.float32)
    layer.experts.down[...] = jnp.zeros_like(layer.experts.down[...])
    y_BLD, routing = run_layer(layer, x_BLD)
    expected_TD = np.zeros((L, D))
    for t, (experts_K, weights_K) in enumerate(
        zip(routing.experts_TK, routing.weights_TK, strict=True)
    ):
        for expert, weight in zip(experts_K, weights_K.astype(np.float64), strict=True):
            if expert >= 4:
                expected_TD[t] += weight * (x_BLD[0, t] if expert < 8 else vectors_JD[expert - 8])
    check_rounded_once(y_BLD, expected_TD[None])


@pytest.mark.parametrize("router", ROUTER_RULES)
def test_no_accelerator_rounds_what_logits_are_made_of(router):
    config = derive_moe(
        MoeConfig(**{"num_experts": 4, "d_expert": 8, "router": router} | ROUTER_CASES[router]), L
    )
    module = nnx.eval_shape(lambda: make_router(config, D, rngs=nnx.Rngs(params=0)))
    graphdef, state = nnx.split(module)
    x_BLD = jax.ShapeDtypeStruct((2, L, D), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda state, x_BLD: nnx.merge(graphdef, state)(x_BLD).logits_BLE)(
        state, x_BLD
    )
    products = [
        equation for equation in oracle.equations(jaxpr) if equation.primitive.name == "dot_general"
    ]
    assert len(products) > 0 or config.score == "uniform"
    for equation in products:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
