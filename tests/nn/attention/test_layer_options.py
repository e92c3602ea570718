"""Attention whose layers differ in positions, chunks and norms, against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from moejax.config import AttentionConfig, ConfigError, resolve
from moejax.nn.attention.grouped_query import Attention
from moejax.nn.attention.layer_options import options_by_layer
from moejax.nn.attention.temperature import grow_with_position
from moejax.nn.mask import AttentionMask
from moejax.nn.norms import make_norm

B, L, WIDTH, HEADS, KV_HEADS, HEAD = 2, 9, 16, 4, 2, 6
THETA, EPSILON = 100.0, 1e-4
SEGMENTS_BL = np.array([[1] * 6 + [2] * 3, [1] * 4 + [0] * 5])
POSITIONS_BL = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3, 4]])

LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_original_length": 40,
    "rope_beta_fast": 3.0,
    "rope_beta_slow": 0.5,
}
YARN = {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_length": 40}


def frequencies(config, num_pairs):
    """The angle of each pair at position 1, plain, or with linear or Llama 3 scaling."""
    found = []
    for i in range(num_pairs):
        if config.rope_theta_window:
            found.append(config.rope_theta_window ** (-i / num_pairs))
            continue
        plain = THETA ** (-i / num_pairs)
        if config.rope_scaling == "linear":
            plain /= config.rope_factor
        if config.rope_scaling == "llama3":
            turns = config.rope_original_length * plain / (2 * np.pi)
            kept = min(max((turns - 0.5) / (3.0 - 0.5), 0), 1)
            plain = kept * plain + (1 - kept) * plain / config.rope_factor
        found.append(plain)
    return np.array(found)


def turned(x_A, position, config):
    """The rotated dimensions, which are moved to halves where pairs are neighbours, then others."""
    num_rotated = config.rope_dim or HEAD
    part, others = x_A[:num_rotated], x_A[num_rotated:]
    half = num_rotated // 2
    first, second = part[:half], part[half:]
    if config.rope_interleaved:
        first, second = part[::2], part[1::2]
    pair_a = (first + 1j * second) * np.exp(1j * position * frequencies(config, half))
    return np.concatenate([pair_a.real, pair_a.imag, others])


def without_weight(x_A):
    return x_A / np.sqrt(np.mean(x_A**2) + EPSILON)


def vector(config, w, x_D, name, head, position):
    """A query, key or value with its position."""
    v_A = x_D @ w[name][:, head]
    if name == "value":
        return v_A

    def normed(v_A):
        if config.qk_norm == "head":
            return without_weight(v_A) * w[f"{name}_norm"]["scale"]
        if config.qk_norm == "unweighted" and has_norm:
            return without_weight(v_A)
        return v_A

    has_rope = config.rope_layers == "rope"
    has_norm = has_rope or config.qk_norm_layers == "all"
    if not config.qk_norm_after_rope:
        v_A = normed(v_A)
    if has_rope:
        v_A = turned(v_A, position, config)
    if config.qk_norm_after_rope:
        v_A = normed(v_A)
    if name == "query" and not has_rope and config.temperature:
        steps = (position + 1) // config.temperature_length
        v_A = v_A * (1 + config.temperature * np.log(1 + steps))
    return v_A


def is_seen(config, position, key_position):
    if config.window and key_position <= position - config.window:
        return False
    return not config.chunk or key_position // config.chunk == position // config.chunk


def expected_of(config, w, x_BLD):
    expected = np.zeros(x_BLD.shape)
    for b, i, h in np.ndindex(B, L, HEADS):
        shared = h // (HEADS // KV_HEADS)
        position = POSITIONS_BL[b, i]
        seen = [
            j
            for j in range(i + 1)
            if SEGMENTS_BL[b, j] == SEGMENTS_BL[b, i]
            and is_seen(config, position, POSITIONS_BL[b, j])
        ]
        q_A = vector(config, w, x_BLD[b, i], "query", h, position)
        scores = []
        for j in seen:
            k_A = vector(config, w, x_BLD[b, j], "key", shared, POSITIONS_BL[b, j])
            score = q_A @ k_A / np.sqrt(HEAD)
            cap = config.score_cap
            scores.append(cap * np.tanh(score / cap) if cap else score)
        if config.sinks:
            scores.append(w["sinks"][h])
        weights = oracle.softmax(scores)
        for p, j in zip(weights, seen, strict=False):
            v_A = vector(config, w, x_BLD[b, j], "value", shared, 0)
            expected[b, i] += p * v_A @ w["out"][h]
    return expected


@pytest.mark.parametrize(
    "options",
    [
        {"rope_dim": 4},
        {"rope_dim": 4, "rope_interleaved": True, "qk_norm": "head"},
        {"rope_scaling": "linear", "rope_factor": 2.5},
        LLAMA3,
        {"chunk": 3},
        {"chunk": 4, "window": 3, "sinks": True},
        {"chunk": 2, "score_cap": 0.3},
        {"score_cap": 0.5, "sinks": True},
        {"window": 3, "rope_theta_window": 20.0} | YARN,
        {"qk_norm": "unweighted"},
        {"qk_norm": "unweighted", "qk_norm_after_rope": True, "rope_dim": 2},
        {"qk_norm": "head", "qk_norm_after_rope": True},
        {"rope_layers": "none", "temperature": 0.5, "temperature_length": 2},
        {"rope_layers": "none", "qk_norm": "unweighted", "qk_norm_layers": "rope"},
        {"rope_layers": "none", "qk_norm": "unweighted"},
        {"rope_layers": "none"} | YARN,
    ],
    ids=str,
)
def test_attention_with_options_equals_the_loop_over_queries_and_keys(options):
    config = AttentionConfig(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD, rope_theta=THETA, **options
    )
    module = Attention(
        config,
        WIDTH,
        jnp.dtype("float32"),
        make_norm=functools.partial(make_norm, "rms", epsilon=EPSILON),
        norm_epsilon=EPSILON,
        rngs=nnx.Rngs(params=0),
    )
    graphdef, abstract, constants = nnx.split(module, nnx.Param, ...)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), abstract)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    x_BLD = rng.normal(size=(B, L, WIDTH)).astype(np.float32) / 2

    @jax.jit
    def run(x_BLD, positions_BL, segments_BL):
        return nnx.merge(graphdef, state, constants)(x_BLD, positions_BL, segments_BL)[0]

    found_BLD = run(x_BLD, jnp.int32(POSITIONS_BL), jnp.int32(SEGMENTS_BL))
    is_token_BL = SEGMENTS_BL > 0
    expected_BLD = expected_of(config, w, x_BLD)
    oracle.assert_close(found_BLD[is_token_BL], expected_BLD[is_token_BL], rtol=1e-5)


def test_queries_grow_with_the_padding_before_them_and_chunks_do_not():
    q_BLHA = jnp.ones((1, 6, 1, 2))
    positions_BL, segments_BL = jnp.array([[0, 0, 0, 1, 2, 3]]), jnp.array([[0, 0, 1, 1, 1, 1]])
    config = AttentionConfig(temperature=1.0, temperature_length=2)
    grown = grow_with_position(q_BLHA, positions_BL, segments_BL, config, jnp.array(False))
    expected = [1 + np.log(1 + (index + 1) // 2) for index in range(2, 6)]
    np.testing.assert_allclose(grown[0, 2:, 0, 0], expected, rtol=1e-6)
    mask = AttentionMask.within_rows(segments_BL).within(positions_BL, chunk=2)
    assert mask.materialize(1, 6, 6)[0, 2:, 2:].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_a_query_sees_its_chunk_up_to_itself_in_rows_and_in_a_cache():
    positions_BL = jnp.array([[0, 1, 2, 3, 4, 0, 1]])
    in_row = AttentionMask.within_rows(jnp.array([[1, 1, 1, 1, 1, 2, 2]]))
    assert in_row.within(positions_BL, chunk=3).materialize(1, 7, 7)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    positions_B1 = jnp.array([[4], [6]])
    in_cache = AttentionMask.of_cache(positions_B1).within(positions_B1, window=2, chunk=3)
    assert in_cache.materialize(2, 1, 8)[:, 0].astype(int).tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
    ]


def test_options_are_those_of_each_layer_and_absent_where_layers_are_alike():
    config = AttentionConfig(window=8, window_layers="full, window", rope_theta_window=10.0)
    options = options_by_layer(config, 3, 2)
    assert options.chunk is None and options.has_rope is None
    assert options.window.tolist() == [2**30, 8, 2**30]
    np.testing.assert_allclose(options.frequency_a[:, 1], [1e-2, 10**-0.5, 1e-2], rtol=1e-6)
    assert jax.tree.leaves(options_by_layer(AttentionConfig(), 3, 2)) == []


@pytest.mark.parametrize(
    ("leaves", "words"),
    [
        (
            {"window": 4, "window_layers": "window, chunk"},
            "attention.window_layers='window, chunk'",
        ),
        ({"chunk": 4, "chunk_layers": "window"}, "must list chunk or full for each layer"),
        ({"rope_layers": "rope,, none"}, "attention.rope_layers='rope,, none' must list rope or"),
        ({"rope_dim": 3}, "attention.rope_dim=3 must be even and at most the width of a head, 64"),
        ({"rope_dim": 66}, "attention.rope_dim=66 must be even"),
        (
            {"rope_scaling": "llama3", "rope_beta_slow": 40.0},
            "attention.rope_beta_slow=40.0 must be at most attention.rope_beta_fast=32.0",
        ),
        ({"temperature": 0.1}, "attention.temperature=0.1 does nothing"),
        ({"rope_theta_window": 100.0}, "attention.rope_theta_window=100.0 does nothing"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_their_leaf(leaves, words):
    with pytest.raises(ConfigError) as caught:
        resolve({"attention": leaves})
    assert words in str(caught.value) and "\n" not in str(caught.value)
