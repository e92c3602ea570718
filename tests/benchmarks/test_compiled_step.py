"""The train step compiled for other devices: what it holds, and what devices send in it."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from moejax.benchmarks import compiled_step
from moejax.benchmarks.compiled_step import bench_compiled_step
from moejax.cli import main
from moejax.cli.verbs import bench
from moejax.config import resolve
from moejax.planning.targets import TARGETS, Target, TargetError, has_compiler, target_devices
from moejax.sharding import make_mesh
from moejax.training.state import make_train_setup

CONFIGS = Path(__file__).parents[2] / "configs"
HERE = Target("here", "cpu", "dev", "8")


def recipe(name, **overrides):
    """A recipe's config; overrides are `section__leaf=value`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for key, value in overrides.items():
        section, leaf = key.split("__")
        config[section][leaf] = value
    return resolve(config)


@pytest.fixture
def _here(monkeypatch):
    """A target that every machine can compile for: 8 devices of this one."""
    monkeypatch.setattr(compiled_step, "target_devices", lambda target, topology: jax.devices())


@pytest.fixture(scope="module")
def debug():
    """Layers, experts and batch so small that the step compiles in seconds."""
    sizes = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__expert": 4, "moe__exchange": "all_to_all"}
    return recipe("debug", **sizes, moe__exchange_buffer=1.5, moe__num_experts=8, model__remat=True)


def local_bytes(config):
    """Returns the bytes of a device's part of the state, before it is made."""
    setup = make_train_setup(config, make_mesh(config))

    def num_bytes(array, sharding):
        shape = sharding.shard_shape(array.shape)
        return array.dtype.itemsize * np.prod(shape, dtype=int)

    sizes = jax.tree.map(num_bytes, setup.abstract, setup.shardings)
    return sum(jax.tree.leaves(sizes))


@pytest.mark.usefixtures("_here")
def test_a_step_has_its_memory_and_its_traffic_by_axis_with_overflow_apart(debug):
    row = bench_compiled_step(debug, HERE, "")
    assert (row["target"], row["topology"], row["devices"]) == ("here", "8", 8)
    assert list(row["mesh"]) == ["data", "fsdp", "dcn_expert", "expert", "context", "tensor"]
    assert list(row["mesh"].values()) == [1, 2, 1, 4, 1, 1]
    assert row["tokens_per_device"] == 8 * 64 / 8 and row["fits"]
    # A device's part of the state; its one row of five arrays of 64 positions, one of them of
    # bytes; four knobs.
    assert row["argument_bytes"] == local_bytes(debug) + (4 * 4 + 1) * 64 + 4 * 4
    assert row["peak_bytes"] >= row["argument_bytes"] and row["temporary_bytes"] > 0
    collectives = row["collectives"]
    assert row["wire_bytes"] == sum(one["bytes"] for one in collectives)
    conditional_bytes = sum(one["conditional_bytes"] for one in collectives)
    assert row["conditional_wire_bytes"] == conditional_bytes
    # Two layers: tokens, weights, ids and outputs forward, and backward the gradients of all
    # but the ids.
    rows = {(one["kind"], one["axis"]): one for one in collectives}
    all_to_all = rows["all-to-all", "expert"]
    assert (all_to_all["count"], all_to_all["conditional_count"]) == (14, 0)
    assert all_to_all["bytes"] > 0
    # Tokens that overflow a buffer go to all devices.
    assert rows["all-reduce", "expert"]["conditional_bytes"] > 0
    assert any("fsdp" in axis and one["bytes"] for (_, axis), one in rows.items())


@pytest.mark.usefixtures("_here")
def test_the_memory_of_the_target_decides_what_fits(debug, monkeypatch, caplog):
    monkeypatch.setattr(compiled_step, "lower_step", lambda setup: Lowered())
    for memory, fits in ((10**9, True), (10**3, False)):
        row = bench_compiled_step(debug, dataclasses.replace(HERE, memory_bytes=memory), "8")
        assert (row["fits"], row["peak_bytes"]) == (fits, 2000)
    Lowered.error = "RESOURCE_EXHAUSTED: Ran out of memory: 157G\nand more"
    row = bench_compiled_step(debug, HERE, "8")
    no_figures = {"fits": False, "peak_bytes": None, "wire_bytes": None, "collectives": None}
    assert row == row | no_figures
    assert "Ran out of memory: 157G" in caplog.text and "and more" not in caplog.text
    Lowered.error = "INTERNAL: a bug"
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        bench_compiled_step(debug, HERE, "8")


@pytest.mark.usefixtures("_here")
def test_a_mesh_that_cannot_be_laid_over_the_devices_is_an_error(debug, monkeypatch):
    def fail(*args, **kwargs):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 2")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", fail)
    message = r"cannot be laid over topology 4x4x4 of here: each of its axes"
    with pytest.raises(TargetError, match=message):
        bench_compiled_step(debug, HERE, "4x4x4")


class Lowered:
    """A program of 2000 bytes without collectives, or one that the compiler refuses."""

    error = ""
    peak_memory_in_bytes, argument_size_in_bytes, temp_size_in_bytes = 2000, 1500, 500

    def compile(self):
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return self

    def memory_analysis(self):
        return self

    def as_text(self):
        return "ENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}"


