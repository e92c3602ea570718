"""Counts in closed form against the model that is built and the products of compiled programs."""

import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.training import OTHER_CASES, ROUTER_CASES, case_config, small_config
from moejax.config import ConfigError, Knobs, resolve
from moejax.models import Decoder
from moejax.models.parameters import count_parameters
from moejax.planning.count import count
from moejax.planning.hlo.arithmetic import count_arithmetic

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.py"))


def assert_counts_as_built(config):
    counted = count(config)
    built = count_parameters(config)
    assert (counted.total, counted.active) == (built.total, built.active)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_parameters_of_the_model_that_is_built(recipe):
    module = runpy.run_path(str(ROOT / recipe))
    assert_counts_as_built(resolve(module["get_config"]()))


@pytest.mark.parametrize("case", [*ROUTER_CASES, *OTHER_CASES])
def test_a_case_has_the_parameters_of_the_model_that_is_built(case):
    assert_counts_as_built(case_config(case))


@st.composite
def configurations(draw):
    """Leaves that change parameters, drawn at random; some do not go together."""

    def one_of(*choices):
        return draw(st.sampled_from(choices))

    router = one_of(*ROUTER_CASES)
    moe = {
        "router": router,
        "d_expert": one_of(4, 12),
        "activation": one_of("swiglu", "geglu", "gelu", "squared_relu", "clamped_swiglu"),
        "expert_bias": one_of(False, True),
        "d_latent": one_of(0, 0, 8),
        "num_shared_experts": one_of(0, 1, 2),
        "first_dense": one_of(0, 1),
        "every": one_of(1, 2),
    } | ROUTER_CASES[router]
    if moe["num_shared_experts"]:
        moe["shared_combine"] = one_of("sum", "gated", "averaged")
    if router not in ("cosine", "soft", "random", "balanced"):
        moe["router_bias"] = one_of(False, True)
    if router == "noisy_topk":
        moe["router_noise"] = one_of("learned", "fixed")
    if router == "cosine":
        moe["d_router"] = one_of(0, 5)
    if router in ("switch", "cosine", "noisy_topk", "sinkhorn", "quantile", "random"):
        for kind in ("zero", "identity", "constant"):
            moe[f"num_{kind}_experts"] = one_of(0, 1, 3)
    if one_of(False, True):
        moe["per_layer"] = one_of(
            "-1: dense", "-1: router=hash", "-1: d_expert=20", "-1: d_latent=6"
        )
    model = {
        "num_layers": one_of(3, 5),
        "tied_embeddings": one_of(False, True),
        "logits_bias": one_of(False, True),
        "norm": one_of("rms", "zero_centered_rms", "layer", "layer_without_bias"),
        "norm_order": one_of("pre", "post", "sandwich"),
        "parallel_residual": one_of(False, True),
    }
    attention = {
        "num_kv_heads": one_of(1, 2, 4),
        "head_dim": one_of(0, 6, 24),
        "qk_norm": one_of("none", "head", "whole"),
        "qkv_bias": one_of(False, True),
        "out_bias": one_of(False, True),
    }
    return {"moe": moe, "model": model, "attention": attention}


@settings(max_examples=60, deadline=None)
@given(configurations())
def test_any_combination_of_leaves_has_the_parameters_that_are_built(sections):
    try:
        config = small_config(**sections)
    except ConfigError:
        return
    assert_counts_as_built(config)


def test_a_token_never_has_more_experts_with_weights_than_there_are():
    few = small_config(moe={"num_experts": 2, "top_k": 4, "num_zero_experts": 4})
    assert_counts_as_built(few)
    assert count(few).active == count(few).total
    assert count(few).flops.experts == 2 * 3 * 2 * 2 * 3 * 32 * 16  # layers, passes, 2 experts


