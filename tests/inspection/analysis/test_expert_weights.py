"""Weights and outputs of a model's experts are those that its layers use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from cases.training import small_config
from moejax.inspection.analysis.expert_profile import ProfileError
from moejax.inspection.analysis.expert_weights import expert_outputs, expert_weights
from moejax.models.blocks import Context
from moejax.models.decoder import Decoder
from moejax.moe.token_info import TokenInfo

PLAIN = small_config(model={"num_layers": 4}, moe={"first_dense": 1, "every": 2})
RICH = small_config(
    moe={
        "activation": "clamped_swiglu", "activation_limit": 0.5, "expert_bias": True, "d_latent": 8,
        "num_shared_experts": 1, "num_identity_experts": 1, "renormalize": False,
    }
)  # fmt: skip


@functools.cache
def model_of(config):
    """A decoder with random parameters, also biases, made without a compiled program."""
    graphdef, params, rest = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0))), nnx.Param, ...
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.2, a.dtype), params)
    return nnx.merge(
        graphdef, params, jax.tree.map(lambda a: jnp.asarray(np.zeros(a.shape, a.dtype)), rest)
    )


def tokens():
    return np.random.default_rng(1).integers(3, 250, (2, 16)).astype(np.int32)


def test_weights_have_the_layers_in_order():
    model, weights = model_of(PLAIN), expert_weights(model_of(PLAIN))
    assert {name: a.shape for name, a in weights.items()} == {
        "gate": (1, 4, 32, 16), "up": (1, 4, 32, 16), "down": (1, 4, 16, 32),
    }  # fmt: skip
    both = expert_weights(model_of(RICH))
    blocks = [block.ffn.experts for block, _ in model_of(RICH).walk()]
    for n, experts in enumerate(blocks):
        np.testing.assert_array_equal(both["gate"][n], experts.gate_up[...][:, :, 0])
        np.testing.assert_array_equal(both["up"][n], experts.gate_up[...][:, :, 1])
        np.testing.assert_array_equal(both["gate_bias"][n], experts.gate_up_bias[...][:, 0])
        np.testing.assert_array_equal(both["up_bias"][n], experts.gate_up_bias[...][:, 1])
        np.testing.assert_array_equal(both["down_bias"][n], experts.down_bias[...])
    assert both["up_bias"].shape == (2, 4, 16)
    assert both["down"].shape == (2, 4, 16, 8)
    assert [block.is_moe for block, _ in model.walk()] == [False, False, True, False]


def moe_layers(config, tokens_BL):
    """Input, routed output and choices of each MoE layer in a pass, `[T, ...]` each."""
    ones_BL, positions_BL = (
        jnp.ones_like(tokens_BL),
        jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape),
    )
    info = TokenInfo(ones_BL > 0, tokens_BL, positions_BL, trace=True)
    model, found = model_of(config), []
    x_BLD = model.embed(tokens_BL)
    for block, own in model.walk(Context(positions_BL, ones_BL, info)):
        if block.is_moe:
            attended_BLD, _ = block.mixer(
                block.mixer_norm(x_BLD), positions_BL, own.segments_BL, None
            )
            normed_BLD = block.ffn_norm(x_BLD + attended_BLD)
            y_BLD, stats = block.ffn(normed_BLD, own.info)
            y_BLD -= block.ffn.shared(normed_BLD) if config.moe.num_shared_experts else 0
            flat = [a.reshape(-1, a.shape[-1]) for a in (normed_BLD, y_BLD)]
            found.append([*flat, stats.routing.experts_TK, stats.routing.weights_TK])
        x_BLD, _, _ = block(x_BLD, own)
    return found


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
def test_outputs_of_experts_add_up_to_that_of_the_layer(config):
    outputs = expert_outputs(model_of(config), tokens())
    assert outputs.shape == (config.num_moe_layers, 4, 32, 32)
    assert outputs.dtype == np.float32
    layers = jax.jit(functools.partial(moe_layers, config))(tokens())
    for outputs_ETD, layer in zip(outputs, layers, strict=True):
        x_TD, y_TD, experts_TK, weights_TK = map(np.asarray, layer)
        of_all = [*outputs_ETD, *[x_TD] * config.moe.num_identity_experts]
        expected = np.zeros_like(y_TD)
        for t, k in np.ndindex(experts_TK.shape):
            expected[t] += weights_TK[t, k] * of_all[experts_TK[t, k]][t]
        assert np.abs(expected).mean() > 1e-3
        oracle.assert_close(y_TD, expected)


def test_models_without_comparable_experts_are_refused():
    dense = small_config(moe={"num_experts": 0})
    for look in (expert_weights, lambda model: expert_outputs(model, tokens())):
        with pytest.raises(ProfileError, match="the model has no MoE layer"):
            look(model_of(dense))
    uneven = small_config(moe={"per_layer": "0: d_expert=8"})
    with pytest.raises(
        ProfileError, match=r"moe\.per_layer='0: d_expert=8' gives MoE layers experts of different"
    ):
        expert_weights(model_of(uneven))
