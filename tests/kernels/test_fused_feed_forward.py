"""The experts' networks in one pass, against a loop over choices: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import oracle
from moejax.kernels import fused_passes as module
from moejax.kernels.fused_feed_forward import Rows, SecondDerivativeError, feed_forward
from moejax.kernels.rows import add_rows
from moejax.kernels.tiles import tile_sizes
from moejax.moe.dispatch.plan import plan_dropless
from moejax.moe.experts.experts import Network
from oracle import experts as oracle_experts

ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu", "squared_relu", "clamped_swiglu")
NAMES = ("y_TD", "dx_TD", "dweights_TK", "dgate_up_EDPF", "ddown_EFD")


def run_layer(x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, activation="swiglu"):
    num_experts = down_EFD.shape[0]
    sizes = tile_sizes(experts_TK.size, num_experts)
    plan = plan_dropless(experts_TK, num_experts, padding_rows=sizes[-1])
    return feed_forward(
        x_TD,
        weights_TK,
        gate_up_EDPF,
        down_EFD,
        Rows(plan.row_TK, plan.choice_R, plan.group_sizes_E),
        activate=Network(activation, limit=0.5).activate,
        sizes=sizes,
    )


def with_gradients(layer):
    def run(x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, dy_TD):
        y_TD, pull = jax.vjp(
            lambda *a: layer(*a, experts_TK), x_TD, weights_TK, gate_up_EDPF, down_EFD
        )
        return y_TD, *pull(dy_TD)

    return run


value_and_gradients = jax.jit(with_gradients(run_layer))


def draw(experts_TK, num_experts, d=5, f=3, seed=0):
    """Inputs for these choices (E: none); tokens without any, and their cotangents, are NaN."""
    rng = np.random.default_rng(seed)
    experts_TK = np.asarray(experts_TK, np.int32)
    tokens, top_k = experts_TK.shape
    shapes = (tokens, d), (tokens, top_k), (num_experts, d, 2, f), (num_experts, f, d), (tokens, d)
    x_TD, weights_TK, gate_up_EDPF, down_EFD, dy_TD = (
        rng.normal(size=s).astype(np.float32) for s in shapes
    )
    is_masked_T = (experts_TK == num_experts).all(axis=1)
    x_TD[is_masked_T], dy_TD[is_masked_T] = np.nan, np.nan
    return x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, dy_TD


def check(experts_TK, num_experts, **kwargs):
    arguments = draw(experts_TK, num_experts, **kwargs)
    actual = jax.device_get(value_and_gradients(*arguments))
    for name, a, e in zip(NAMES, actual, oracle.feed_forward(*arguments), strict=True):
        oracle.assert_close(a, e, err_msg=name)
    for e in range(num_experts):
        if not np.any(arguments[4] == e):
            assert not np.any(actual[3][e]) and not np.any(actual[4][e]), (
                f"the empty expert {e} has a gradient"
            )
    masked_T = (arguments[4] == num_experts).all(axis=1)
    assert not np.any(actual[0][masked_T]) and not np.any(actual[1][masked_T])  # zeros, not NaN


def choices_of(sizes, num_tokens, top_k):
    """Choices in which expert e has `sizes[e]` tokens, and the others are masked, in an order
    without pattern.
    """
    flat = np.full(num_tokens * top_k, len(sizes))
    flat[: sum(sizes)] = np.random.default_rng(0).permutation(
        np.repeat(np.arange(len(sizes)), sizes)
    )
    experts_TK = flat.reshape(num_tokens, top_k)
    # The masked lie everywhere, and last: a row past all groups may read the last token.
    experts_TK[:-1] = np.random.default_rng(1).permutation(experts_TK[:-1])
    return experts_TK


@pytest.mark.parametrize(
    "sizes",
    [
        (25, 20, 40, 6, 9),  # full
        (31, 0, 32, 33, 0),  # around the size of a tile, with empty experts between
        (0, 0, 100, 0, 0),
        (100, 0, 0, 0, 0),
        (0, 0, 0, 0, 100),
        (1, 15, 1, 16, 17),
        (33, 33, 0, 0, 0),
        (0, 0, 0, 0, 0),  # every token is masked
    ],
)
def test_output_and_gradients_equal_the_loop_for_ragged_experts_and_poisoned_masked_tokens(sizes):
    check(choices_of(sizes, 50, 2), 5)


@pytest.mark.parametrize(
    "sizes", [(128, 129), (511, 512), (513, 1024), (1025, 3071), (0, 4096), (4096, 0)]
)
def test_large_groups_are_right_at_the_borders_of_tiles(sizes):
    assert tile_sizes(4096, 2)[-1] == 512
    check(choices_of(sizes, 4096, 1), 2, d=3, f=2)


def test_groups_of_every_size_of_tile_are_right_at_once():
    num_experts, tokens, top_k = 32, 1100, 4
    sizes = tile_sizes(tokens * top_k, num_experts)
    assert len(sizes) == 9
    check(
        choices_of(
            [*sizes, *(s + 1 for s in sizes), *(s - 1 for s in sizes), 1, 0, 1, 0, 5], tokens, top_k
        ),
        32,
        d=3,
    )


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"), [(1, 1, 1), (1, 2, 64), (16, 2, 64), (3, 12, 12)]
)
def test_a_few_tokens_are_right_as_in_decoding(tokens, top_k, num_experts):
    rng = np.random.default_rng(0)
    check(np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)]), num_experts)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_all_experts_computed_for_all_tokens(activation):
    arguments = draw(choices_of((31, 0, 32, 20, 3), 50, 2), 5)
    num_projections = Network(activation).num_projections
    x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, dy_TD = arguments
    x_TD, dy_TD = (
        np.nan_to_num(x_TD),
        np.nan_to_num(dy_TD),
    )  # the plain formula multiplies them by zeros
    chosen_TKE = jax.nn.one_hot(experts_TK, 5)

    def plain(x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK):
        projected = [
            jnp.einsum("TD,EDF->ETF", x_TD, gate_up_EDPF[:, :, i]) for i in range(num_projections)
        ]
        hidden_ETF = oracle_experts.activation(activation, projected[0], projected[-1], 0.5)
        return jnp.einsum("TK,TKE,ETF,EFD->TD", weights_TK, chosen_TKE, hidden_ETF, down_EFD)

    arrays = x_TD, weights_TK, gate_up_EDPF[:, :, :num_projections], down_EFD, experts_TK, dy_TD
    actual = jax.jit(with_gradients(functools.partial(run_layer, activation=activation)))(*arrays)
    for name, a, e in zip(NAMES, actual, jax.jit(with_gradients(plain))(*arrays), strict=True):
        if name == "dweights_TK":  # plain: of choices that do not exist, too
            a, e = np.where(experts_TK < 5, a, 0), np.where(experts_TK < 5, e, 0)
        oracle.assert_close(a, e, err_msg=name)


def test_memory_that_nothing_wrote_reaches_no_result(monkeypatch):
    arguments = draw(choices_of((31, 0, 32, 3, 0), 50, 2), 5)
    expected = value_and_gradients(*arguments)
    taken = []

    def poisoned(like, shape, dtype):
        taken.append(shape)
        return jnp.full(shape, jnp.nan, dtype)

    monkeypatch.setattr(module, "empty_varying_like", poisoned)
    actual = jax.jit(with_gradients(lambda *a: run_layer(*a)))(*arguments)
    assert len(taken) >= 6
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def test_too_few_padding_rows_are_an_error_that_says_how_many_to_plan_with():
    arrays = map(jnp.asarray, draw(choices_of((31, 0, 32, 3, 0), 50, 2), 5))
    x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, _ = arrays
    plan = plan_dropless(experts_TK, 5, padding_rows=63)
    rows = Rows(plan.row_TK, plan.choice_R, plan.group_sizes_E)
    with pytest.raises(ValueError, match=r"163 rows and must have 164; plan with padding_rows=64"):
        feed_forward(
            x_TD,
            weights_TK,
            gate_up_EDPF,
            down_EFD,
            rows,
            activate=Network().activate,
            sizes=(16, 64),
        )


def test_bfloat16_is_accumulated_in_float32_and_rounded_once():
    arguments = draw(choices_of((300, 0, 90, 10), 200, 2), 4, d=16, f=8)
    low = [
        jnp.asarray(a, jnp.bfloat16) if np.issubdtype(a.dtype, np.floating) else a
        for a in arguments
    ]
    low[1] = arguments[1]  # combine weights are float32 whatever the compute dtype
    actual = value_and_gradients(*low)
    exact = oracle.feed_forward(
        *[np.asarray(a, np.float64) if i != 4 else a for i, a in enumerate(low)]
    )
    assert [a.dtype for a in actual] == ["bfloat16", "bfloat16", "float32", "bfloat16", "bfloat16"]
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        # Projections, rows and results are rounded, each by at most 2^-9 of its value; sums of
        # hundreds are not.
        scale = np.abs(e).max()
        np.testing.assert_allclose(
            np.asarray(a, np.float64), e, rtol=2**-6, atol=2**-8 * scale, err_msg=name
        )


def test_every_product_of_bfloat16_comes_out_in_float32():
    shapes = [
        ((64, 4), "bfloat16"),
        ((64, 2), "float32"),
        ((3, 4, 2, 4), "bfloat16"),
        ((3, 4, 4), "bfloat16"),
    ]
    shapes += [((64, 2), "int32"), ((64, 4), "bfloat16")]
    jaxpr = jax.make_jaxpr(value_and_gradients)(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    products = [
        e.outvars[0].aval.dtype for e in oracle.equations(jaxpr) if "dot" in e.primitive.name
    ]
    assert len(products) >= 6 and set(products) == {jnp.dtype("float32")}


@pytest.mark.parametrize("top_k", [1, 2, 12])
def test_rows_are_added_to_their_token_and_none_stands_for_zeros(top_k):
    rng = np.random.default_rng(0)
    x_RD = rng.normal(size=(30, 3)).astype(np.float32)
    row_TK = rng.integers(0, 33, (7, top_k)).astype(np.int32)
    row_TK[0] = 30
    rows_RD = np.concatenate([x_RD, np.zeros((3, 3), np.float32)])
    oracle.assert_close(
        jax.jit(add_rows)(x_RD, row_TK), rows_RD[row_TK].astype(np.float64).sum(axis=1)
    )


def test_gradients_of_replicated_weights_in_shard_map_sum_over_devices_whose_tokens_differ():
    sizes = [(31, 0, 9), (0, 33, 0), (0, 0, 0), (5, 6, 29)]
    shards = [draw(choices_of(s, 20, 2), 3, seed=i) for i, s in enumerate(sizes)]
    x_TD, weights_TK, experts_TK, dy_TD = (
        np.concatenate([shard[i] for shard in shards]) for i in (0, 1, 4, 5)
    )
    gate_up_EDPF, down_EFD = shards[0][2:4]
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("devices"), PartitionSpec()
    layer = jax.shard_map(
        run_layer,
        mesh=mesh,
        in_specs=(split, split, whole, whole, split),
        out_specs=split,
        check_vma=True,
    )
    actual = jax.jit(with_gradients(layer))(
        x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, dy_TD
    )
    expected = [
        oracle.feed_forward(shard[0], shard[1], gate_up_EDPF, down_EFD, shard[4], shard[5])
        for shard in shards
    ]
    for i, (name, a) in enumerate(zip(NAMES, actual, strict=True)):
        parts = [e[i] for e in expected]
        oracle.assert_close(a, np.concatenate(parts) if i < 3 else sum(parts), err_msg=name)


def test_the_traced_program_has_the_same_size_for_8_and_64_experts():
    def size(num_experts):
        return len(
            oracle.primitives(
                jax.make_jaxpr(value_and_gradients)(*abstract(8192, 4, 4, num_experts, 2))
            )
        )

    assert size(8) < size(64)  # four sizes of tiles, and nine
    assert size(64) == size(128) > 100


def abstract(tokens, d, f, num_experts, top_k, dtype="float32"):
    shapes = (tokens, d), (tokens, top_k), (num_experts, d, 2, f), (num_experts, f, d)
    floats = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    return [*floats, jax.ShapeDtypeStruct((tokens, top_k), jnp.int32), floats[0]]


@functools.cache
def compiled(tokens, d, f, num_experts, top_k):
    return value_and_gradients.lower(*abstract(tokens, d, f, num_experts, top_k)).compile()


@pytest.mark.parametrize("num_experts", [4, 32])
def test_temporary_memory_is_that_of_a_few_copies_of_the_rows(num_experts):
    tokens, d, f, top_k = 1024, 64, 128, 2
    temporary = compiled(tokens, d, f, num_experts, top_k).memory_analysis().temp_size_in_bytes
    assert temporary <= 3 * tokens * top_k * (d + 2 * f) * 4


def test_bfloat16_matrices_are_converted_one_expert_at_a_time():
    # With 2 tokens for 64 experts memory is that of matrices, if it is of anything.
    arguments = abstract(2, 64, 128, 64, 2, "bfloat16")[:-1]
    temporary = jax.jit(run_layer).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    one_expert = 3 * 64 * 128 * 4
    assert temporary < 4 * one_expert


def test_second_derivatives_are_refused_with_the_remedy_in_words():
    x_TD, weights_TK, gate_up_EDPF, down_EFD, *_ = draw([[0, 1], [1, 0]], 2)
    experts_TK = jnp.asarray([[0, 1], [1, 0]], jnp.int32)

    def slope(x_TD):
        return jnp.sum(
            jax.grad(
                lambda x: jnp.sum(run_layer(x, weights_TK, gate_up_EDPF, down_EFD, experts_TK))
            )(x_TD)
        )

    with pytest.raises(
        SecondDerivativeError, match=r"first derivatives only.*use moe.grouped_matmul=padded"
    ):
        jax.grad(slope)(x_TD)
