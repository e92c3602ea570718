"""Experts of every kind: activations, biases, free, latent and shared ones, weights on the input,
expert dropout.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import oracle
from cases.moe import info_of
from moejax.config import ConfigError, MoeConfig, resolve
from moejax.config.sections.moe import derive_moe
from moejax.moe.dispatch.plan import plan_dropless
from moejax.moe.experts.experts import Network
from moejax.moe.layer import MoE
from moejax.sharding import MESH_AXES
from oracle import experts as oracle_experts

B, L, D, F, E = 2, 7, 6, 8, 4

VARIANTS = {
    "geglu": {"activation": "geglu"},
    "gelu": {"activation": "gelu", "num_shared_experts": 1},
    "relu": {"activation": "relu", "expert_bias": True},
    "squared_relu": {"activation": "squared_relu", "d_latent": 4},
    "clamped": {
        "activation": "clamped_swiglu",
        "activation_limit": 0.8,
        "expert_bias": True,
        "num_shared_experts": 1,
    },
    "biases": {"expert_bias": True, "renormalize": False},
    "gated shared": {"num_shared_experts": 2, "shared_combine": "gated"},
    "averaged shared": {"num_shared_experts": 1, "shared_combine": "averaged"},
    "latent": {"d_latent": 4, "num_shared_experts": 1, "num_identity_experts": 1},
    "input": {"weight_on": "input", "renormalize": False},
    "input one": {"weight_on": "input", "renormalize": False, "top_k": 1, "expert_bias": True},
    "zero": {"num_zero_experts": 3, "top_k": 3},
    "identity": {"num_identity_experts": 2, "renormalize": False, "weight_on": "input"},
    "constant": {"num_constant_experts": 2},
    "all free": {
        "num_zero_experts": 1,
        "num_identity_experts": 2,
        "num_constant_experts": 2,
        "top_k": 4,
    },
    "all of it": {
        "activation": "clamped_swiglu",
        "expert_bias": True,
        "d_latent": 4,
        "num_shared_experts": 1,
        "shared_combine": "gated",
        "num_zero_experts": 1,
        "num_constant_experts": 1,
        "top_k": 3,
    },
}


def config_of(**changes):
    base = MoeConfig(num_experts=E, top_k=2, d_expert=F, capacity_factor=float(E), score="softmax")
    return derive_moe(dataclasses.replace(base, **changes), L)


@functools.cache
def layer_and_params(config):
    """The layer's structure, its parameters made large and unequal, and the rest."""
    layer = MoE(config, D, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=0))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.7, jnp.float32), params
    )
    return graphdef, params, rest


def draw(seed=0, batch=B):
    rng = np.random.default_rng(seed)
    x_BLD, cotangent_BLD = (rng.normal(size=(batch, L, D)).astype(np.float32) for _ in range(2))
    return x_BLD, rng.random((batch, L)) >= 0.2, cotangent_BLD


def ours(config, params, x_BLD, mask_BL, cotangent_BLD, **how):
    graphdef, _, rest = layer_and_params(config)
    y_BLD, stats = nnx.merge(graphdef, params, rest)(
        jnp.asarray(x_BLD), info_of(config, mask_BL, **how)
    )
    return jnp.sum(y_BLD * cotangent_BLD), (y_BLD, stats)


def check(config, **how):
    x_BLD, mask_BL, cotangent_BLD = draw()
    params = layer_and_params(config)[1]
    run = jax.jit(
        jax.value_and_grad(functools.partial(ours, config, **how), argnums=(0, 1), has_aux=True)
    )
    (_, (y_BLD, stats)), gradients = run(params, x_BLD, mask_BL, cotangent_BLD)
    chosen_BLE = oracle_experts.choose(x_BLD, mask_BL, nnx.to_pure_dict(params), config)

    def dense(params, x_BLD):
        y_BLD = oracle_experts.layer(x_BLD, mask_BL, params, config, chosen_BLE)
        return jnp.sum(y_BLD * cotangent_BLD), y_BLD

    dense_run = jax.jit(jax.value_and_grad(dense, argnums=(0, 1), has_aux=True))
    (_, expected_BLD), expected = dense_run(nnx.to_pure_dict(params), x_BLD)
    oracle.assert_close(y_BLD, expected_BLD)
    assert not np.any(np.asarray(y_BLD)[~mask_BL])
    oracle.assert_close(nnx.to_pure_dict(gradients[0]), expected[0], rtol=2e-5)
    oracle.assert_close(gradients[1], expected[1], rtol=2e-5)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert np.any(gradient), f"{path} learns nothing"
    return chosen_BLE, stats


