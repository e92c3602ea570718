"""The decoder: what a token may depend on, and what must not change the result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oracle
from cases.training import case_config, small_config
from moejax.config import Knobs, resolve
from moejax.config.sections.attention import FULL
from moejax.inference.layered import LayeredDecoder
from moejax.models.blocks import Context
from moejax.models.decoder import Decoder
from moejax.moe.balancing.losses import balance_loss, z_loss
from moejax.moe.balancing.stats import join
from moejax.moe.router.selection import SAVED_NAMES
from moejax.moe.token_info import TokenInfo
from moejax.nn.attention.layer_options import read_constants

B, L, V = 2, 8, 320


def config_of(**sections):
    """A tiny decoder; keyword arguments are sections of changes."""
    base = {
        "model": {"num_layers": 2, "d_model": 8, "d_ff": 12},
        "attention": {"num_heads": 2, "num_kv_heads": 1},
        "moe": {"num_experts": 4, "top_k": 2, "d_expert": 6},
        "data": {"tokenizer": "bytes", "seq_len": L},
    }
    return resolve({name: section | sections.get(name, {}) for name, section in base.items()})


PLAIN = config_of()
CAPACITY = config_of(moe={"dispatch": "capacity", "capacity_factor": 2.0})
RICH = config_of(  # dense, (dense, MoE), (dense, MoE), dense
    model={"num_layers": 6, "tied_embeddings": False},
    attention={"qk_norm": "head"},
    moe={"first_dense": 1, "every": 2, "num_shared_experts": 1, "renormalize": False},
)
DENSE = config_of(moe={"num_experts": 0})


@functools.cache
def abstract(config):
    """Structure and abstract parameters."""
    return nnx.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0))), nnx.Param, ...
    )[:2]


def merge(config, params):
    """The decoder with these parameters and the router state of a fresh one, which is 0."""
    fresh = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0))), nnx.Param, ...
    )[2]
    return nnx.merge(
        abstract(config)[0], params, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), fresh)
    )


@functools.cache
def weights_of(config):
    """Random weights: the shapes of the config, but nowhere near the initial values."""
    rng = np.random.default_rng(0)

    def draw(a):
        scale = 1.0 if a.ndim < 3 else 2.0 / np.sqrt(a.shape[-2])
        return jnp.asarray(scale * rng.normal(size=a.shape), jnp.float32)

    return jax.tree.map(draw, abstract(config)[1])


def apply(config, state, tokens_BL, segments_BL, positions_BL, factor=None):
    """Logits, and the statistics of all MoE layers; training with a capacity factor, or evaluation
    without.
    """
    knobs = (
        None
        if factor is None
        else dataclasses.replace(Knobs.from_config(config), capacity_factor=factor)
    )
    model = merge(config, state)
    hidden_BLD, runs = model(tokens_BL, segments_BL, positions_BL, knobs=knobs)
    return model.logits(hidden_BLD), join(runs)


@functools.cache
def forward(config):
    """Compiled once for each config: `(tokens, segments, positions, factor) -> (logits, stats)`."""
    run = jax.jit(functools.partial(apply, config))
    return functools.partial(run, weights_of(config))


def tokens_of(seed):
    return np.random.default_rng(seed).integers(0, 256, (B, L)).astype(np.int32)


ONE_DOCUMENT = (np.ones((B, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (B, 1)))

every_kind = pytest.mark.parametrize(
    ("config", "factor"),
    [(PLAIN, None), (CAPACITY, 0.5), (RICH, None)],
    ids=["dropless", "capacity", "rich"],
)


def run(config, tokens_BL, segments_BL=ONE_DOCUMENT[0], positions_BL=ONE_DOCUMENT[1], factor=None):
    return forward(config)(
        tokens_BL, segments_BL, positions_BL, None if factor is None else jnp.float32(factor)
    )


# What a token depends on
# ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("cut", [1, 5])
def test_changing_later_tokens_changes_no_earlier_logits(config, factor, cut):
    tokens_BL, other_BL = tokens_of(0), tokens_of(1)
    other_BL[:, :cut] = tokens_BL[:, :cut]
    (logits, stats), (changed, _) = (
        run(config, tokens_BL, factor=factor),
        run(config, other_BL, factor=factor),
    )
    oracle.assert_close(changed[:, :cut], logits[:, :cut])
    assert np.all(np.abs(changed[:, cut:] - logits[:, cut:]).max(-1) > 1e-2)
    assert factor is None or np.all(stats.dropped > 0)  # or the test of capacity would test nothing


@every_kind
def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(config, factor):
    tokens_BL, other_BL = tokens_of(0), tokens_of(1)
    other_BL[0] = tokens_BL[0]
    one, other = run(config, tokens_BL, factor=factor)[0], run(config, other_BL, factor=factor)[0]
    oracle.assert_close(other[0], one[0])


@every_kind
def test_the_same_batch_twice_is_bit_identical_and_needs_no_key(config, factor):
    jax.tree.map(
        np.testing.assert_array_equal,
        run(config, tokens_of(0), factor=factor),
        run(config, tokens_of(0), factor=factor),
    )


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_packed_row_equals_its_documents_alone(config):
    first, second = tokens_of(0)[0, :5], tokens_of(1)[0, :3]
    packed_BL, alone_BL = np.zeros((B, L), np.int32), np.zeros((B, L), np.int32)
    packed_BL[0] = np.concatenate([first, second])
    alone_BL[0, :5], alone_BL[1, :3] = first, second
    segments_BL = np.array([[1] * 5 + [2] * 3, [0] * L], np.int32)
    positions_BL = np.array([[0, 1, 2, 3, 4, 0, 1, 2], [0] * L], np.int32)
    alone_segments_BL = np.array([[1] * 5 + [0] * 3, [1] * 3 + [0] * 5], np.int32)
    packed, packed_stats = run(config, packed_BL, segments_BL, positions_BL)
    alone, alone_stats = run(config, alone_BL, alone_segments_BL)
    oracle.assert_close(packed[0, :5], alone[0, :5])
    oracle.assert_close(packed[0, 5:], alone[1, :3])
    oracle.assert_close(packed_stats, alone_stats)
    assert np.all(packed_stats.num_tokens == 8)


def test_attention_does_not_cross_from_one_document_into_the_next():
    tokens_BL = tokens_of(0)
    segments_BL = np.array([[1] * 4 + [2] * 4] * B, np.int32)
    positions_BL = np.array([[0, 1, 2, 3] * 2] * B, np.int32)
    other_BL = np.concatenate([tokens_of(1)[:, :4], tokens_BL[:, 4:]], axis=1)
    logits, changed = (
        run(PLAIN, tokens, segments_BL, positions_BL)[0] for tokens in (tokens_BL, other_BL)
    )
    oracle.assert_close(changed[:, 4:], logits[:, 4:])
    # In one document it does look back:
    logits, changed = (run(PLAIN, tokens)[0] for tokens in (tokens_BL, other_BL))
    assert np.abs(changed[:, 4:] - logits[:, 4:]).max() > 1e-2


def test_what_stands_at_padding_changes_no_logit_of_a_token_and_no_statistic():
    segments_BL = np.array([[1] * 5 + [0] * 3, [1] * 8], np.int32)
    tokens_BL = tokens_of(0)
    other_BL = np.where(segments_BL > 0, tokens_BL, tokens_of(1))
    (logits, stats), (changed, changed_stats) = (
        run(PLAIN, tokens, segments_BL) for tokens in (tokens_BL, other_BL)
    )
    oracle.assert_close(changed[segments_BL > 0], logits[segments_BL > 0])
    oracle.assert_close(changed_stats, stats)
    assert np.all(stats.num_tokens == 13)


# Cached decoding
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)], ids=["equal prompts", "ragged prompts"])
def test_cached_decoding_equals_the_full_forward_pass(config, lengths):
    tokens_BL, positions_BL = jnp.asarray(tokens_of(0)), jnp.asarray(ONE_DOCUMENT[1])
    full, _ = run(config, tokens_BL)
    decoder = LayeredDecoder(merge(config, weights_of(config)))
    cache = decoder.init_cache(B, L)
    prompt_BL = jnp.where(jnp.arange(4)[None] < jnp.array(lengths)[:, None], tokens_BL[:, :4], 7)
    x_BLD, cache = decoder.extend(prompt_BL, positions_BL[:, :4], cache)
    logits = decoder.logits(x_BLD)
    for b, length in enumerate(lengths):
        oracle.assert_close(logits[b, :length], full[b, :length])
    for step in range(4):
        at_B = jnp.array(lengths) + step
        x_BLD, cache = decoder.extend(tokens_BL[jnp.arange(B), at_B][:, None], at_B[:, None], cache)
        oracle.assert_close(decoder.logits(x_BLD)[:, 0], np.asarray(full)[[0, 1], at_B])


# Layers
# --------------------------------------------------------------------------------------------------

PATTERNS = [
    (1, 0, 1),
    (3, 0, 1),
    (4, 1, 1),
    (4, 0, 2),
    (5, 0, 2),
    (6, 1, 2),
    (7, 2, 3),
    (4, 3, 1),
    (12, 1, 4),
]


@pytest.mark.parametrize(("num_layers", "first_dense", "every"), PATTERNS)
def test_there_is_one_balance_term_for_each_moe_layer_and_the_layers_are_where_the_config_puts_them(
    num_layers, first_dense, every
):
    config = config_of(
        model={"num_layers": num_layers}, moe={"first_dense": first_dense, "every": every}
    )
    expected = [i for i in range(first_dense, num_layers) if (i - first_dense + 1) % every == 0]
    assert list(config.moe_layers) == expected
    assert config.num_moe_layers == len(expected)
    model = merge(config, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract(config)[1]))
    kinds = [block.is_moe for block, _ in model.walk()]
    assert kinds == [i in expected for i in range(num_layers)]
    shape = jax.ShapeDtypeStruct((B, L), jnp.int32)
    _, stats = jax.eval_shape(
        functools.partial(apply, config), abstract(config)[1], shape, shape, shape
    )
    terms = jax.eval_shape(lambda s: (balance_loss(s), z_loss(s)), stats)
    assert [term.shape for term in terms] == [(len(expected),)] * 2
    assert stats.assignments_E.shape == (len(expected), 4)


def test_a_dense_model_has_no_moe_layer_and_no_statistics():
    assert DENSE.moe_layers == () and DENSE.num_moe_layers == 0
    logits, stats = run(DENSE, tokens_of(0))
    assert stats is None and logits.shape == (B, L, V) and np.all(np.isfinite(logits))


def test_the_scanned_stacks_equal_a_loop_over_their_blocks_statistics_in_order_of_layers():
    @jax.jit
    def loop(state, tokens_BL, segments_BL, positions_BL):
        model = merge(RICH, state)
        context = Context(positions_BL, segments_BL, TokenInfo(segments_BL > 0))
        x_BLD, layers = model.embed(tokens_BL), []
        for block, own in model.walk(context):
            x_BLD, stats, _ = block(x_BLD, own)
            layers += [stats] if block.is_moe else []
        return model.unembed(x_BLD), jax.tree.map(lambda *a: jnp.stack(a), *layers)

    logits, stats = run(RICH, tokens_of(0))
    oracle.assert_close((logits, stats), loop(weights_of(RICH), tokens_of(0), *ONE_DOCUMENT))
    assert np.abs(stats.z[0] - stats.z[1]) > 1e-2  # the layers differ, so their order was tested


def loss_of(config, state, tokens_BL, segments_BL, positions_BL, factor=None):
    logits, stats = apply(config, state, tokens_BL, segments_BL, positions_BL, factor)
    lm = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BL).mean()
    return lm if stats is None else lm + 0.1 * balance_loss(stats).sum() + 0.1 * z_loss(stats).sum()


@functools.cache
def loss_and_gradients(remat, scan_layers):
    model = {"remat": remat, "scan_layers": scan_layers}
    config = config_of(model=model, moe={"dispatch": "capacity", "capacity_factor": 1.0})
    return jax.jit(jax.value_and_grad(functools.partial(loss_of, config)))(
        nnx.State(weights_of(PLAIN)), tokens_of(0), *ONE_DOCUMENT, jnp.float32(0.5)
    )


@pytest.mark.parametrize(
    ("remat", "scan_layers"), [(False, True), (True, False)], ids=["no remat", "unrolled"]
)
def test_neither_remat_nor_the_scan_changes_the_loss_or_a_gradient(remat, scan_layers):
    oracle.assert_close(loss_and_gradients(remat, scan_layers), loss_and_gradients(True, True))


# Traced programs
# --------------------------------------------------------------------------------------------------


@functools.cache
def gradient_jaxpr(config):
    shape = jax.ShapeDtypeStruct((B, L), jnp.int32)
    return jax.make_jaxpr(jax.grad(functools.partial(loss_of, config)))(
        abstract(config)[1], shape, shape, shape
    )


def test_every_name_that_remat_saves_occurs_in_the_program():
    names = {
        e.params["name"]
        for e in oracle.equations(gradient_jaxpr(PLAIN))
        if e.primitive.name == "name"
    }
    assert set(SAVED_NAMES) and set(SAVED_NAMES) <= names


def test_the_backward_pass_never_selects_experts_again():
    # Two layers are one scanned block: one selection in the whole gradient, and one of K + 1
    # for metrics.
    selections = [
        e.params["k"]
        for e in oracle.equations(gradient_jaxpr(PLAIN))
        if e.primitive.name == "top_k"
    ]
    assert selections.count(PLAIN.moe.top_k) == 1


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"moe": {"num_experts": 8}}, {"moe": {"num_experts": 64}}),
        ({"model": {"num_layers": 8}}, {}),
    ],
    ids=["8 and 64 experts", "2 and 8 layers"],
)
def test_the_traced_program_of_the_gradient_has_the_same_size_for_more_experts_and_more_layers(
    small, large, dispatch
):
    def size(sections):
        moe = sections.get("moe", {}) | {"dispatch": dispatch}
        jaxpr = gradient_jaxpr(config_of(**sections | {"moe": moe}))
        scans = [
            (e.params["length"], e.params["unroll"])
            for e in oracle.equations(jaxpr)
            if e.primitive.name == "scan"
        ]
        # An unrolled scan is one equation, but not one to compile: only over a token's choices is
        # it small enough.
        assert len(scans) >= 2 and all(
            unroll == 1 for length, unroll in scans if length > PLAIN.moe.top_k
        )
        return len(oracle.primitives(jaxpr))

    assert size(small) == size(large) > 100


# Variants
# --------------------------------------------------------------------------------------------------


def shapes_of(config):
    return jax.tree.map(lambda a: a.shape, nnx.to_pure_dict(abstract(config)[1]))


def test_tied_embeddings_are_one_matrix_and_untied_ones_two():
    tied, untied = shapes_of(PLAIN), shapes_of(RICH)
    assert tied["embedding"] == untied["embedding"] == untied["unembedding"] == (V, 8)
    assert "unembedding" not in tied
    state = nnx.to_pure_dict(weights_of(PLAIN))
    logits, _ = run(PLAIN, tokens_of(0))
    final = jax.tree.map(lambda a: a, weights_of(PLAIN))
    nnx.replace_by_pure_dict(final, state | {"embedding": 2 * state["embedding"]})
    doubled = merge(PLAIN, final)
    x_BLD = jnp.ones((1, 1, 8))
    logits_of = [
        model.unembed(x_BLD)[..., : PLAIN.num_token_ids]
        for model in (doubled, merge(PLAIN, weights_of(PLAIN)))
    ]
    oracle.assert_close(logits_of[0], 2 * logits_of[1])
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["tied", "untied"])
def test_ids_that_are_no_token_have_no_part_in_losses_and_gradients(config):
    tokens_BL, params = tokens_of(3), weights_of(config)
    name = "embedding" if config.model.tied_embeddings else "unembedding"
    wild = jax.tree.map(lambda x: x, params)
    wild[name][...] = params[name][...].at[config.num_token_ids :].set(1e3)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        logits_BLV = apply(config, params, *map(jnp.asarray, (tokens_BL, *ONE_DOCUMENT)))[0]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_BLV, tokens_BL
        ).mean(), logits_BLV

    (value, logits_BLV), grads = loss(params)
    tokens_alone = optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV[..., : config.num_token_ids], tokens_BL
    )
    np.testing.assert_allclose(value, tokens_alone.mean(), rtol=1e-6)
    assert (
        config.num_token_ids < config.vocab_size
        and not grads[name][...][config.num_token_ids :].any()
    )
    (value_of_wild, _), grads_of_wild = loss(wild)
    for a, b in zip(
        jax.tree.leaves((value, grads)),
        jax.tree.leaves((value_of_wild, grads_of_wild)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_qk_norm_and_grouped_queries_have_their_parameters_in_every_layer():
    config = config_of(
        model={"num_layers": 3},
        attention={"qk_norm": "head", "num_heads": 4, "num_kv_heads": 2},
    )
    attention = shapes_of(config)["stacks"][0]["block"]["mixer"]
    assert attention == {
        "query": (3, 8, 4, 2),
        "key": (3, 8, 2, 2),
        "value": (3, 8, 2, 2),
        "out": (3, 4, 2, 8),
        "query_norm": {"scale": (3, 2)},
        "key_norm": {"scale": (3, 2)},
    }
    without = shapes_of(PLAIN)["stacks"][0]["block"]["mixer"]
    assert "query_norm" not in without and without["key"] == (2, 8, 1, 4)


def test_embeddings_enter_with_unit_scale_and_leave_with_logits_of_unit_scale():
    config = config_of(model={"d_model": 64})

    @jax.jit
    def run(tokens_BL):
        model = Decoder(config, rngs=nnx.Rngs(params=0))
        return model.embed(tokens_BL), model.unembed(
            jax.random.normal(jax.random.key(1), (B, L, 64))
        )

    x_BLD, logits = run(tokens_of(0))
    # 1,024 and 4,144 numbers, some of them dependent.
    np.testing.assert_allclose(
        [x_BLD.std(), logits[..., : config.num_token_ids].std()], 1, rtol=0.1
    )


def test_a_bfloat16_decoder_keeps_parameters_and_logits_in_float32():
    config = config_of(model={"compute_dtype": "bfloat16"})
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(abstract(config)[1]))
    shape = jax.ShapeDtypeStruct((B, L), jnp.int32)
    logits, stats = jax.eval_shape(
        functools.partial(apply, config), abstract(config)[1], shape, shape, shape
    )
    assert logits.dtype == jnp.float32 and stats.probs_E.dtype == stats.z.dtype == jnp.float32
    jaxpr = jax.make_jaxpr(functools.partial(apply, config))(
        abstract(config)[1], shape, shape, shape
    )
    products = {
        v.aval.dtype.name
        for e in oracle.equations(jaxpr)
        if e.primitive.name == "dot_general"
        for v in e.invars
    }
    assert "bfloat16" in products


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_size_runs_and_a_row_is_the_same_in_each(batch):
    tokens_BL = np.concatenate([tokens_of(0), tokens_of(1)])[:batch]
    segments_BL, positions_BL = (
        np.ones((batch, L), np.int32),
        np.tile(np.arange(L, dtype=np.int32), (batch, 1)),
    )
    logits, _ = run(PLAIN, tokens_BL, segments_BL, positions_BL)
    oracle.assert_close(logits[0], run(PLAIN, tokens_of(0))[0][0])


def test_walking_through_the_layers_draws_what_the_scan_draws():
    pattern = {"first_dense": 1, "every": 2, "expert_dropout": 0.5, "jitter": 0.1}
    config = small_config(model={"num_layers": 5}, moe=pattern)
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    knobs, keys_B = Knobs.from_config(config), jax.random.split(jax.random.key(3), 2)
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 16)), jnp.int32)
    ones_BL, positions_BL = (
        jnp.ones_like(tokens_BL),
        jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16)),
    )
    info = TokenInfo(ones_BL > 0, tokens_BL, positions_BL, knobs, keys_B)

    @jax.jit
    def walk(tokens_BL):
        x_BLD, dropped = model.embed(tokens_BL), []
        for block, own in model.walk(Context(positions_BL, ones_BL, info)):
            x_BLD, stats, _ = block(x_BLD, own)
            dropped += [stats.dropped_out] if block.is_moe else []
        return model.final_norm(x_BLD), jnp.stack(dropped)

    @jax.jit
    def scan(tokens_BL):
        hidden_BLD, found = model(tokens_BL, ones_BL, positions_BL, knobs=knobs, keys_B=keys_B)
        return hidden_BLD, jnp.concatenate([stats.dropped_out for stats in found])

    walked, scanned = walk(tokens_BL), scan(tokens_BL)
    oracle.assert_close(walked[0], scanned[0])
    assert scanned[1].tolist() == walked[1].tolist() and len(set(walked[1].tolist())) > 1


def test_every_layer_has_its_window_also_where_dense_layers_and_experts_take_turns():
    config = case_config("attention")
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    windows = [int(block.mixer.constants.window[...]) for block, _ in model.walk()]
    assert windows == [3, FULL, FULL, 3, FULL]
    assert [block.is_moe for block, _ in model.walk()] == [False, False, True, False, True]


def test_every_layer_has_its_own_chunk_theta_and_positions():
    config = case_config("positions by layer")
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    found = [read_constants(block.mixer.constants) for block, _ in model.walk()]
    assert [int(each.window) for each in found] == [FULL, 6, FULL, 6, FULL]
    assert [int(each.chunk) for each in found] == [4, FULL, FULL, 4, FULL]
    assert [bool(each.has_rope) for each in found] == [True, True, False, True, True]
    # 6 dimensions of a head are 3 pairs; the second one turns 50^(-1/3) a position in windows.
    turns = [float(each.frequency_a[1]) for each in found]
    in_window = 50 ** (-1 / 3)
    assert turns[1] == turns[3] == pytest.approx(in_window, rel=1e-6)
    assert turns[0] == turns[2] == turns[4] != turns[1]


def test_layers_in_turn_give_what_the_scan_over_them_gives_with_a_cache():
    config = case_config("positions by layer")
    model = Decoder(config, rngs=nnx.Rngs(params=0))
    tokens_BL = jnp.asarray(np.random.default_rng(0).integers(3, 250, (2, 16)), jnp.int32)
    positions_BL = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
    hidden_BLD, _ = model(tokens_BL, jnp.ones_like(tokens_BL), positions_BL)
    layered = LayeredDecoder(model)
    cache = layered.init_cache(2, 16)
    steps = []
    for first, last in [(0, 6), (6, 7), (7, 11), (11, 12), (12, 16)]:
        part = slice(first, last)
        x_BLD, cache = layered.extend(tokens_BL[:, part], positions_BL[:, part], cache)
        steps.append(x_BLD)
    oracle.assert_close(model.final_norm(jnp.concatenate(steps, axis=1)), hidden_BLD, rtol=1e-5)
