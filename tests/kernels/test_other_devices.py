"""Grouped products by kernels of other devices, interpreted here: tokamax's for GPU and megablox's
for TPU.

Against the loop over rows, values and gradients. What their compilers make of them:
tests/benchmarks/test_compiled.py.
"""

import contextlib
import functools
import importlib.util
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import oracle
from cases.moe import info_of
from moejax.config import MoeConfig
from moejax.kernels import grouped_matmul as package
from moejax.kernels.device import platform
from moejax.kernels.grouped_matmul import (
    can_check_vma,
    grouped_matmul,
    ragged,
    resolve_implementation,
    tokamax,
    unavailable,
)
from moejax.kernels.grouped_matmul.megablox import outer_products_megablox
from moejax.moe.layer import MoE
from moejax.sharding import MESH_AXES

ROWS = 100
SIZES = [
    (40, 30, 20, 6, 4),  # full
    (31, 0, 32, 3, 0),  # a tail, and groups without rows
    (0, 0, 100, 0, 0),
    (0, 0, 0, 0, 0),
]

needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None or jax.__version_info__ >= (0, 12),
    reason="tokamax is not installed, or does not run with this jax",
)


@contextlib.contextmanager
def interpreted_tokamax():
    """tokamax's Triton kernels in Pallas's interpreter, chosen as on a GPU.

    A kernel asks where it is in the grid from within branches, which the interpreter does not know:
    it is told before.
    """
    from jax.experimental import pallas
    from tokamax._src.pallas import block

    pallas_call = pallas.pallas_call

    def interpret(kernel, *args, grid_spec, **kwargs):
        def located(*refs):
            place = tuple(pallas.program_id(axis) for axis in range(len(grid_spec.grid)))
            with mock.patch.object(block, "_pids", lambda: place):
                return kernel(*refs)

        return pallas_call(located, *args, grid_spec=grid_spec, **kwargs | {"interpret": True})

    with (
        mock.patch.object(pallas, "pallas_call", interpret),
        mock.patch.object(tokamax, "platform", lambda: "gpu"),
        mock.patch.object(package, "platform", lambda: "gpu"),
    ):
        yield


@contextlib.contextmanager
def interpreted_mosaic():
    """tokamax's Mosaic kernels, which look for a TPU and its sizes, in Pallas's interpreter."""
    from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu import PallasMosaicTpuRaggedDot

    kernel = PallasMosaicTpuRaggedDot(interpret=True)
    with (
        mock.patch.object(PallasMosaicTpuRaggedDot, "supported_on", lambda self, device: True),
        mock.patch("jax._src.pallas.mosaic.tpu_info.get_device_kind", lambda: "TPU v5"),
        mock.patch("jax._src.pallas.mosaic.tpu_info.get_num_device_cores", lambda: 1),
        mock.patch.object(tokamax, "KERNELS", {"cpu": (kernel,)}),
    ):
        yield


@contextlib.contextmanager
def interpreted_megablox():
    """`ragged` as on a TPU whose compiler has no kernel for the gradient of the matrices."""
    interpret = functools.partial(outer_products_megablox, interpret=True)
    with (
        mock.patch.object(ragged, "needs_megablox", lambda: True),
        mock.patch.object(ragged, "outer_products_megablox", interpret),
        mock.patch.object(package, "needs_megablox", lambda: True),
    ):
        yield


KERNELS = {"tokamax": interpreted_tokamax, "ragged": interpreted_megablox}

each_kernel = pytest.mark.parametrize(
    "name", [pytest.param("tokamax", marks=needs_tokamax), "ragged"]
)


def draw(sizes, rows=ROWS, d=24, f=40, seed=0):
    """Rows, matrices, sizes and cotangent; what belongs to no group is NaN."""
    rng = np.random.default_rng(seed)
    x_RD, w_EDF, dy_RF = (
        rng.normal(size=s).astype(np.float32) for s in ((rows, d), (len(sizes), d, f), (rows, f))
    )
    x_RD[sum(sizes) :], dy_RF[sum(sizes) :] = np.nan, np.nan
    return x_RD, w_EDF, np.array(sizes, np.int32), dy_RF


@functools.cache
def compiled(name, dtype="float32"):
    """Value and gradients of one kernel, compiled once for all sizes of groups."""

    def run(x_RD, w_EDF, sizes_E, dy_RF):
        y_RF, pull = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes_E, implementation=name), x_RD, w_EDF
        )
        return y_RF, *pull(dy_RF)

    shapes = [(a.shape, a.dtype if a.dtype == np.int32 else dtype) for a in draw(SIZES[0])]
    with KERNELS[name]():
        return jax.jit(run).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()


