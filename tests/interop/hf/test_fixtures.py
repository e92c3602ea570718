"""Models of each family against what the reference implementation computes of the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.hf import FAMILIES, FOLDER, model_type, reference
from moejax.inference.generate import Sampling, decode, prefill
from moejax.inference.layered import LayeredDecoder
from moejax.interop.hf.families import FAMILIES as TABLES
from moejax.interop.hf.load import load_model, read_config
from moejax.interop.hf.places import named_arrays
from moejax.interop.hf.save import their_tensors
from moejax.models.blocks import Context
from moejax.moe.balancing.stats import join
from moejax.moe.token_info import TokenInfo

TOLERANCE = 2e-5  # of the largest magnitude
GRADIENT_TOLERANCE = 1e-4

SHARED_BESIDE = {"granitemoeshared"}
"""Families whose output of a MoE layer, as the reference has it, is without its shared expert."""


def has_experts(family):
    return any(name.startswith("router.") for name in reference(family))


of_each = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model_of(family):
    return load_model(FOLDER / family)


def assert_near(found, expected, name, tolerance=TOLERANCE):
    difference = np.abs(np.asarray(found, np.float64) - expected).max()
    assert difference <= tolerance * np.abs(expected).max(), (name, difference)


def inputs_of(tokens_BL, mask_BL=None, positions_BL=None):
    """Returns tokens, segments and positions; padding is of segment 0."""
    if mask_BL is None:
        mask_BL = np.ones(tokens_BL.shape, np.int32)
    if positions_BL is None:
        positions_BL = np.broadcast_to(np.arange(tokens_BL.shape[1]), tokens_BL.shape)
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens_BL, mask_BL, positions_BL))


@functools.cache
def program(family):
    """Returns what computes logits, hidden states and statistics: compiled once for all inputs."""
    graphdef, state = nnx.split(model_of(family))

    @jax.jit
    def compute(*inputs):
        model = nnx.merge(graphdef, state)
        hidden_BLD, stats = model(*inputs, trace=True)
        return model.logits(hidden_BLD), hidden_BLD, stats

    return compute


@functools.cache
def run(family, padding=""):
    """Returns logits, hidden states and statistics of the reference's inputs."""
    arrays = reference(family)
    tokens_BL = arrays[f"{padding}input_ids"]
    mask_BL = arrays.get(f"{padding}attention_mask")
    inputs = inputs_of(tokens_BL, mask_BL, arrays.get(f"{padding}position_ids"))
    return program(family)(*inputs)


@of_each
def test_logits_and_the_last_hidden_states_are_those_of_the_reference(family):
    logits_BLV, hidden_BLD, _ = run(family)
    assert_near(logits_BLV, reference(family)["logits"], "logits")
    assert_near(hidden_BLD, reference(family)["final_hidden"], "final_hidden")


@of_each
@pytest.mark.parametrize("padding", ["lpad.", "rpad."])
def test_padding_on_either_side_changes_no_logit_of_a_token(family, padding):
    arrays = reference(family)
    logits_BLV, _, _ = run(family, padding)
    is_token_BL = arrays[f"{padding}attention_mask"] == 1
    expected = arrays[f"{padding}logits"]
    assert_near(np.asarray(logits_BLV)[is_token_BL], expected[is_token_BL], padding)


@of_each
def test_every_layer_mixes_and_combines_what_the_reference_does(family):
    arrays = reference(family)
    tokens_BL, segments_BL, positions_BL = inputs_of(arrays["input_ids"])
    model = model_of(family)
    context = Context(
        positions_BL, segments_BL, TokenInfo(segments_BL > 0, tokens_BL, positions_BL)
    )
    x_BLD = model.embed(tokens_BL)
    assert_near(x_BLD, arrays["hidden.0"], "hidden.0")
    for layer, (block, own) in enumerate(model.walk(context)):
        mixed_BLD, _ = block.mix(x_BLD, own)
        if f"attn_out.{layer}" in arrays:
            assert_near(mixed_BLD, arrays[f"attn_out.{layer}"], f"attn_out.{layer}")
        normed_BLD = block.ffn_inputs(x_BLD, block.add_mixed(x_BLD, mixed_BLD))
        y_BLD = block.ffn(normed_BLD, own.info)[0] if block.is_moe else block.ffn(normed_BLD)
        if family in SHARED_BESIDE:
            y_BLD -= block.moe.shared(normed_BLD)
        # Some families have it by token.
        expected_BLD = arrays[f"mlp_out.{layer}"].reshape(y_BLD.shape)
        assert_near(y_BLD, expected_BLD, f"mlp_out.{layer}")
        x_BLD, _, _ = block(x_BLD, own)
        assert_near(x_BLD, arrays[f"hidden.{layer + 1}"], f"hidden.{layer + 1}")


@pytest.mark.parametrize("family", [name for name in FAMILIES if has_experts(name)])
def test_tokens_visit_the_experts_of_the_reference_with_the_same_weights(family):
    arrays = reference(family)
    model = model_of(family)
    _, _, stats = run(family)
    routings = {"router": [group.routing for group in stats]}
    if stats[0].attention is not None:
        routings["attn_router"] = [group.attention.routing for group in stats]
    recorded = {name.partition(".")[0] for name in arrays if name.endswith(".combine")}
    assert recorded == set(routings)
    for name, groups in routings.items():
        routing = jax.tree.map(lambda *parts: np.concatenate(parts), *groups)
        for n, layer in enumerate(model.config.moe_layers):
            router = f"{name}.{layer}"
            experts_TK, weights_TK = routing.experts_TK[n], routing.weights_TK[n]
            expected_TK = arrays[f"{router}.indices"]
            np.testing.assert_array_equal(np.sort(experts_TK), np.sort(expected_TK))
            combine_TE = np.zeros_like(routing.logits_TE[n])
            np.put_along_axis(combine_TE, experts_TK, weights_TK, axis=1)
            assert_near(combine_TE, arrays[f"{router}.combine"], f"combine {router}", 1e-5)
            assert_near(routing.logits_TE[n], arrays[f"{router}.logits"], f"logits {router}")


