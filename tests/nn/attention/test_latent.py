"""Latent attention against loops over queries, heads and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from moejax.config import AttentionConfig
from moejax.nn.attention import latent
from moejax.nn.attention.absorbed import is_cheaper_absorbed
from moejax.nn.attention.latent import LATENT_EPSILON, LatentAttention

B, L, WIDTH, HEADS = 2, 6, 10, 3
THETA = 100.0
SIZES = {"d_kv_latent": 7, "d_nope": 4, "d_rope": 4, "d_value": 5}


def make(**options):
    """Returns the module with random weights, also of its norms, and the weights by name."""
    config = AttentionConfig(kind="latent", num_heads=HEADS, rope_theta=THETA, **SIZES | options)
    module = LatentAttention(config, WIDTH, jnp.dtype("float32"), rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, jnp.float32), state)
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    return config, graphdef, state, weights


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2) + LATENT_EPSILON) * scale


def turned(x_A, position, is_interleaved):
    """Pairs of dimensions as complex numbers, turned, in the order of halves."""
    half = len(x_A) // 2
    first, second = (x_A[::2], x_A[1::2]) if is_interleaved else (x_A[:half], x_A[half:])
    frequency_a = THETA ** (-2 * np.arange(half) / len(x_A))
    pair_a = (first + 1j * second) * np.exp(1j * position * frequency_a)
    return np.concatenate([pair_a.real, pair_a.imag])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d_query_latent": 8, "score_factor": 1.7},
        {"rope_interleaved": True, "d_value": 8},
        {"d_query_latent": 8, "score_factor": 1.7, "scale_latents": True},
        {"scale_latents": True},
        {"d_query_latent": 8, "latent_bias": True, "out_bias": True},
        {"latent_bias": True, "d_value": 11},
    ],
    ids=str,
)
def test_latent_attention_equals_the_loop_over_queries_heads_and_keys(options):
    config, graphdef, state, w = make(**options)
    rng = np.random.default_rng(2)
    x_BLD = rng.normal(size=(B, L, WIDTH)).astype(np.float32)
    segments_BL = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]])
    positions_BL = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]])
    nope, d_latent = config.d_nope, config.d_kv_latent

    def query(b, i, h):
        x_X = x_BLD[b, i]
        if config.d_query_latent:
            down_C = x_X @ w["query_down"]
            if config.latent_bias:
                down_C = down_C + w["query_down_bias"]
            x_X = normed(down_C, w["query_norm"]["scale"])
        q_A = x_X @ w["query"][:, h]
        q_A[nope:] = turned(q_A[nope:], positions_BL[b, i], config.rope_interleaved)
        if config.scale_latents and config.d_query_latent:
            q_A *= np.sqrt(WIDTH / config.d_query_latent)
        return q_A

    def key_and_value(b, j, h):
        down_X = x_BLD[b, j] @ w["kv_down"]
        if config.latent_bias:
            down_X = down_X + w["kv_down_bias"]
        latent_C = normed(down_X[:d_latent], w["kv_norm"]["scale"])
        if config.scale_latents:
            latent_C = latent_C * np.sqrt(WIDTH / d_latent)
        up_X = latent_C @ w["kv_up"][:, h]
        shared_A = turned(down_X[d_latent:], positions_BL[b, j], config.rope_interleaved)
        return np.concatenate([up_X[:nope], shared_A]), up_X[nope:]

    expected = np.zeros((B, L, WIDTH))
    for b, i, h in np.ndindex(B, L, HEADS):
        seen = [j for j in range(i + 1) if segments_BL[b, j] == segments_BL[b, i]]
        pairs = [key_and_value(b, j, h) for j in seen]
        scale = config.score_factor / np.sqrt(nope + config.d_rope)
        scores = [query(b, i, h) @ key_A * scale for key_A, _ in pairs]
        weighted = zip(oracle.softmax(scores), pairs, strict=True)
        expected[b, i] += sum(p * value_V for p, (_, value_V) in weighted) @ w["out"][h]

    if config.out_bias:
        expected += w["out_bias"]

    @jax.jit
    def run(x_BLD, positions_BL, segments_BL):
        return nnx.merge(graphdef, state)(x_BLD, positions_BL, segments_BL)[0]

    oracle.assert_close(run(x_BLD, positions_BL, segments_BL), expected)


def test_a_cache_gives_what_the_row_gives_and_holds_the_latent_vectors_alone():
    config, graphdef, state, _ = make(d_query_latent=8)
    module = nnx.merge(graphdef, state)
    x_BLD = jax.random.normal(jax.random.key(0), (B, L, WIDTH))
    positions_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    expected_BLD, _ = module(x_BLD, positions_BL, jnp.ones((B, L), jnp.int32))
    cache = module.init_cache(B, L + 2)
    sizes = [array.shape for array in jax.tree.leaves(cache)]
    assert sizes == [(B, L + 2, config.d_kv_latent), (B, L + 2, config.d_rope)]
    first_BLD, cache = module(x_BLD[:, :4], positions_BL[:, :4], cache=cache)
    found = [first_BLD]
    for i in range(4, L):
        y_B1D, cache = module(x_BLD[:, i : i + 1], positions_BL[:, i : i + 1], cache=cache)
        found.append(y_B1D)
    oracle.assert_close(jnp.concatenate(found, axis=1), expected_BLD)
    with pytest.raises(ValueError, match="needs segments_BL"):
        module(x_BLD, positions_BL)


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("options", [{}, {"d_query_latent": 8, "score_factor": 1.7, "d_value": 11}])
def test_attention_to_latent_vectors_is_that_to_keys_and_values_of_each_head(
    monkeypatch, num_new, options
):
    _, graphdef, state, _ = make(**options)
    module = nnx.merge(graphdef, state)
    x_BLD = jax.random.normal(jax.random.key(0), (B, L, WIDTH))
    # Rows are at different places, and some slots are still empty.
    positions_BL = jnp.arange(L)[None] + jnp.array([[0], [3]])
    first = L - num_new
    _, cache = module(x_BLD[:, :first], positions_BL[:, :first], cache=module.init_cache(B, L + 5))

    def decode(is_absorbed):
        monkeypatch.setattr(latent, "is_cheaper_absorbed", lambda *sizes: is_absorbed)
        return module(x_BLD[:, first:], positions_BL[:, first:], cache=cache)[0]

    absorbed_BLD, expanded_BLD = decode(is_absorbed=True), decode(is_absorbed=False)
    oracle.assert_close(absorbed_BLD, expanded_BLD, rtol=1e-6)
    assert not np.array_equal(absorbed_BLD, expanded_BLD)  # they are two ways indeed


def test_a_token_at_a_time_is_absorbed_and_a_prompt_is_not():
    config = AttentionConfig(kind="latent", num_heads=128)  # with the widths of DeepSeek-V3
    assert is_cheaper_absorbed(config, 1, 4096) and is_cheaper_absorbed(config, 100, 4096)
    assert not is_cheaper_absorbed(config, 200, 4096)
    assert not is_cheaper_absorbed(config, 4096, 4096)


def test_a_step_with_a_cache_makes_no_key_or_value_of_the_slots():
    config, graphdef, state, _ = make()
    module = nnx.merge(graphdef, state)
    slots = 64
    cache = module.init_cache(B, slots)

    def sizes_of(num_new):
        x_BLD, positions_BL = jnp.ones((B, num_new, WIDTH)), jnp.zeros((B, num_new), jnp.int32)
        traced = jax.make_jaxpr(lambda x, cache: module(x, positions_BL, cache=cache))
        equations = oracle.equations(traced(x_BLD, cache).jaxpr)
        return {each.aval.shape for equation in equations for each in equation.outvars}

    expanded = (B, slots, HEADS, config.d_nope + config.d_value)
    assert expanded in sizes_of(slots) and expanded not in sizes_of(1)