@each_kernel
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_those_of_the_loop_with_poisoned_tails_and_empty_groups(
    name, sizes
):
    arguments = draw(sizes)
    y_RF, dx_RD, dw_EDF = compiled(name)(*arguments)
    oracle.assert_close((y_RF, dx_RD, dw_EDF), oracle.grouped_matmul(*arguments))
    assert not np.any(y_RF[sum(sizes) :]) and not np.any(dx_RD[sum(sizes) :])  # zeros, not NaN
    for e, size in enumerate(sizes):
        assert size or not np.any(dw_EDF[e]), f"the empty group {e} has a gradient"


@each_kernel
def test_bfloat16_products_are_accumulated_in_float32_and_rounded_once(name):
    x_RD, w_EDF, sizes_E, dy_RF = draw(SIZES[1])
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x_RD, w_EDF, dy_RF)]
    actual = compiled(name, "bfloat16")(low[0], low[1], sizes_E, low[2])
    for a, e in zip(actual, oracle.grouped_matmul(low[0], low[1], sizes_E, low[2]), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), e, rtol=2**-8, atol=1e-5)


@needs_tokamax
@pytest.mark.parametrize("sizes", [(140, 60, 20, 30, 6), *SIZES[1:], (5, 200, 0)])
def test_the_mosaic_kernels_give_values_and_gradients_of_the_loop(sizes):
    x_RD, w_EDF, sizes_E, dy_RF = map(jnp.asarray, draw(sizes, rows=256, d=128, f=256))
    with interpreted_mosaic():
        y_RF, pull = jax.vjp(
            lambda x, w: tokamax.grouped_matmul_tokamax(x, w, sizes_E), x_RD, w_EDF
        )
        actual = y_RF, *pull(dy_RF)
    oracle.assert_close(actual, oracle.grouped_matmul(x_RD, w_EDF, sizes_E, dy_RF))
    for e, size in enumerate(sizes):
        assert size or not np.any(actual[2][e])


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1100, (600, 0, 500)), (1500, (700, 0)), (1400, (700, 600)), (1, (1, 0)), (700, (5, 690))],
)
def test_megablox_adds_up_groups_across_its_tiles_of_128_and_512_rows(rows, sizes):
    x_RD, w_EDF, sizes_E, dy_RF = draw(sizes, rows=rows, d=520 if rows == 1400 else 24)
    dw_EDF = outer_products_megablox(
        jnp.asarray(x_RD), jnp.asarray(dy_RF), jnp.asarray(sizes_E), interpret=True
    )
    oracle.assert_close(dw_EDF, oracle.grouped_matmul(x_RD, w_EDF, sizes_E, dy_RF)[2])


@each_kernel
def test_the_gradient_of_replicated_weights_sums_over_devices_whose_rows_differ(name):
    sizes = [(31, 0, 9), (0, 33, 0), (0, 0, 0), (5, 6, 29)]
    shards = [draw(s, rows=40, seed=i) for i, s in enumerate(sizes)]
    x_RD, sizes_E, dy_RF = (np.concatenate([shard[i] for shard in shards]) for i in (0, 2, 3))
    w_EDF = shards[0][1]
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = PartitionSpec("devices"), PartitionSpec()

    @jax.jit
    def run(x_RD, w_EDF, sizes_E, dy_RF):
        product = jax.shard_map(
            functools.partial(grouped_matmul, implementation=name),
            mesh=mesh,
            in_specs=(split, whole, split),
            out_specs=split,
            check_vma=can_check_vma(name),
        )
        y_RF, pull = jax.vjp(lambda x, w: product(x, w, sizes_E), x_RD, w_EDF)
        return y_RF, *pull(dy_RF)

    with KERNELS[name]():
        assert not can_check_vma(name)
        y_RF, dx_RD, dw_EDF = run(x_RD, w_EDF, sizes_E, dy_RF)
    expected = [oracle.grouped_matmul(shard[0], w_EDF, shard[2], shard[3]) for shard in shards]
    oracle.assert_close(y_RF, np.concatenate([e[0] for e in expected]))
    oracle.assert_close(dx_RD, np.concatenate([e[1] for e in expected]))
    oracle.assert_close(dw_EDF, sum(e[2] for e in expected))