COLLECTIVE = {
    "kind": "all-gather",
    "axis": "fsdp",
    "devices": 64,
    "count": 96,
    "bytes": 12_300_000_000,
    "is_open": True,
    "conditional_count": 3,
    "conditional_bytes": 4_560_000_000,
    "asynchronous": 64,
    "overlapped": 32,
}
ROW = {
    "target": "v5p",
    "topology": "4x4x4",
    "devices": 64,
    "mesh": {"data": 1, "fsdp": 64},
    "tokens_per_device": 49152,
    "fits": True,
    "peak_bytes": 44_700_000_000,
    "argument_bytes": 8_760_000_000,
    "temporary_bytes": 1,
    "wire_bytes": 12_300_000_000,
    "conditional_wire_bytes": 4_560_000_000,
    "collectives": [COLLECTIVE],
}
FIGURES = ("peak_bytes", "wire_bytes", "argument_bytes", "conditional_wire_bytes", "collectives")
SHOWN = [
    "64 v5p, 4x4x4",
    "fsdp 64",
    "49,152",
    "44.70",
    "8.76",
    "12.30",
    "4.56",
    "all-gather",
    "96 or more",
]


def test_the_command_shows_memory_and_collectives_and_no_times(capsys, monkeypatch):
    asked = []

    def found(*arguments):
        asked.append(arguments)
        return ROW

    def refused(*arguments):
        return ROW | dict.fromkeys(FIGURES) | {"fits": False}

    monkeypatch.setattr(bench, "bench_compiled_step", found)
    recipe_flag = f"--config={CONFIGS / 'debug.py'}"
    arguments = ["bench", "compiled_step", "--target=v5p", "--topology=4x4x4", recipe_flag]
    assert main([*arguments, "--config.mesh.fsdp=16", "--config.mesh.expert=4"]) == 0
    shown = capsys.readouterr().out
    for text in SHOWN:
        assert text in shown
    ((config, target, topology),) = asked
    assert (config.mesh.fsdp, config.mesh.expert, target.name, topology) == (16, 4, "v5p", "4x4x4")
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ROW
    monkeypatch.setattr(bench, "bench_compiled_step", refused)
    assert main(arguments) == 0
    assert "no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["compiled_step"],
            "moejax bench compiled_step needs --target, one of h100, b200, v5p, v6e",
        ),
        (
            ["compiled_step", "--target=v5p", "--topology=4by4"],
            "topology 4by4 must be sizes joined by x, such as 2x2x1",
        ),
        (
            ["compiled", "--target=v5p", "--topology=4x4"],
            "--topology belongs to moejax bench compiled_step",
        ),
        (
            ["compiled_step", "--target=v5p", "--shapes=olmoe"],
            "--shapes belongs to moejax bench layer",
        ),
    ],
)
def test_the_command_refuses_what_cannot_be(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_topology_that_the_compiler_does_not_know_is_an_error(monkeypatch):
    from jax.experimental import topologies

    def unknown(*args, **kwargs):
        raise RuntimeError("no such topology")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    monkeypatch.setattr("moejax.planning.targets.has_compiler", lambda target: True)
    message = "v5p cannot have topology 9x9x9, which should look like 2x2x1: no such"
    with pytest.raises(TargetError, match=message):
        target_devices(TARGETS["v5p"], "9x9x9")


@pytest.mark.parametrize(
    ("name", "topology", "devices"),
    [("v5p", "4x4x4", 64), ("v5p", "8x16x16", 2048), ("v6e", "16x16", 256), ("h100", "2x4x8", 64)],
)
def test_topologies_have_as_many_devices_as_their_sizes_say(name, topology, devices):
    target = TARGETS[name]
    if not has_compiler(target):
        pytest.skip(f"the compiler for {target.platform} is not installed: moejax[{target.extra}]")
    assert len(target_devices(target, topology)) == devices


def test_the_recipe_of_mixtral_has_its_sizes():
    config = recipe("mixtral_8x7b")
    assert config.train.batch_size * config.data.seq_len == 64 * 49152
    assert config.moe.d_expert == 14336 and config.num_moe_layers == 32


@pytest.mark.slow
def test_a_step_compiles_for_a_pod_and_its_collectives_have_axes(debug):
    if not has_compiler(TARGETS["v5p"]):
        pytest.skip("the compiler for TPU is not installed: pip install -e '.[tpu]'")
    config = dataclasses.replace(debug, mesh=dataclasses.replace(debug.mesh, fsdp=2, expert=2))
    row = bench_compiled_step(config, TARGETS["v5p"], "2x2x1")
    assert row["fits"] and row["devices"] == 4 and row["peak_bytes"] > 0
    collectives = row["collectives"]
    assert {"fsdp", "expert"} <= {one["axis"] for one in collectives}
    assert not any(one["is_open"] for one in collectives)  # the iterations of all loops are known
    assert any(one["count"] % 2 == 0 and one["axis"] == "fsdp" for one in collectives)
