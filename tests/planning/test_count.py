"""Counts in closed form, beside the parameters of the model that is built and the products of compiled programs."""

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
    counted, built = count(config), count_parameters(config)
    assert (counted.total, counted.active) == (built.total, built.active)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_parameters_of_the_model_that_is_built(recipe):
    assert_counts_as_built(resolve(runpy.run_path(str(ROOT / recipe))["get_config"]()))


@pytest.mark.parametrize("case", [*ROUTER_CASES, *OTHER_CASES])
def test_a_case_has_the_parameters_of_the_model_that_is_built(case):
    assert_counts_as_built(case_config(case))


@st.composite
def configurations(draw):
    """Leaves that change parameters, drawn at random; some do not go together."""
    router = draw(st.sampled_from([*ROUTER_CASES]))
    bit = st.booleans()
    moe = {
        "router": router,
        "d_expert": draw(st.sampled_from([4, 12])),
        "activation": draw(
            st.sampled_from(["swiglu", "geglu", "gelu", "squared_relu", "clamped_swiglu"])
        ),
        "expert_bias": draw(bit),
        "d_latent": draw(st.sampled_from([0, 0, 8])),
        "num_shared_experts": draw(st.sampled_from([0, 1, 2])),
        "first_dense": draw(st.sampled_from([0, 1])),
        "every": draw(st.sampled_from([1, 2])),
    } | ROUTER_CASES[router]
    if moe["num_shared_experts"]:
        moe["shared_combine"] = draw(st.sampled_from(["sum", "gated", "averaged"]))
    if router not in ("cosine", "soft", "random", "balanced"):
        moe["router_bias"] = draw(bit)
    if router == "noisy_topk":
        moe["router_noise"] = draw(st.sampled_from(["learned", "fixed"]))
    if router == "cosine":
        moe["d_router"] = draw(st.sampled_from([0, 5]))
    if router in ("switch", "cosine", "noisy_topk", "sinkhorn", "quantile", "random"):
        moe |= {
            f"num_{kind}_experts": draw(st.sampled_from([0, 1, 3]))
            for kind in ("zero", "identity", "constant")
        }
    if draw(bit):
        moe["per_layer"] = draw(
            st.sampled_from(["-1: dense", "-1: router=hash", "-1: d_expert=20", "-1: d_latent=6"])
        )
    model = {
        "num_layers": draw(st.sampled_from([3, 5])),
        "qk_norm": draw(bit),
        "tied_embeddings": draw(bit),
        "num_kv_heads": draw(st.sampled_from([1, 2, 4])),
    }
    return {"moe": moe, "model": model}


@settings(max_examples=60, deadline=None)
@given(configurations())
def test_any_combination_of_leaves_has_the_parameters_of_the_model_that_is_built(sections):
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
    """Multiplications and additions of the matrix products in the compiled forward and backward pass."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, params, state = nnx.split(model, nnx.Param, ...)
    rows_BL = jax.ShapeDtypeStruct((batch, config.data.seq_len), jnp.int32)

    def loss(params, state, tokens_BL, segments_BL, positions_BL):
        model, keys_B = (
            nnx.merge(graphdef, params, state),
            jax.random.split(jax.random.key(0), batch),
        )
        logits_BLV, _ = model(
            tokens_BL, segments_BL, positions_BL, knobs=Knobs.from_config(config), keys_B=keys_B
        )
        return (jax.nn.logsumexp(logits_BLV, axis=-1) - logits_BLV[..., 0]).sum()

    text = (
        jax.jit(jax.grad(loss)).lower(params, state, rows_BL, rows_BL, rows_BL).compile().as_text()
    )
    counted = count_arithmetic(text)
    assert counted.open_loops == 0
    return counted.flops / (batch * config.data.seq_len)


def without_remat(**sections):
    return small_config(
        **sections | {"model": {"remat": False, "scan_layers": False} | sections.get("model", {})}
    )


def test_a_dense_model_multiplies_what_its_compiled_step_multiplies():
    for model in (
        {},
        {"num_kv_heads": 4, "tied_embeddings": False, "qk_norm": True, "num_layers": 3},
    ):
        config = without_remat(moe={"num_experts": 0}, model=model)
        assert products_of_training(config) == count(config).flops_per_token


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"top_k": 4, "router": "dense"},
        {"activation": "relu", "num_shared_experts": 2, "expert_bias": True},
        {"num_shared_experts": 1, "shared_combine": "gated", "d_latent": 8},
        {"router": "noisy_topk", "score": "softmax"},
        {"router": "cosine", "every": 2},
        ROUTER_CASES["hierarchical"] | {"router": "hierarchical"},
    ],
    ids=str,
)
def test_with_as_many_slots_as_choices_the_compiled_step_multiplies_what_is_counted(moe):
    # Capacity 1 has K * L slots for the K * L choices of a row: no product of rows that
    # nobody chose.
    config = without_remat(moe={"dispatch": "capacity", "capacity_factor": 1.0} | moe)
    # Combining outputs by their weights is no product of matrices, but the gradient of the weights
    # is one: 2 K D.
    combine = (
        2 * config.moe.top_k * (config.moe.d_latent or config.model.d_model) * config.num_moe_layers
    )
    # The gate is one column: for the gradient of its input XLA multiplies by a number, and calls it
    # no product.
    gate = 2 * config.model.d_model * config.num_moe_layers * (config.moe.shared_combine == "gated")
    assert products_of_training(config) == count(config).flops_per_token + combine - gate


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_where_experts_choose_the_compiled_step_multiplies_what_is_counted(router):
    config = without_remat(moe={"router": router, "allow_noncausal": True})
    assert products_of_training(config) == count(config).flops_per_token


def test_learned_vectors_of_constant_experts_cost_little_and_are_counted():
    moe = {"dispatch": "capacity", "capacity_factor": 1.0}
    without, beside = (
        without_remat(moe=moe | {"num_constant_experts": number}) for number in (0, 3)
    )
    more = products_of_training(beside) - products_of_training(without)
    counted = count(beside).flops_per_token - count(without).flops_per_token
    # Which expert is which vector, `[K, J]`, has no gradient: one of three products less than
    # is counted.
    assert counted - more == 2 * beside.moe.top_k * 3 * beside.num_moe_layers


def test_the_parts_are_those_worked_out_by_hand():
    config = small_config(
        moe={"num_shared_experts": 1, "first_dense": 1}
    )  # D = 32, F = 16, K = 2, L = 16, V = 320
    flops = count(config).flops
    assert flops.projections == 2 * 3 * 2 * (
        2 * 32 * 32 + 2 * 32 * 16
    )  # 2 layers, 3 passes, 2 a multiplication
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
    assert flops.experts == round(2 * 3 * 2 * (slots * 3 * 32 * 16 + 2 * 16 * slots * 32) / 16)