VARIANT = {"expert_bias": True, "weight_on": "input", "top_k": 1, "renormalize": False}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param("tokamax", VARIANT, marks=needs_tokamax),
        ("ragged", {}),
        pytest.param("tokamax", {}, marks=[needs_tokamax, pytest.mark.slow]),
        pytest.param("ragged", VARIANT, marks=pytest.mark.slow),
    ],
)
def test_a_layer_on_a_mesh_equals_one_device_without_checks_of_varying_axes(name, variant):
    x_BLD = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 16)), jnp.float32)
    is_token_BL = np.arange(8) < np.array([[8], [5], [8], [3]])

    def run(implementation):
        leaves = {
            "num_experts": 4,
            "top_k": 2,
            "d_expert": 8,
            "score": "softmax",
            "grouped_matmul": implementation,
        }
        config = MoeConfig(**leaves | variant)
        layer = MoE(config, 16, jnp.dtype("float32"), vocab_size=7, rngs=nnx.Rngs(params=0))
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        @jax.jit
        def value_and_gradients(params, x_BLD):
            def loss(params, x_BLD):
                y_BLD, _ = nnx.merge(graphdef, params, rest)(x_BLD, info_of(config, is_token_BL))
                return jnp.sum(y_BLD**2), y_BLD

            return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BLD)

        return jax.device_get(jax.tree.leaves(value_and_gradients(params, x_BLD)))

    one = run("dense")
    mesh = jax.make_mesh((2, 1, 1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 6)
    with KERNELS[name](), jax.set_mesh(mesh):
        many = run(name)
    oracle.assert_close(tuple(many), tuple(one), rtol=5e-5)


# Where they are not
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "version", "installed", "why"),
    [
        ("cpu", (0, 10, 2), True, "for NVIDIA GPUs and TPUs"),
        ("tpu", (0, 12, 0), False, "pip install -e '.[tokamax]'"),
        ("tpu", (0, 12, 0), True, None),
        ("gpu", (0, 12, 0), True, "jax before 0.12 on GPU, and this is "),
        ("gpu", (0, 10, 2), False, "with Python 3.11, in a checkout"),
        ("gpu", (0, 10, 2), True, None),
    ],
)
@pytest.mark.parametrize("wanted", ["tokamax", "auto"])
def test_what_runs_where_tokamax_does_not_is_logged_once_with_the_reason(
    device, version, installed, why, wanted, monkeypatch, caplog
):
    monkeypatch.setattr(tokamax, "platform", lambda: device)
    monkeypatch.setattr(package, "platform", lambda: device)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    package._choose.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    if device == "tpu":
        expected = "ragged" if why or wanted == "auto" else "tokamax"
    else:
        expected = {"cpu": "tiled", "gpu": "padded" if why else "tokamax"}[device]
    with caplog.at_level("INFO", "moejax"):
        assert resolve_implementation(wanted) == resolve_implementation(wanted) == expected
    messages = [record.getMessage() for record in caplog.records]
    package._choose.cache_clear()
    assert unavailable() == ({} if why is None else {"tokamax": mock.ANY})
    if wanted == "tokamax" and why is None:
        assert messages == []
    else:
        (message,) = messages
        assert message.startswith(f"grouped_matmul: {expected} ") and f" on {device} (" in message
        assert why is None or (device != "gpu" and wanted == "auto") or why in message


@pytest.mark.parametrize(
    ("kind", "capability", "works"),
    [
        ("NVIDIA H100", "9.0", True),
        ("NVIDIA A100", "8.0", True),
        ("Tesla V100", "7.0", False),
        ("MI300", "gfx9", False),
    ],
)
def test_an_old_or_other_gpu_is_named_as_the_reason(kind, capability, works, monkeypatch):
    device = mock.Mock(
        spec=jax.Device, platform="gpu", device_kind=kind, compute_capability=capability
    )
    monkeypatch.setattr(tokamax, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "devices", lambda: [device])
    why = tokamax.why_unavailable()
    assert why is None if works else kind in why


def test_a_tpu_of_another_machine_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(tokamax, "platform", lambda: "tpu")
    assert "look for one in this machine" in tokamax.why_unavailable()


def test_the_platform_is_that_of_the_mesh_in_context(monkeypatch):
    assert platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform() == "gpu"  # of jax, without a mesh
    for device in ("cpu", jax.devices()[0]):
        with jax.default_device(device):
            assert platform() == "cpu"
    with jax.set_mesh(
        jax.make_mesh((1,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    ):
        assert platform() == "cpu"