def sums_by_logits(groups, mask_BL, top_k):
    """Load and probability sums of a softmax over the logits, whatever the model routes by."""
    is_token_T = np.asarray(mask_BL).reshape(-1) == 1
    layers = [logits_TE for group in groups for logits_TE in group.routing.logits_TE]
    logits_TE = np.concatenate([logits_TE[is_token_T] for logits_TE in layers])
    chosen_TK = np.argsort(-logits_TE, axis=1)[:, :top_k]
    load_E = np.bincount(chosen_TK.reshape(-1), minlength=logits_TE.shape[1])
    return load_E, jax.nn.softmax(logits_TE).sum(axis=0)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "aux_loss" in reference(name)])
@pytest.mark.parametrize("padding", ["", "lpad.", "rpad."])
def test_the_auxiliary_loss_of_the_reference_follows_from_the_sums(family, padding):
    # The reference pools the tokens of all layers before it multiplies load and probability.
    groups = run(family, padding)[2]
    stats = join(groups)
    pooled = [(1, stats)]
    if stats.attention is not None:
        # It records the routers of attention twice.
        pooled.append((model_of(family).config.attention.router_loss_factor, stats.attention))
    num_rows = sum(weight * each.num_tokens.sum() for weight, each in pooled)
    load_E = sum(weight * each.assignments_E.sum(axis=0) for weight, each in pooled) / num_rows
    probs_E = sum(weight * each.probs_E.sum(axis=0) for weight, each in pooled) / num_rows
    moe = model_of(family).config.moe
    if moe.selection_bias:
        # Its loss knows neither the bias nor the sigmoid that its router chooses by.
        arrays = reference(family)
        everywhere_BL = np.ones(arrays["input_ids"].shape)
        mask_BL = arrays.get(f"{padding}attention_mask", everywhere_BL)
        load_E, probs_E = sums_by_logits(groups, mask_BL, moe.top_k)
        load_E, probs_E = load_E / num_rows, probs_E / num_rows
    loss = len(load_E) * (load_E * probs_E).sum()
    assert_near(loss, reference(family)[f"{padding}aux_loss"], "aux_loss")


@of_each
def test_gradients_are_those_of_the_reference(family):
    arrays = reference(family)
    model = model_of(family)
    graphdef, params, state = nnx.split(model, nnx.Param, ...)
    inputs = inputs_of(arrays["input_ids"])
    labels_BL = jnp.asarray(arrays["labels"])

    @jax.jit
    def loss(params):
        model = nnx.merge(graphdef, params, state)
        hidden_BLD, _ = model(*inputs)
        targets_BL = labels_BL[:, 1:]
        is_target_BL = targets_BL >= 0
        nats_BL = model.cross_entropy(hidden_BLD[:, :-1], jnp.maximum(targets_BL, 0))
        return jnp.where(is_target_BL, nats_BL, 0.0).sum() / is_target_BL.sum()

    value, gradients = jax.value_and_grad(loss)(params)
    assert_near(value, arrays["loss_lm"], "loss_lm")
    config, table = read_config(FOLDER / family)
    # What has no gradient, such as a selection bias, is as it was.
    state, gradients = jax.tree.map(np.asarray, (nnx.state(model), gradients))
    found = dict(their_tensors(config, table, named_arrays(state) | named_arrays(gradients)))
    names = [name for name in arrays if name.startswith("grad.")]
    assert len(names) > 20
    for name in names:
        gradient = found[name.removeprefix("grad.")]
        assert_near(gradient, arrays[name], name, GRADIENT_TOLERANCE)


@of_each
@pytest.mark.parametrize("padding", ["", "lpad."])
def test_greedy_text_with_a_cache_is_that_of_the_reference(family, padding):
    arrays = reference(family)
    decoder = LayeredDecoder(model_of(family))
    prompts_BL = arrays[f"{padding}gen.prompt"]
    mask_BL = arrays.get(f"{padding}gen.attention_mask", np.ones(prompts_BL.shape, np.int32))
    expected_BL = arrays[f"{padding}gen.tokens"]
    batch, length = prompts_BL.shape
    lengths_B = mask_BL.sum(axis=1)
    tokens_BL = np.zeros((batch, length), np.int32)  # padded on the right
    for row, (prompt, is_token) in enumerate(zip(prompts_BL, mask_BL, strict=True)):
        tokens_BL[row, : lengths_B[row]] = prompt[is_token == 1]
    num_steps = expected_BL.shape[1] - length
    cache = decoder.init_cache(batch, length + num_steps)
    sampling = Sampling.from_settings(0.0, 1.0, jax.random.split(jax.random.key(0), batch))
    lengths_B = jnp.asarray(lengths_B, jnp.int32)
    next_B, positions_B, cache = prefill(
        decoder, jnp.asarray(tokens_BL), lengths_B, cache, sampling
    )
    found = [np.asarray(next_B)]
    for _ in range(num_steps - 1):
        next_B, positions_B, cache = decode(decoder, next_B, positions_B, cache, sampling)
        found.append(np.asarray(next_B))
    np.testing.assert_array_equal(np.stack(found, axis=1), expected_BL[:, length:])


def test_every_family_has_a_table_of_its_name():
    assert {name: table.model_type for name, table in TABLES.items()} == {
        name: name for name in TABLES
    }
    assert {model_type(family) for family in FAMILIES} <= set(TABLES)
