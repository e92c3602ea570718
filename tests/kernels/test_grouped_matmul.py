"""Grouped products: every implementation against a loop over rows, values and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import oracle
from moejax.kernels.grouped_matmul import (
    IMPLEMENTATIONS,
    grouped_matmul,
    resolve_implementation,
    unavailable,
)
from moejax.kernels.grouped_matmul.padded import _num_turns, slots
from moejax.kernels.grouped_matmul.tiled import block_rows

# The others are interpreted: tests/kernels/test_other_devices.py.
every_implementation = pytest.mark.parametrize(
    "implementation", [n for n in IMPLEMENTATIONS if n not in unavailable()]
)


@functools.cache
def value_and_gradients(implementation):
    @jax.jit
    def run(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes_E, implementation=implementation), x_RD, w_EDF
        )
        return y_RF, *pull(dy_RF)

    return run


def draw(rows, sizes, d=5, f=7, seed=0):
    """Rows, matrices and cotangent; everything that belongs to no group is NaN."""
    rng = np.random.default_rng(seed)
    x_RD = rng.normal(size=(rows, d)).astype(np.float32)
    w_EDF = rng.normal(size=(len(sizes), d, f)).astype(np.float32)
    dy_RF = rng.normal(size=(rows, f)).astype(np.float32)
    x_RD[sum(sizes) :], dy_RF[sum(sizes) :] = np.nan, np.nan
    return x_RD, w_EDF, np.array(sizes, np.int32), dy_RF


def check(implementation, rows, sizes, **kwargs):
    arguments = draw(rows, sizes, **kwargs)
    y_RF, dx_RD, dw_EDF = value_and_gradients(implementation)(*arguments)
    oracle.assert_close((y_RF, dx_RD, dw_EDF), oracle.grouped_matmul(*arguments))
    tail = sum(sizes)
    assert not np.any(y_RF[tail:]) and not np.any(dx_RD[tail:])  # zeros, not NaN
    for e, size in enumerate(sizes):
        assert size or not np.any(dw_EDF[e]), f"the empty group {e} has a gradient"


@every_implementation
@pytest.mark.parametrize(
    "sizes",
    [
        (40, 30, 20, 6, 4),  # full
        (31, 0, 32, 33, 0),  # around the smallest tile, with empty groups between
        (0, 0, 100, 0, 0),
        (0, 0, 0, 0, 100),
        (100, 0, 0, 0, 0),
        (1, 63, 1, 31, 1),
        (33, 33, 0, 0, 0),  # a tail of 34 rows
        (0, 0, 0, 0, 0),
    ],
)
def test_every_implementation_equals_the_loop_over_rows_for_ragged_groups_with_a_poisoned_tail(
    implementation, sizes
):
    check(implementation, 100, sizes)


@every_implementation
@pytest.mark.parametrize("sizes", [(256, 257), (257, 0), (0, 255), (1024, 1026), (2050, 0)])
def test_every_implementation_is_right_at_the_borders_of_the_largest_tile(implementation, sizes):
    assert block_rows(2050, 2) == 256
    check(implementation, 2050, sizes, d=3, f=2)


@every_implementation
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64])
def test_a_single_group_is_a_plain_matrix_product(implementation, size):
    check(implementation, 64, (size,))


@every_implementation
@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.integers(0, 5), min_size=5, max_size=5),
    tail=st.integers(0, 80),
    seed=st.integers(0, 9),
)
def test_any_group_sizes_give_the_products_and_gradients_of_the_loop(
    implementation, weights, tail, seed
):
    rows = 100
    share = (rows - tail) / max(1, sum(weights))
    check(implementation, rows, tuple(int(share * weight) for weight in weights), seed=seed)


@every_implementation
def test_bfloat16_inputs_are_accumulated_in_float32(implementation):
    # Ones: in bfloat16 a running sum of ones stops at 256.
    rows, width = 608, 512
    x_RD, w_EDF, dy_RF = (
        jnp.ones(s, jnp.bfloat16) for s in ((rows, width), (2, width, width), (rows, width))
    )
    y_RF, dx_RD, dw_EDF = value_and_gradients(implementation)(
        x_RD, w_EDF, jnp.array([600, 8]), dy_RF
    )
    assert y_RF.dtype == dx_RD.dtype == dw_EDF.dtype == jnp.bfloat16
    assert np.all(y_RF == 512) and np.all(dx_RD == 512)
    assert np.all(dw_EDF[0] == 600) and np.all(dw_EDF[1] == 8)


@every_implementation
def test_bfloat16_results_are_the_exact_ones_rounded_once(implementation):
    x_RD, w_EDF, sizes_E, dy_RF = draw(100, (31, 0, 32, 33, 0))
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x_RD, w_EDF, dy_RF)]
    actual = value_and_gradients(implementation)(low[0], low[1], sizes_E, low[2])
    exact = oracle.grouped_matmul(low[0], low[1], sizes_E, low[2])
    # bfloat16 has 8 significant bits: rounding once is wrong by at most 2^-8 of each value.
    for a, e in zip(actual, exact, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=2**-8, atol=1e-5)


@every_implementation
def test_every_product_of_bfloat16_rows_comes_out_in_float32_before_it_is_rounded(implementation):
    # XLA:CPU accumulates bfloat16 products in float32 whatever it is told; other platforms do as
    # they are told.
    shapes = [
        ((64, 4), "bfloat16"),
        ((3, 4, 4), "bfloat16"),
        ((3,), "int32"),
        ((64, 4), "bfloat16"),
    ]
    jaxpr = jax.make_jaxpr(value_and_gradients(implementation))(
        *(jax.ShapeDtypeStruct(*s) for s in shapes)
    )
    products = [
        e.outvars[0].aval.dtype for e in oracle.equations(jaxpr) if "dot" in e.primitive.name
    ]
    assert len(products) >= 3 and set(products) == {jnp.dtype("float32")}


def test_auto_stands_for_an_implementation_of_this_platform():
    assert resolve_implementation("auto") == "tiled"  # the tests run on CPU
    arguments = draw(64, (20, 44))
    y_RF = grouped_matmul(*map(jnp.asarray, arguments[:3]))
    oracle.assert_close(y_RF, oracle.grouped_matmul(*arguments)[0])


@pytest.mark.parametrize(
    "sizes", [(25, 25, 25, 25), (0, 0, 0, 100), (40, 39, 1, 0), (8, 60, 16, 16)]
)
def test_padded_takes_as_many_turns_as_the_largest_group_needs(sizes):
    assert slots(100, 4) == 32
    turns = _num_turns(jnp.array(sizes), 100)
    assert turns == -(-max(sizes) // 32)
    check("padded", 100, sizes)


def test_an_unknown_implementation_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'tilde'.*auto.*tiled.*ragged.*dense"):
        resolve_implementation("tilde")
    x_RD, w_EDF, sizes_E, _ = map(jnp.asarray, draw(8, (8,)))
    with pytest.raises(ValueError, match="'tilde'"):
        grouped_matmul(x_RD, w_EDF, sizes_E, implementation="tilde")


@every_implementation
def test_the_gradient_of_replicated_weights_in_shard_map_sums_over_devices_whose_rows_differ(
    implementation,
):
    sizes = [(31, 0, 9), (0, 33, 0), (0, 0, 0), (5, 6, 29)]
    shards = [draw(40, s, seed=i) for i, s in enumerate(sizes)]
    x_RD, sizes_E, dy_RF = (np.concatenate([shard[i] for shard in shards]) for i in (0, 2, 3))
    w_EDF = shards[0][1]
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("devices"), PartitionSpec()

    @jax.jit
    def run(x_RD, w_EDF, sizes_E, dy_RF):
        product = jax.shard_map(
            functools.partial(grouped_matmul, implementation=implementation),
            mesh=mesh, in_specs=(split, whole, split), out_specs=split, check_vma=True,
        )  # fmt: skip
        y_RF, pull = jax.vjp(lambda x, w: product(x, w, sizes_E), x_RD, w_EDF)
        return y_RF, *pull(dy_RF)

    y_RF, dx_RD, dw_EDF = run(x_RD, w_EDF, sizes_E, dy_RF)
    expected = [oracle.grouped_matmul(shard[0], w_EDF, shard[2], shard[3]) for shard in shards]
    oracle.assert_close(y_RF, np.concatenate([e[0] for e in expected]))
    oracle.assert_close(dx_RD, np.concatenate([e[1] for e in expected]))
    oracle.assert_close(dw_EDF, sum(e[2] for e in expected))


@every_implementation
def test_the_traced_program_has_the_same_size_for_8_and_64_experts(implementation):
    def size(num_experts):
        shapes = [(512, 4), (num_experts, 4, 4), (num_experts,), (512, 4)]
        abstract = [
            jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 1 else jnp.float32) for s in shapes
        ]
        return len(
            oracle.primitives(jax.make_jaxpr(value_and_gradients(implementation))(*abstract))
        )

    assert size(8) == size(64) > 10


def test_on_cpu_the_arithmetic_of_auto_does_not_grow_with_the_number_of_experts():
    def flops(implementation, num_experts):
        shapes = [(1024, 16), (num_experts, 16, 16), (num_experts,), (1024, 16)]
        abstract = [
            jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 1 else jnp.float32) for s in shapes
        ]
        return (
            value_and_gradients(implementation).lower(*abstract).compile().cost_analysis()["flops"]
        )

    plain = (
        3 * 2 * 1024 * 16 * 16
    )  # forward and two gradients of one dense product with as many rows
    assert flops("ragged", 32) > 16 * plain  # what is to be avoided, and that it would be seen
    assert flops("auto", 32) < 1.5 * plain
    assert flops("padded", 32) < 1.5 * plain  # a turn; XLA counts the bodies of loops once


@every_implementation
def test_second_derivatives_are_those_of_the_reference(implementation):
    x_RD, w_EDF, sizes_E, _ = draw(40, (9, 0, 20))
    rng = np.random.default_rng(1)
    directions = (
        rng.normal(size=x_RD.shape).astype(np.float32),
        rng.normal(size=w_EDF.shape).astype(np.float32),
    )

    def second(implementation):
        """The gradient of the slope along the directions."""

        def value(x_RD, w_EDF):
            return jnp.sum(
                jnp.sin(grouped_matmul(x_RD, w_EDF, sizes_E, implementation=implementation))
            )

        def slope(x_RD, w_EDF):
            gradients = jax.grad(value, (0, 1))(x_RD, w_EDF)
            return sum(jnp.sum(g * d) for g, d in zip(gradients, directions, strict=True))

        return jax.jit(jax.grad(slope, (0, 1)))(x_RD, w_EDF)

    dx_RD, dw_EDF = second(implementation)
    oracle.assert_close((dx_RD, dw_EDF), second("dense"))
    assert np.any(dx_RD) and np.any(dw_EDF) and not np.any(dx_RD[29:]) and not np.any(dw_EDF[1])
