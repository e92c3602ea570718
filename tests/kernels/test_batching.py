"""Experts of several arms of a sweep at once: what each has alone, in one product of all their
groups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from moejax.kernels import fused_passes as module
from moejax.kernels.fused_feed_forward import Rows, feed_forward
from moejax.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, ragged, unavailable
from moejax.kernels.tiles import tile_sizes
from moejax.moe.dispatch.plan import plan_dropless
from moejax.moe.experts.experts import Network

SIZES_AE = (
    (31, 0, 32, 0),
    (0, 0, 0, 70),
    (0, 0, 0, 0),
    (40, 20, 5, 5),
)  # rows of the groups of each arm, of 70
every_implementation = pytest.mark.parametrize(
    "implementation", [n for n in IMPLEMENTATIONS if n not in unavailable()]
)


def draw_rows():
    """Rows, matrices, group sizes and cotangents by arm; what belongs to no group is NaN."""
    rng = np.random.default_rng(0)
    shapes = (4, 70, 5), (4, 4, 5, 7), (4, 70, 7)
    x_ARD, w_AEDF, dy_ARF = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    for arm, sizes in enumerate(SIZES_AE):
        x_ARD[arm, sum(sizes) :], dy_ARF[arm, sum(sizes) :] = np.nan, np.nan
    return x_ARD, w_AEDF, np.array(SIZES_AE, np.int32), dy_ARF


def with_gradients(implementation, x_RD, w_EDF, sizes_E, dy_RF, padding_rows=0):
    def product(x_RD, w_EDF):
        return grouped_matmul(
            x_RD, w_EDF, sizes_E, implementation=implementation, padding_rows=padding_rows
        )

    y_RF, pull = jax.vjp(product, x_RD, w_EDF)
    return y_RF, *pull(dy_RF)


@every_implementation
def test_products_and_gradients_of_arms_equal_the_loop_over_the_rows_of_each(implementation):
    arrays = draw_rows()
    found = jax.jit(jax.vmap(functools.partial(with_gradients, implementation)))(*arrays)
    for arm in range(len(SIZES_AE)):
        expected = oracle.grouped_matmul(*(array[arm] for array in arrays))
        oracle.assert_close(tuple(array[arm] for array in found), tuple(expected))
        assert not np.any(found[0][arm, sum(SIZES_AE[arm]) :])  # zeros, not NaN


@every_implementation
def test_rows_that_are_spare_in_each_arm_are_spare_in_the_middle_of_all(implementation):
    x_ARD, w_AEDF, sizes_AE, dy_ARF = draw_rows()
    spare = 16
    x_ARD, dy_ARF = (
        np.pad(a, ((0, 0), (0, spare), (0, 0)), constant_values=np.nan) for a in (x_ARD, dy_ARF)
    )
    run = functools.partial(with_gradients, implementation, padding_rows=spare)
    found = jax.jit(jax.vmap(run))(x_ARD, w_AEDF, sizes_AE, dy_ARF)
    for arm in range(len(SIZES_AE)):
        expected = oracle.grouped_matmul(x_ARD[arm], w_AEDF[arm], sizes_AE[arm], dy_ARF[arm])
        oracle.assert_close(tuple(array[arm] for array in found), tuple(expected))


@every_implementation
def test_an_arm_that_is_not_finite_leaves_the_others_as_they_are(implementation):
    arrays = draw_rows()
    arrays[1][0] = np.inf
    found = jax.jit(jax.vmap(functools.partial(with_gradients, implementation)))(*arrays)
    num_rows = sum(SIZES_AE[0])
    assert not np.isfinite(found[0][0, :num_rows]).all() and not np.any(found[0][0, num_rows:])
    for arm in (1, 2, 3):
        expected = oracle.grouped_matmul(*(array[arm] for array in arrays))
        oracle.assert_close(tuple(array[arm] for array in found), tuple(expected))


@every_implementation
def test_arms_in_bfloat16_are_what_each_is_alone(implementation):
    x_ARD, w_AEDF, sizes_AE, dy_ARF = draw_rows()
    x_ARD, w_AEDF, dy_ARF = (jnp.asarray(array, jnp.bfloat16) for array in (x_ARD, w_AEDF, dy_ARF))
    run = functools.partial(with_gradients, implementation)
    found = jax.jit(jax.vmap(run))(x_ARD, w_AEDF, sizes_AE, dy_ARF)
    for arm in (0, 1):
        alone = jax.jit(run)(x_ARD[arm], w_AEDF[arm], sizes_AE[arm], dy_ARF[arm])
        for array, expected in zip(found, alone, strict=True):
            assert array.dtype == jnp.bfloat16
            oracle.assert_close(
                np.asarray(array[arm], np.float32), np.asarray(expected, np.float32), rtol=1e-2
            )


@every_implementation
def test_arms_may_share_matrices_and_be_nested(implementation):
    x_ARD, w_AEDF, sizes_AE, dy_ARF = draw_rows()
    run = functools.partial(with_gradients, implementation)
    nested = jax.vmap(jax.vmap(run, in_axes=(0, None, 0, 0)), in_axes=(0, None, 0, 0))
    halves = [array.reshape(2, 2, *array.shape[1:]) for array in (x_ARD, sizes_AE, dy_ARF)]
    found = jax.jit(nested)(halves[0], w_AEDF[0], halves[1], halves[2])
    for arm in range(len(SIZES_AE)):
        expected = oracle.grouped_matmul(x_ARD[arm], w_AEDF[0], sizes_AE[arm], dy_ARF[arm])
        oracle.assert_close(tuple(array[arm // 2, arm % 2] for array in found), tuple(expected))


@pytest.mark.parametrize("implementation", ["tiled", "ragged", "padded"])
def test_arms_are_one_product_of_all_their_groups(implementation, monkeypatch):
    monkeypatch.setattr(ragged, "platform", lambda: "tpu")  # elsewhere its product is dense
    program = str(
        jax.make_jaxpr(jax.vmap(functools.partial(with_gradients, implementation)))(*draw_rows())
    )
    assert "f32[16,5,7]" in program  # 4 arms of 4 groups
    alone = str(
        jax.make_jaxpr(functools.partial(with_gradients, implementation))(
            *(a[0] for a in draw_rows())
        )
    )
    assert program.count(" while[") == alone.count(" while[")


def draw_choices(num_arms=3, num_experts=4):
    """Tokens, combine weights, matrices, choices (E: none) and cotangents by arm; some have empty
    experts.
    """
    rng = np.random.default_rng(1)
    shapes = (50, 5), (50, 2), (num_experts, 5, 2, 3), (num_experts, 3, 5), (50, 5)
    floats = [rng.normal(size=(num_arms, *shape)).astype(np.float32) for shape in shapes]
    experts_ATK = rng.integers(0, num_experts + 1, (num_arms, 50, 2)).astype(np.int32)
    experts_ATK[1] = np.minimum(experts_ATK[1], 1)
    experts_ATK[2, 7:] = num_experts
    return *floats[:4], experts_ATK, floats[4]


def run_layer(x_TD, weights_TK, gate_up_EDPF, down_EFD, experts_TK, dy_TD):
    num_experts, sizes = down_EFD.shape[0], tile_sizes(experts_TK.size, down_EFD.shape[0])
    plan = plan_dropless(experts_TK, num_experts, padding_rows=sizes[-1])

    def layer(*arrays):
        rows = Rows(plan.row_TK, plan.choice_R, plan.group_sizes_E)
        return feed_forward(*arrays, rows, activate=Network("swiglu").activate, sizes=sizes)

    y_TD, pull = jax.vjp(layer, x_TD, weights_TK, gate_up_EDPF, down_EFD)
    return y_TD, *pull(dy_TD)


def test_the_experts_of_arms_equal_the_loop_over_the_choices_of_each():
    arrays = draw_choices()
    found = jax.device_get(jax.jit(jax.vmap(run_layer))(*arrays))
    for arm in range(3):
        expected = oracle.feed_forward(*(array[arm] for array in arrays))
        for name, values_A, wanted in zip(
            ("y", "dx", "dweights", "dgate_up", "ddown"), found, expected, strict=True
        ):
            oracle.assert_close(values_A[arm], wanted, err_msg=f"{name} of arm {arm}")


def test_an_arm_whose_combine_weights_are_not_finite_leaves_the_experts_of_others_as_they_are():
    arrays = draw_choices()
    arrays[1][2] = np.nan
    found = jax.device_get(jax.jit(jax.vmap(run_layer))(*arrays))
    for arm in (0, 1):
        expected = oracle.feed_forward(*(array[arm] for array in arrays))
        for values_A, wanted in zip(found, expected, strict=True):
            oracle.assert_close(values_A[arm], wanted)


def test_the_experts_of_arms_run_in_one_pass():
    program = str(jax.make_jaxpr(jax.vmap(run_layer))(*draw_choices()))
    assert "f32[12,5,6]" in program  # 3 arms of 4 experts, two projections of width 3
    alone = str(jax.make_jaxpr(run_layer)(*(array[0] for array in draw_choices())))
    assert program.count(" while[") == alone.count(" while[")


def test_memory_of_arms_that_nothing_wrote_reaches_no_result(monkeypatch):
    monkeypatch.setattr(
        module, "empty_varying_like", lambda like, shape, dtype: jnp.full(shape, jnp.nan, dtype)
    )
    arrays = draw_choices()
    for values_A in jax.jit(jax.vmap(run_layer))(*arrays):
        assert np.isfinite(values_A).all()
