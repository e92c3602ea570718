"""Layers compiled for other devices, and what the installed compilers make of them."""

import dataclasses
import itertools

import jax
import pytest
from jax.sharding import AxisType

from moejax.benchmarks import compiled
from moejax.benchmarks.compiled import bench_compiled
from moejax.benchmarks.layer import Shape
from moejax.kernels.grouped_matmul import unavailable
from moejax.planning import targets
from moejax.planning.targets import TARGETS, Target, TargetError, has_compiler, make_target_mesh

SMALL = Shape(tokens=64, d_model=8, d_expert=16, num_experts=4, top_k=2)
FEW = Shape(4096, 512, 1024, 64, 2)
MANY = Shape(4096, 512, 256, 64, 8)
HERE = Target("here", "cpu", "dev", "")


@pytest.fixture
def _here(monkeypatch):
    """A target that every machine can compile for: this one."""
    mesh = jax.make_mesh((1,), ("device",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    monkeypatch.setattr(compiled, "make_target_mesh", lambda target: mesh)


@pytest.mark.usefixtures("_here")
def test_arithmetic_is_counted_and_dense_lowerings_are_seen():
    names = ["dense", "ragged", "padded", "capacity 1.25", "sorted"]
    rows = bench_compiled(SMALL, names, "float32", HERE)
    order = itertools.product(["forward", "forward_backward"], ["dense_layer", *names])
    assert [(row["direction"], row["implementation"]) for row in rows] == list(order)
    slots = -(-1.25 * 64 * 2 // 4 // 8) * 8  # of `padded`, whose iterations are counted once
    over_ideal = {
        "dense_layer": 1.0,
        "ragged": pytest.approx(4.0, rel=0.02),  # and what finds the groups
        "padded": pytest.approx(slots / 32, rel=0.02),
        "sorted": pytest.approx(1.0, rel=0.02),
        "capacity 1.25": pytest.approx(40 / 32, rel=0.02),
    }
    for row in rows:
        name, direction = row["implementation"], row["direction"]
        if name == "dense":
            assert row["flops_over_ideal"] >= 4.0  # and the products that pick the right ones
        else:
            assert row["flops_over_ideal"] == over_ideal[name]
        assert row["target"] == "here" and row["fits"]
        assert row["flops"] > 0 and row["temporary_bytes"] >= 0
        flops = row["flops_over_ideal"] * SMALL.flops(direction)
        assert row["flops"] == pytest.approx(flops, rel=1e-3)
    forward = rows[: len(rows) // 2]
    open_loops = {row["implementation"]: row["open_loops"] for row in forward}
    assert open_loops["padded"] >= 2 and open_loops["dense_layer"] == 0


@pytest.mark.usefixtures("_here")
def test_without_names_it_compiles_auto_of_the_target_and_ragged_dot():
    rows = bench_compiled(SMALL, [], "float32", HERE)
    assert [row["implementation"] for row in rows[:3]] == ["dense_layer", "tiled", "ragged"]


@pytest.mark.usefixtures("_here")
def test_an_implementation_that_the_target_does_not_have_is_an_error():
    with pytest.raises(TargetError, match=r"tokamax cannot run on here: .*NVIDIA"):
        bench_compiled(SMALL, ["tokamax"], "float32", HERE)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("message", "fits"), [("RESOURCE_EXHAUSTED: out of HBM", False), ("INTERNAL: a bug", None)]
)
def test_only_a_program_that_does_not_fit_is_a_row_without_figures(message, fits, monkeypatch):
    bench_compiled(SMALL, ["padded"], "float32", HERE)  # compiles what draws the arrays

    def fail(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    if fits is None:
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            bench_compiled(SMALL, ["padded"], "float32", HERE)
        return
    no_figures = {"fits": False, "flops": None, "flops_over_ideal": None, "kernels": None}
    for row in bench_compiled(SMALL, ["padded"], "float32", HERE):
        assert row == row | no_figures


@pytest.mark.usefixtures("_here")
def test_a_program_larger_than_the_memory_has_figures_and_does_not_fit():
    def first_row(memory_bytes):
        target = dataclasses.replace(HERE, memory_bytes=memory_bytes)
        return bench_compiled(SMALL, ["padded"], "float32", target)[0]

    in_large, in_small = first_row(10**9), first_row(10**4)
    assert (in_large["fits"], in_small["fits"]) == (True, False)
    assert in_large["flops"] == in_small["flops"] > 0


@pytest.mark.parametrize("name", TARGETS)
def test_the_error_about_a_missing_compiler_names_the_extra(name, monkeypatch):
    from jax.experimental import topologies

    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for it\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    extra = {"gpu": "cuda13", "tpu": "tpu"}[TARGETS[name].platform]
    monkeypatch.setattr(targets, "has_compiler", lambda target: False)
    message = rf"target {name} needs .* not installed; .*EXTRAS=dev,{extra} or"
    with pytest.raises(TargetError, match=message):
        make_target_mesh(TARGETS[name])
    monkeypatch.setattr(targets, "has_compiler", lambda target: True)
    with pytest.raises(NotImplementedError, match="not implemented for it"):
        make_target_mesh(TARGETS[name])


@pytest.mark.parametrize(
    ("name", "shape"),
    [("v5p", FEW), *(pytest.param(name, MANY, marks=pytest.mark.slow) for name in ("v5p", "v6e"))],
    ids=str,
)
def test_on_tpu_ragged_computes_what_the_chosen_experts_need(name, shape):
    if not has_compiler(TARGETS[name]):
        pytest.skip("the compiler for TPU is not installed: pip install -e '.[tpu]'")
    for row in bench_compiled(shape, ["ragged"], "bfloat16", TARGETS[name]):
        assert 0.99 < row["flops_over_ideal"] <= 1.05, row
        if row["implementation"] == "ragged":
            assert row["kernels"]["ragged-dot-none"] >= 2


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("h100", "bfloat16", FEW),
        *(pytest.param(name, "float32", MANY, marks=pytest.mark.slow) for name in ("h100", "b200")),
    ],
    ids=str,
)
def test_on_gpu_tokamax_computes_what_the_chosen_experts_need(name, dtype, shape):
    if not has_compiler(TARGETS[name]):
        pytest.skip("the compiler for NVIDIA GPUs is not installed: pip install -e '.[cuda13]'")
    with jax.set_mesh(make_target_mesh(TARGETS[name])):
        if why := unavailable().get("tokamax"):
            pytest.skip(why)
    for row in bench_compiled(shape, ["tokamax", "ragged"], dtype, TARGETS[name]):
        if row["implementation"] == "ragged":  # whose lowering there is dense
            assert row["flops_over_ideal"] == pytest.approx(shape.num_experts, rel=0.01), row
        else:
            assert 0.99 < row["flops_over_ideal"] <= 1.05, row
        if row["implementation"] == "tokamax":
            num_calls = 2 if row["direction"] == "forward" else 6
            assert row["kernels"] == {"tokamax triton": num_calls}
            num_rows = shape.tokens * shape.top_k
            largest_bytes = 3 * 2 * num_rows * (512 + 2 * shape.d_expert) * 4
            assert row["temporary_bytes"] <= largest_bytes
