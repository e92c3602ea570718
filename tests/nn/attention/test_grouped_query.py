"""Attention, rotary positions, masks and norms against loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from moejax.config import AttentionConfig
from moejax.nn.attention import attend as attention
from moejax.nn.attention import causal_blocks as causal
from moejax.nn.attention.grouped_query import Attention
from moejax.nn.mask import AttentionMask
from moejax.nn.norms import make_norm
from moejax.nn.positions import rotate
from moejax.nn.rope_scaling import rope_frequencies

B, L, WIDTH, HEADS = 2, 6, 16, 4
HEAD = WIDTH // HEADS
THETA = 100.0
EPSILON = 1e-4
make_qk_norm = functools.partial(make_norm, "rms", epsilon=EPSILON)

PLAIN = rope_frequencies(AttentionConfig(rope_theta=THETA), HEAD // 2)
turn = jax.jit(functools.partial(rotate, frequency_a=PLAIN))


def frequencies(config):
    """The angle of each pair of dimensions at position 1, by the formulas of YaRN if it is on."""
    plain = [THETA ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    if config.rope_scaling == "none":
        return np.array(plain)
    turns = [config.rope_original_length * each / (2 * np.pi) for each in plain]
    # Pair 0 turns 6.4 times within 40 positions, pair 1 0.64 times: the ramp of whole pairs goes
    # from pair 0, which stays, to pair 1, which is slowed down.
    assert 1 < turns[0] < 32 and turns[1] < 1
    return np.array([plain[0], plain[1] / config.rope_factor])


def rotate_with_complex_numbers(x_A, position, frequency_a=None):
    """Dimensions i and i + A/2 as one complex number, turned by position * theta^(-2i/A)."""
    half = len(x_A) // 2
    if frequency_a is None:
        frequency_a = THETA ** (-2 * np.arange(half) / len(x_A))
    turned = (x_A[:half] + 1j * x_A[half:]) * np.exp(1j * position * frequency_a)
    return np.concatenate([turned.real, turned.imag])


def test_rotary_positions_turn_pairs_of_dimensions_as_complex_numbers():
    rng = np.random.default_rng(0)
    x_BLHA, positions_BL = rng.normal(size=(B, L, HEADS, HEAD)), rng.integers(0, 50, (B, L))
    expected = np.zeros_like(x_BLHA)
    for b, i, h in np.ndindex(B, L, HEADS):
        expected[b, i, h] = rotate_with_complex_numbers(x_BLHA[b, i, h], positions_BL[b, i])
    # Angles up to 50 radians have an error of 50 ulps of 1 in float32.
    oracle.assert_close(turn(jnp.float32(x_BLHA), jnp.int32(positions_BL)), expected, rtol=2e-5)


def test_products_of_rotated_vectors_depend_only_on_the_distance_of_their_positions():
    q_1LHA, k_1LHA = (jax.random.normal(jax.random.key(i), (1, L, HEADS, HEAD)) for i in range(2))
    positions_1L, keys_1L = jnp.arange(L)[None], 2 * jnp.arange(L)[None]

    def products(shift):
        return jnp.einsum(
            "BLHA,BSHA->BHLS", turn(q_1LHA, positions_1L + shift), turn(k_1LHA, keys_1L + shift)
        )

    # Angles up to 60 radians, as above.
    oracle.assert_close(products(50), products(0), rtol=2e-5)
    assert np.abs(products(0) - jnp.einsum("BLHA,BSHA->BHLS", q_1LHA, k_1LHA)).max() > 0.1


def test_position_0_is_not_turned_and_no_position_changes_a_length():
    x_BLHA = jax.random.normal(jax.random.key(0), (B, L, HEADS, HEAD))
    np.testing.assert_array_equal(turn(x_BLHA, jnp.zeros((B, L), jnp.int32)), x_BLHA)
    turned_BLHA = turn(x_BLHA, jnp.full((B, L), 77))
    oracle.assert_close(jnp.linalg.norm(turned_BLHA, axis=-1), jnp.linalg.norm(x_BLHA, axis=-1))
    low = jnp.asarray(x_BLHA, jnp.bfloat16)
    assert turn(low, jnp.full((B, L), 77)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kv_heads", "options"),
    [
        (1, {}),
        (4, {"qk_norm": "head"}),
        (2, {"qk_norm": "head", "qkv_bias": True, "out_bias": True, "head_dim": HEAD}),
        (2, {"qk_norm": "whole", "clip_qkv": 0.7}),
        (2, {"clip_qkv": 0.3, "qkv_bias": True}),
        (2, {"score_factor": 1.7, "qk_norm": "head"}),
        (2, {"window": 2, "sinks": True}),
        (1, {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_length": 40}),
    ],
)
def test_attention_equals_the_loop_over_queries_with_shared_heads(kv_heads, options):
    config = AttentionConfig(num_heads=HEADS, num_kv_heads=kv_heads, rope_theta=THETA, **options)
    width = WIDTH + 2 if config.head_dim else WIDTH  # which the heads' width need not divide

    def make():
        rngs = nnx.Rngs(params=0)
        return Attention(
            config,
            width,
            jnp.dtype("float32"),
            make_norm=make_qk_norm,
            norm_epsilon=EPSILON,
            rngs=rngs,
        )

    graphdef, abstract, constants = nnx.split(make(), nnx.Param, ...)
    rng = np.random.default_rng(kv_heads)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, jnp.float32), abstract)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(state))
    shapes = {name: w[name].shape for name in ("query", "key", "value", "out")}
    assert shapes == {
        "query": (width, HEADS, HEAD),
        "key": (width, kv_heads, HEAD),
        "value": (width, kv_heads, HEAD),
        "out": (HEADS, HEAD, width),
    }
    assert ("query_norm" in w) == ("key_norm" in w) == (config.qk_norm != "none")
    x_BLD = rng.normal(size=(B, L, width)).astype(np.float32)
    segments_BL = np.array([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]])
    positions_BL = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]])

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + EPSILON) * scale

    def vector(name, b, i, head):
        heads = w[name].shape[1]
        v_HA = np.stack([x_BLD[b, i] @ w[name][:, h] for h in range(heads)])
        if config.qkv_bias:
            v_HA = v_HA + w[f"{name}_bias"]
        if config.qk_norm == "whole" and name != "value":
            v_HA = norm(v_HA.reshape(-1), w[f"{name}_norm"]["scale"]).reshape(v_HA.shape)
        if config.clip_qkv:
            v_HA = np.clip(v_HA, -config.clip_qkv, config.clip_qkv)
        v_A = v_HA[head]
        if config.qk_norm == "head" and name != "value":
            v_A = norm(v_A, w[f"{name}_norm"]["scale"])
        if name == "value":
            return v_A
        turned_A = rotate_with_complex_numbers(v_A, positions_BL[b, i], frequencies(config))
        return turned_A * (0.1 * np.log(8) + 1 if config.rope_scaling == "yarn" else 1)

    expected = np.zeros((B, L, width))
    for b, i, h in np.ndindex(B, L, HEADS):
        shared = h // (HEADS // kv_heads)
        first = i - config.window + 1 if config.window else 0
        seen = [j for j in range(i + 1) if segments_BL[b, j] == segments_BL[b, i] and j >= first]
        factor = config.score_factor / np.sqrt(HEAD)
        query_A = vector("query", b, i, h)
        scores = [query_A @ vector("key", b, j, shared) * factor for j in seen]
        if config.sinks:
            scores.append(w["sinks"][h])
        mixed_A = sum(
            p * vector("value", b, j, shared)
            for p, j in zip(oracle.softmax(scores), seen, strict=False)
        )
        expected[b, i] += mixed_A @ w["out"][h]
    if config.out_bias:
        expected += w["out_bias"]

    @jax.jit
    def run(x_BLD, positions_BL, segments_BL):
        return nnx.merge(graphdef, state, constants)(x_BLD, positions_BL, segments_BL)[0]

    y_BLD = run(x_BLD, positions_BL, segments_BL)
    # Padded queries (segment 0) attend among themselves; nothing reads them, but they are finite.
    oracle.assert_close(y_BLD, expected)


def test_a_query_of_a_packed_row_sees_its_own_document_up_to_itself():
    segments_BL = jnp.array([[1, 1, 2, 2, 0]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    mask = AttentionMask.within_rows(segments_BL)
    assert mask.materialize(1, 5, 5)[0].astype(int).tolist() == expected


def test_a_query_sees_the_slots_of_a_cache_up_to_its_own_position():
    mask = AttentionMask.of_cache(jnp.array([[0, 1], [3, 4]]))
    assert mask.materialize(2, 2, 5).astype(int).tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    ]


def test_a_query_sees_the_keys_of_its_window_and_without_causality_later_ones():
    of_rows = AttentionMask.within_rows(jnp.array([[1, 1, 1, 1, 2]]))
    window = dataclasses.replace(of_rows, window=2)
    assert window.materialize(1, 5, 5)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    # Of an encoder's documents: 3 queries of a decoder, 4 keys.
    queries, keys = jnp.array([[1, 1, 2]]), jnp.array([[1, 2, 2, 0]])
    across = AttentionMask(None, queries, keys, is_causal=False)
    expected = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]
    assert across.materialize(1, 3, 4)[0].astype(int).tolist() == expected


def test_a_window_needs_causality():
    with pytest.raises(ValueError, match="window=4 with is_causal=False"):
        AttentionMask(is_causal=False, window=4)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        AttentionMask(window=0)


@pytest.mark.parametrize(
    "change", [{"window": 3}, {"is_causal": False}, {"query_positions_BL": None}], ids=str
)
@pytest.mark.parametrize("is_long", [False, True])
def test_attention_is_that_of_the_keys_that_its_mask_lets_a_query_see(monkeypatch, change, is_long):
    if is_long:
        monkeypatch.setattr(attention, "LONGEST_AT_ONCE", 4)
        monkeypatch.setattr(attention, "BLOCK", 3)
    (q, k, v, _), segments_BL = rows_of(11)
    mask = dataclasses.replace(AttentionMask.within_rows(segments_BL), **change)
    y_BLHA = jax.jit(attention.attend)(q, k, v, mask)
    seen_BLS = mask.materialize(3, 11, 11)
    expected = np.zeros(y_BLHA.shape)
    for b, i, h in np.ndindex(3, 11, HEADS):
        seen = np.flatnonzero(seen_BLS[b, i])
        scores = np.float64(k[b, seen, h // 2]) @ np.float64(q[b, i, h]) / np.sqrt(HEAD)
        expected[b, i, h] = oracle.softmax(scores) @ np.float64(v[b, seen, h // 2])
    oracle.assert_close(y_BLHA, expected, rtol=1e-5)


@pytest.mark.parametrize(("block", "turns"), [(2, 4), (3, 3)])  # 3: the last block is filled up
def test_long_rows_attend_in_blocks_of_queries_as_if_at_once(monkeypatch, block, turns):
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.float32(rng.normal(size=(B, 8, heads, HEAD))) for heads in (HEADS, 2, 2, HEADS)
    )
    mask = AttentionMask.within_rows(jnp.int32([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8]))

    def values_and_gradients():
        run = jax.value_and_grad(
            lambda q, k, v: (attention.attend_plainly(q, k, v, mask) * dy).sum(), (0, 1, 2)
        )
        return jax.jit(run)(q, k, v), str(
            jax.make_jaxpr(lambda *a: attention.attend_plainly(*a))(q, k, v, mask)
        )

    at_once, program = values_and_gradients()
    assert "scan" not in program
    monkeypatch.setattr(attention, "LONGEST_AT_ONCE", 4)
    monkeypatch.setattr(attention, "BLOCK", block)
    in_blocks, program = values_and_gradients()
    assert f"length={turns}" in program
    jax.tree.map(functools.partial(oracle.assert_close, rtol=1e-5), in_blocks, at_once)


def shrink(monkeypatch):
    """Makes rows of 64 long ones."""
    monkeypatch.setattr(causal, "SMALLEST", 4)
    monkeypatch.setattr(causal, "LEAST_SKIPPED", 8)


def rows_of(length, dtype=jnp.float32):
    """Queries, keys, values and gradients, and rows of one document, of several, and with padding
    at the end.
    """
    rng = np.random.default_rng(length)
    arrays = [
        jnp.asarray(rng.normal(size=(3, length, heads, HEAD)), dtype)
        for heads in (HEADS, 2, 2, HEADS)
    ]
    segments_BL = np.ones((3, length), np.int32)
    segments_BL[1] = 1 + np.arange(length) // max(1, length // 5)
    segments_BL[2, length // 3 :] = 2
    segments_BL[2, length - length // 4 :] = 0
    return arrays, jnp.asarray(segments_BL)


def results_and_gradients(attend, arrays, segments_BL):
    """Of one form of attention, compiled."""
    q, k, v, dy = arrays

    def product(q, k, v):
        y_BLHA = attend(q, k, v, segments_BL)
        return (y_BLHA * dy).astype(jnp.float32).sum(), y_BLHA

    (_, y_BLHA), gradients = jax.jit(jax.value_and_grad(product, (0, 1, 2), has_aux=True))(q, k, v)
    return y_BLHA, *gradients


def with_all_scores(q, k, v, segments_BL):
    return attention.attend_plainly(q, k, v, AttentionMask.within_rows(segments_BL))


@pytest.mark.parametrize("length", [1, 5, 8, 9, 31, 32])
def test_blocks_equal_attention_with_all_scores(monkeypatch, length):
    shrink(monkeypatch)
    arrays, segments_BL = rows_of(length)
    found = results_and_gradients(causal.attend_causally, arrays, segments_BL)
    expected = results_and_gradients(with_all_scores, arrays, segments_BL)
    jax.tree.map(functools.partial(oracle.assert_close, rtol=1e-5), found, expected)


def test_long_rows_take_blocks_of_queries_and_keep_no_scores(monkeypatch):
    shrink(monkeypatch)
    arrays, segments_BL = rows_of(61)
    expected = results_and_gradients(with_all_scores, arrays, segments_BL)
    monkeypatch.setattr(causal, "LONGEST_AT_ONCE", 16)
    monkeypatch.setattr(causal, "BLOCK", 8)
    found = results_and_gradients(causal.attend_causally, arrays, segments_BL)
    jax.tree.map(functools.partial(oracle.assert_close, rtol=1e-5), found, expected)
    program = str(jax.make_jaxpr(causal.attend_causally)(*arrays[:3], segments_BL))
    assert (
        "length=2" in program and "remat" in program
    )  # 16 queries of the largest blocks, 8 at a time


@pytest.mark.parametrize("length", [29, 64])
def test_documents_in_any_order_attend_as_with_all_scores(monkeypatch, length):
    shrink(monkeypatch)
    arrays, _ = rows_of(length)
    segments_BL = jnp.asarray(np.random.default_rng(length).integers(0, 4, (3, length)), jnp.int32)
    found = results_and_gradients(causal.attend_causally, arrays, segments_BL)
    expected = results_and_gradients(with_all_scores, arrays, segments_BL)
    jax.tree.map(functools.partial(oracle.assert_close, rtol=1e-5), found, expected)


def short_documents(*lengths):
    """Segments of one row, with padding at the end."""
    numbers = np.repeat(1 + np.arange(len(lengths)), lengths)
    return np.pad(numbers, (0, 64 - len(numbers))).astype(np.int32)


SHORT = [short_documents(*[5] * 12), short_documents(*[3, 4] * 9), short_documents(*[1] * 60)]
MIXED = [SHORT[0], short_documents(9, 8, 7, 6, 5), short_documents(20, 40)]


def test_skipping_what_does_not_meet_changes_no_bit(monkeypatch):
    """A row gets the same where another row of its batch has far documents, so that nothing is
    skipped.
    """
    shrink(monkeypatch)
    arrays = [array[jnp.array([0, 1, 2, 0])] for array in rows_of(64)[0]]
    run = jax.jit(lambda rows: results_and_gradients(causal.attend_causally, arrays, rows))
    skipped, computed = (run(jnp.stack([*SHORT, row])) for row in (SHORT[0], short_documents(60)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:3], y[:3]), skipped, computed)


def first_values_not_finite(rows):
    """What attention makes of rows whose first two values are not finite; a weight of 0 leaves them
    so.
    """
    (q, k, v, _), _ = rows_of(64)
    return np.asarray(
        jax.jit(causal.attend_causally)(q, k, v.at[:, :2].set(jnp.nan), jnp.stack(rows))
    )


def test_what_does_not_meet_is_not_computed(monkeypatch):
    shrink(monkeypatch)
    touching = 16  # positions of the first block and of the next one
    assert np.isnan(first_values_not_finite(SHORT)[:, :touching]).all(-1).any()
    assert np.isfinite(first_values_not_finite(SHORT)[:, touching:]).all()
    assert np.isnan(
        first_values_not_finite(MIXED)[0, touching:]
    ).any()  # another row of the batch has long documents


def test_arms_that_train_together_skip_what_none_of_them_needs(monkeypatch):
    shrink(monkeypatch)
    arrays, _ = rows_of(64)
    rows_ABL = jnp.stack([jnp.stack(SHORT), jnp.stack(SHORT[::-1]), jnp.stack(MIXED)])
    arms = [jnp.stack([scale * array for scale in (1.0, 0.5, -1.0)]) for array in arrays]
    each = jax.vmap(lambda *a: results_and_gradients(causal.attend_causally, a[:4], a[4]))

    found = each(*arms, rows_ABL)
    for arm in range(3):
        alone = results_and_gradients(causal.attend_causally, [a[arm] for a in arms], rows_ABL[arm])
        jax.tree.map(lambda x, y, arm=arm: oracle.assert_close(x[arm], y, rtol=1e-5), found, alone)

    q, k, v, dy = arms
    together = each(q[:2], k[:2], v[:2].at[:, :, :2].set(jnp.nan), dy[:2], rows_ABL[:2])[0]
    assert np.isfinite(together[:, :, 16:]).all()


def test_in_bfloat16_attention_is_the_exact_one_to_a_rounding():
    arrays, segments_BL = rows_of(150, jnp.bfloat16)
    found = results_and_gradients(causal.attend_causally, arrays, segments_BL)
    wide = [array.astype(jnp.float32) for array in arrays]
    exact = results_and_gradients(with_all_scores, wide, segments_BL)
    assert all(array.dtype == jnp.bfloat16 for array in found)
    for low, high in zip(found, exact, strict=True):
        # Weights, results and gradients are rounded to 8 bits; a sum of such errors stays below
        # 2 of them.
        np.testing.assert_allclose(
            np.asarray(low, np.float32), high, atol=2 * 2**-8 * np.abs(high).max()
        )


def test_on_cpu_attention_computes_little_more_than_the_scores_it_needs():
    arrays, segments_BL = rows_of(1024)

    def products(attend):
        lowered = jax.jit(attend).lower(*arrays[:3], segments_BL)
        return lowered.compile().cost_analysis()["flops"]

    def in_rows(q, k, v, segments_BL):
        return attention.attend(q, k, v, AttentionMask.within_rows(segments_BL))

    assert products(in_rows) < 0.6 * products(with_all_scores)


def test_scores_beyond_the_range_of_exponentials_leave_attention_exact():
    arrays, segments_BL = rows_of(150)
    q, k, v, dy = arrays
    scaled = 300 * q, k, v, dy
    found = results_and_gradients(causal.attend_causally, scaled, segments_BL)
    expected = results_and_gradients(with_all_scores, scaled, segments_BL)
    jax.tree.map(
        functools.partial(oracle.assert_close, rtol=1e-4), found, expected
    )  # scores of 1000: 1e-4 each


def test_the_program_grows_with_the_logarithm_of_the_length(monkeypatch):
    shrink(monkeypatch)

    def size(length):
        arrays, segments_BL = rows_of(length)
        return len(
            list(
                oracle.equations(
                    jax.make_jaxpr(causal.attend_causally)(*arrays[:3], segments_BL).jaxpr
                )
            )
        )

    assert size(1024) - size(512) == size(512) - size(256) > 0
