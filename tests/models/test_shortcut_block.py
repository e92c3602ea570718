"""A layer of two dense blocks and experts beside them."""

import jax
import jax.numpy as jnp
from flax import nnx

import oracle
from cases.config import refusal
from cases.training import case_config, small_config
from moejax.config.sections.attention import FULL
from moejax.models import Decoder
from moejax.models.blocks import Context
from moejax.moe.token_info import TokenInfo

B, L = 2, 7


def context_of_one_document():
    segments_BL = jnp.ones((B, L), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    info = TokenInfo(segments_BL > 0, segments_BL, positions_BL, trace=True)
    return Context(positions_BL, segments_BL, info)


def test_experts_read_what_the_first_network_reads_and_are_added_at_the_end():
    config = case_config("shortcut", model={"residual_multiplier": 0.5})
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    layer, _ = next(model.walk())
    context = context_of_one_document()
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, config.model.d_model))
    found_BLD, stats, cache = layer(x_BLD, context)
    assert cache is None and layer.is_moe
    expected_BLD = x_BLD
    for block in (layer.first, layer.second):
        normed_BLD = block.mixer_norm(expected_BLD)
        mixed_BLD, _ = block.mixer(normed_BLD, context.positions_BL, context.segments_BL)
        expected_BLD += 0.5 * mixed_BLD
        inputs_BLD = block.ffn_norm(expected_BLD)
        if block is layer.first:
            routed_BLD, expected_stats = layer.moe(inputs_BLD, context.info)
        expected_BLD += 0.5 * block.ffn(inputs_BLD)
    expected_BLD += 0.5 * routed_BLD
    oracle.assert_close(found_BLD, expected_BLD)
    oracle.assert_close(stats.routing.weights_TK, expected_stats.routing.weights_TK)


def test_both_mixers_of_a_layer_have_its_window():
    config = small_config(
        model={"shortcut": True, "num_layers": 3},
        attention={"window": 5, "window_layers": "window, full"},
    )
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    windows = [
        [int(each.constants.window[...]) for each in layer.mixers] for layer, _ in model.walk()
    ]
    assert windows == [[5, 5], [FULL, FULL], [5, 5]]


def test_a_layer_without_experts_is_refused():
    for leaves in ({"moe.first_dense": 1}, {"moe.num_experts": 0}, {"moe.per_layer": "1: dense"}):
        message = refusal({"model.shortcut": True} | leaves)
        assert message.startswith("model.shortcut=True needs experts in every layer")