IN_OTHERS = {"biases", "input", "zero", "identity", "constant"}
"""Variants whose settings are among those of others: for the long suite."""


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in IN_OTHERS)) for name in VARIANTS],
)
def test_experts_of_every_kind_and_all_their_gradients_equal_the_oracle(variant):
    check(config_of(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["clamped", "input", "all of it"])
def test_so_they_do_with_a_fixed_number_of_slots(variant):
    config = config_of(dispatch="capacity", **VARIANTS[variant])
    check(config, factor=float(E))


def test_choices_of_zero_computation_experts_are_counted_and_take_no_row_and_no_slot():
    config = config_of(**VARIANTS["all free"])
    chosen_BLE, stats = check(config)
    assert stats.assignments_E.tolist() == chosen_BLE.sum((0, 1)).tolist()
    assert chosen_BLE[..., E:].sum() > 10
    experts_TK = np.array(
        [np.flatnonzero(row) for row in chosen_BLE.reshape(-1, config.num_choices) if row.any()]
    )
    plan = plan_dropless(jnp.asarray(experts_TK, jnp.int32), E)
    assert plan.group_sizes_E.sum() == chosen_BLE[..., :E].sum()
    # A tight capacity drops choices of experts with weights only.
    tight = dataclasses.replace(config, dispatch="capacity", capacity_factor=0.3)
    run = jax.jit(functools.partial(ours, tight, factor=0.3))
    _, (_, stats) = run(layer_and_params(tight)[1], *draw())
    most_BE = np.minimum(chosen_BLE[..., :E].sum(1), np.ceil(0.3 * 4 * L / E))
    assert float(stats.dropped) == chosen_BLE[..., :E].sum() - most_BE.sum() > 0


@pytest.mark.parametrize(
    "name", ["swiglu", "geglu", "gelu", "relu", "squared_relu", "clamped_swiglu"]
)
def test_an_activation_is_its_formula_of_numbers(name):
    values = [(g, u) for g in (-9.0, -1.0, 0.0, 0.3, 2.0, 8.0) for u in (-9.0, -0.5, 0.0, 1.5, 8.0)]
    gate, up = (jnp.array(column)[None] for column in zip(*values, strict=True))
    expected = np.array(
        [[oracle_experts.activation_of_numbers(name, g, u, 7.0) for g, u in values]]
    )
    network = Network(name)
    oracle.assert_close(network.activate([gate, up][-network.num_projections :]), expected)
    oracle.assert_close(oracle_experts.activation(name, gate, up, 7.0), expected)


def test_on_a_mesh_that_splits_experts_biases_count_once():
    config = config_of(**VARIANTS["all of it"])
    x_BLD, mask_BL, cotangent_BLD = draw(batch=4)
    params = layer_and_params(config)[1]
    run = jax.value_and_grad(functools.partial(ours, config), argnums=(0, 1), has_aux=True)
    (_, (y_BLD, _)), gradients = jax.jit(run)(params, x_BLD, mask_BL, cotangent_BLD)
    mesh = jax.make_mesh((2, 1, 1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 6)
    with jax.set_mesh(mesh):
        (_, (mesh_BLD, _)), mesh_gradients = jax.jit(run)(params, x_BLD, mask_BL, cotangent_BLD)
    oracle.assert_close(jax.device_get(mesh_BLD), y_BLD)
    oracle.assert_close(jax.device_get(mesh_gradients), gradients, rtol=2e-5)


# Expert dropout
# --------------------------------------------------------------------------------------------------


def dropout_run(weight_on, rate=0.5, batch=64, **how):
    config = config_of(expert_dropout=rate, weight_on=weight_on, renormalize=False)
    x_BLD, mask_BL, cotangent_BLD = draw(batch=batch)
    keys_B = jax.random.split(jax.random.key(1), batch)
    params = layer_and_params(config)[1]
    run = jax.jit(functools.partial(ours, config, keys_B=keys_B, **how))
    y_BLD, stats = run(params, x_BLD, mask_BL, cotangent_BLD)[1]
    return config, params, x_BLD, mask_BL, np.asarray(y_BLD), stats


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_expert_dropout_takes_whole_outputs_away_and_scales_the_others_up(weight_on):
    config, params, x_BLD, mask_BL, y_BLD, stats = dropout_run(weight_on, factor=1.0)
    pure = nnx.to_pure_dict(params)
    chosen_BLE = oracle_experts.choose(x_BLD, mask_BL, pure, config)
    one_BLE = np.eye(E, dtype=np.float32)
    alone = jax.jit(
        lambda one_E: oracle_experts.layer(
            x_BLD, mask_BL, pure, config, chosen_BLE, one_E[None, None]
        )
    )
    parts = [np.asarray(alone(one_BLE[e])) for e in range(E)]  # the contribution of each expert
    dropped = total = 0
    for b, t in np.argwhere(mask_BL):
        first, second = (parts[e][b, t] for e in np.flatnonzero(chosen_BLE[b, t]))
        outcomes = {(i, j): 2.0 * (i * first + j * second) for i in (0, 1) for j in (0, 1)}
        kept = min(outcomes, key=lambda kept: np.abs(outcomes[kept] - y_BLD[b, t]).max())
        is_near = np.allclose(outcomes[kept], y_BLD[b, t], rtol=1e-4, atol=1e-6)
        assert is_near, "an output is kept whole, twice as large, or not at all"
        dropped, total = dropped + 2 - sum(kept), total + 2
    assert float(stats.dropped_out) == dropped
    assert abs(dropped / total - 0.5) < 4 * 0.5 / total**0.5


def test_expert_dropout_is_off_in_evaluation_and_its_rate_is_a_knob():
    config, params, x_BLD, mask_BL, evaluated_BLD, stats = dropout_run("output", factor=None)
    plain = dataclasses.replace(config, expert_dropout=0.0)
    expected_BLD = jax.jit(functools.partial(ours, plain))(params, x_BLD, mask_BL, x_BLD)[1][0]
    np.testing.assert_array_equal(evaluated_BLD, expected_BLD)
    assert stats.dropped_out == 0
    graphdef, _, rest = layer_and_params(config)
    info = info_of(
        config, mask_BL, factor=1.0, keys_B=jax.random.split(jax.random.key(1), len(x_BLD))
    )
    info = dataclasses.replace(
        info, knobs=dataclasses.replace(info.knobs, expert_dropout=jnp.float32(0.0))
    )
    oracle.assert_close(
        nnx.merge(graphdef, params, rest)(jnp.asarray(x_BLD), info)[0], expected_BLD
    )


# Refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moe", "parts"),
    [
        ({"shared_combine": "gated"}, ["moe.shared_combine=gated", "moe.num_shared_experts=0"]),
        (
            {"num_zero_experts": 2, "num_groups": 4, "top_k_groups": 2},
            ["moe.num_zero_experts=2", "moe.num_groups=4"],
        ),
        (
            {"num_identity_experts": 2, "router": "expert_choice", "allow_noncausal": True},
            ["moe.num_identity_experts=2", "moe.router=expert_choice"],
        ),
        (
            {"weight_on": "input", "num_constant_experts": 1},
            ["moe.weight_on=input", "moe.num_constant_experts=1"],
        ),
        (
            {"weight_on": "input", "router": "soft", "allow_noncausal": True},
            ["moe.weight_on=input", "moe.router=soft"],
        ),
        (
            {"expert_dropout": 0.1, "router": "soft", "allow_noncausal": True},
            ["moe.expert_dropout=0.1", "moe.router=soft"],
        ),
        ({"expert_dropout": 1.0}, ["moe.expert_dropout=1.0", "0.99"]),
        (
            {"per_layer": "0: dense", "num_experts": 0},
            ["moe.per_layer='0: dense'", "moe.num_experts=0"],
        ),
        ({"top_k": 11, "num_zero_experts": 2}, ["moe.top_k=11", "moe.num_experts=8 plus 2 zero"]),
    ],
)
def test_experts_that_do_not_go_together_are_refused(moe, parts):
    with pytest.raises(ConfigError) as caught:
        resolve({"moe": {"d_expert": 8} | moe})
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_more_choices_than_experts_with_weights_still_derive_a_width():
    moe = {"num_experts": 2, "num_zero_experts": 4, "top_k": 4, "d_expert": 0}
    assert resolve({"moe": moe, "model": {"d_ff": 1024}}).moe.d_expert == 256
