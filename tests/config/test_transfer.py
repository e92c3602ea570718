"""The parametrisation of `mup`: the same function with multipliers as leaves, and its factors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cases.training import SMALL, packed_batch
from moejax.config import ConfigError, Transfer, embedding_deviation, folded, resolve
from moejax.models import Decoder

MUP = {"base_width": 8, "base_d_ff": 16, "base_d_expert": 4, "base_depth": 1, "base_top_k": 1}


def config_of(mup=None, **sections):
    content = SMALL | {"mup": MUP if mup is None else mup}
    for section, leaves in sections.items():
        content[section] = content.get(section, {}) | leaves
    return resolve(content)


@pytest.mark.parametrize("sections", [{}, {"moe": {"first_dense": 1}}])
def test_the_same_weights_compute_the_same_with_multipliers_as_leaves(sections):
    config = config_of(**sections)
    usual = folded(config)
    assert usual.mup.base_width == 0
    assert usual.model.residual_multiplier == 0.5 and usual.model.logits_divisor == 4
    assert usual.model.embedding_multiplier == math.sqrt(8)
    assert usual.moe.route_scale == math.sqrt(2)
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    other = Decoder(usual, rngs=nnx.Rngs(params=1))
    nnx.update(other, nnx.state(model))
    batch = jax.tree.map(jnp.asarray, packed_batch(config))
    inputs = (batch.tokens_BL, batch.segments_BL, batch.positions_BL)
    logits, expected = (each.logits(each(*inputs)[0]) for each in (model, other))
    np.testing.assert_array_equal(logits, expected)
    plain = Decoder(resolve(SMALL), rngs=nnx.Rngs(params=1))
    if not sections:
        nnx.update(plain, nnx.state(model))
        assert not np.allclose(plain.logits(plain(*inputs)[0]), logits)


def test_initial_embeddings_have_the_deviation_of_the_base():
    config = config_of()
    assert embedding_deviation(config) == 8**-0.5
    assert embedding_deviation(resolve(SMALL)) == 32**-0.5
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    assert float(model.embedding[...].std()) == pytest.approx(8**-0.5, rel=0.05)


def test_without_a_base_nothing_changes():
    config = resolve(SMALL)
    assert folded(config) is config
    assert Transfer.from_config(config) == Transfer()
    assert Transfer().divisor("stacks/0/block/ffn/experts/down", ("mlp", "embed"), "adamw") == 1


def test_rates_of_matrices_are_divided_by_the_ratio_of_their_input():
    found = Transfer.from_config(config_of(model={"d_ff": 48}))
    assert (found.width, found.dense, found.expert) == (4, 3, 4)
    assert found.top_k == math.sqrt(2)
    expected = {
        ("embedding", ("vocab", "embed")): 1,
        ("stacks/0/block/ffn_norm/scale", ("norm",)): 1,
        ("stacks/0/block/mixer/query", ("embed", "heads", "head")): 4,
        ("stacks/0/block/mixer/out", ("heads", "head", "embed")): 4,
        ("stacks/0/block/mixer/query_bias", ("heads",)): 1,
        ("stacks/0/block/ffn/router/kernel", ("embed", "router")): 4,
        ("stacks/0/block/ffn/gate_up", ("embed", "mlp")): 4,
        ("stacks/0/block/ffn/down", ("mlp", "embed")): 3,
        ("stacks/0/block/ffn/experts/gate_up", ("embed", "mlp")): 4 * math.sqrt(2),
        ("stacks/0/block/ffn/experts/down", ("mlp", "embed")): 4 * math.sqrt(2),
        ("stacks/0/block/ffn/shared/down", ("mlp", "embed")): 4,
    }
    for (path, axes), divisor in expected.items():
        assert found.divisor(path, axes, "adamw") == pytest.approx(divisor), path
        assert found.divisor(path, axes, "lion") == pytest.approx(divisor), path
    experts = "stacks/0/block/ffn/experts/down"
    assert found.divisor(experts, ("mlp", "embed"), "muon") == pytest.approx(2 * math.sqrt(2))
    assert found.divisor(experts, ("mlp", "embed"), "muonh") == pytest.approx(math.sqrt(2))


def test_leaves_left_at_0_follow_the_width_or_change_nothing():
    found = Transfer.from_config(config_of(mup={"base_width": 16}))
    assert found == Transfer(width=2, dense=2, expert=2, top_k=1)
    usual = folded(config_of(mup={"base_width": 16}))
    assert usual.model.residual_multiplier == 1 and usual.moe.route_scale == 1


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "sgd"}}, "scales the updates of adamw, .* not those of .*=sgd"),
        ({"moe": {"renormalize": False}}, "base_top_k=1 is for weights that sum to 1"),
        ({"moe": {"per_layer": "1: top_k=3"}}, "moe.per_layer gives a layer 3; leave top_k out"),
    ],
)
def test_what_no_rule_scales_is_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**sections)