@functools.cache
def products_of_training(config, batch=2):
    """Returns the arithmetic of matrix products per token in the compiled passes of training."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, params, state = nnx.split(model, nnx.Param, ...)
    rows_BL = jax.ShapeDtypeStruct((batch, config.data.seq_len), jnp.int32)

    def loss(params, state, tokens_BL, segments_BL, positions_BL):
        model = nnx.merge(graphdef, params, state)
        keys_B = jax.random.split(jax.random.key(0), batch)
        hidden_BLD, _ = model(
            tokens_BL, segments_BL, positions_BL, knobs=Knobs.from_config(config), keys_B=keys_B
        )
        logits_BLV = model.logits(hidden_BLD)
        log_total_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
        return (log_total_BL - logits_BLV[..., 0]).sum()

    lowered = jax.jit(jax.grad(loss)).lower(params, state, rows_BL, rows_BL, rows_BL)
    counted = count_arithmetic(lowered.compile().as_text())
    assert counted.open_loops == 0
    return counted.flops / (batch * config.data.seq_len)


def without_remat(**sections):
    model = {"remat": False, "scan_layers": False} | sections.pop("model", {})
    return small_config(model=model, **sections)


def test_a_dense_model_multiplies_what_its_compiled_step_multiplies():
    other = {
        "model": {"tied_embeddings": False, "num_layers": 3},
        "attention": {"num_kv_heads": 4, "qk_norm": "head", "head_dim": 24},
    }
    for sections in ({}, other):
        config = without_remat(moe={"num_experts": 0}, **sections)
        assert products_of_training(config) == count(config).flops_per_token


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"top_k": 4, "router": "dense"},
        {"activation": "relu", "num_shared_experts": 2, "expert_bias": True},
        {"num_shared_experts": 1, "shared_combine": "gated", "d_latent": 8},
        pytest.param({"router": "noisy_topk", "score": "softmax"}, marks=pytest.mark.slow),
        pytest.param({"router": "cosine", "every": 2}, marks=pytest.mark.slow),
        ROUTER_CASES["hierarchical"] | {"router": "hierarchical"},
    ],
    ids=str,
)
def test_with_a_slot_for_each_choice_the_compiled_step_agrees_with_the_count(moe):
    # Capacity 1 has K * L slots for the K * L choices of a row, so no slot stays empty.
    config = without_remat(moe={"dispatch": "capacity", "capacity_factor": 1.0} | moe)
    d_model, num_layers = config.model.d_model, config.num_moe_layers
    # Combining outputs by their weights is no product of matrices, but the gradient of the weights
    # is one: 2 K D.
    width = config.moe.d_latent or d_model
    combine = 2 * config.moe.top_k * width * num_layers
    # The gate is one column: for the gradient of its input XLA multiplies by a number, and calls it
    # no product.
    gate = 2 * d_model * num_layers if config.moe.shared_combine == "gated" else 0
    assert products_of_training(config) == count(config).flops_per_token + combine - gate


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_where_experts_choose_the_compiled_step_agrees_with_the_count(router):
    config = without_remat(moe={"router": router, "allow_noncausal": True})
    assert products_of_training(config) == count(config).flops_per_token


def test_learned_vectors_of_constant_experts_cost_little_and_are_counted():
    moe = {"dispatch": "capacity", "capacity_factor": 1.0}
    without = without_remat(moe=moe)
    added = without_remat(moe=moe | {"num_constant_experts": 3})
    compiled = products_of_training(added) - products_of_training(without)
    counted = count(added).flops_per_token - count(without).flops_per_token
    # Which expert is which vector, `[K, J]`, has no gradient: one of three products less than
    # is counted.
    assert counted - compiled == 2 * added.moe.top_k * 3 * added.num_moe_layers


def test_the_parts_are_those_worked_out_by_hand():
    # D = 32, F = 16, K = 2, L = 16, V = 320
    config = small_config(moe={"num_shared_experts": 1, "first_dense": 1})
    flops = count(config).flops
    # 2 layers, 3 passes, 2 for a multiplication and an addition
    assert flops.projections == 2 * 3 * 2 * (2 * 32 * 32 + 2 * 32 * 16)
    assert flops.scores == 2 * 3 * 2 * 2 * 16 * 32
    assert flops.dense == 3 * 2 * 3 * 32 * 32
    assert flops.router == 3 * 2 * 32 * 4
    assert flops.experts == 3 * 2 * 2 * 3 * 32 * 16
    assert flops.shared == 3 * 2 * 3 * 32 * 16
    assert flops.logits == 3 * 2 * 320 * 32
    assert count(config).flops_per_token == sum(dataclasses.astuple(flops))


def test_slots_that_are_no_multiple_of_the_row_are_spread_over_its_tokens():
    moe = {"router": "soft", "allow_noncausal": True, "slots_per_expert": 3}
    flops = count(small_config(moe=moe)).flops
    slots = 4 * 3  # of a row of 16
    of_experts = slots * 3 * 32 * 16
    of_mixing = 2 * 16 * slots * 32
    assert flops.experts == round(2 * 3 * 2 * (of_experts + of_mixing) / 16)
