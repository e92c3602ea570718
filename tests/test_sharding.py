"""The mesh and the sharding rules: what fits, what is refused, and that no rule is dead."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from cases.config import nested
from moejax.config import ConfigError, MeshConfig, resolve
from moejax.models import Decoder
from moejax.sharding import (
    BATCH_AXES,
    MESH_AXES,
    RULES,
    _groups,
    make_mesh,
    partition_spec,
    resolve_mesh,
)

# Mesh
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "resolved"),
    [
        ({}, (8, 1, 1, 1, 1, 1, 1, 1)),
        ({"expert": 4}, (2, 1, 4, 1, 1, 1, 1, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 1, 1, 2, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "expert": 2}, (2, 2, 2, 1, 1, 1, 1, 1)),
        ({"expert": 2, "dcn_expert": 2}, (2, 1, 2, 1, 1, 1, 1, 2)),
        ({"data": 1, "fsdp": 2, "dcn_data": 2, "dcn_fsdp": -1}, (1, 2, 1, 1, 1, 2, 2, 1)),
    ],
)
def test_the_open_size_of_a_mesh_takes_all_remaining_devices(sizes, resolved):
    assert dataclasses.astuple(resolve_mesh(MeshConfig(**sizes), 8)) == resolved


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"expert": 3}, ["mesh.expert=3", "8 devices", "1, 2, 4, 8"]),
        ({"data": 2, "expert": 2}, ["mesh.data=2", "mesh.expert=2", "8 devices", "1, 2, 4, 8"]),
        ({"data": 16}, ["mesh.data=16", "1, 2, 4, 8"]),
        ({"data": -1, "fsdp": -1}, ["mesh.data=-1", "mesh.fsdp=-1", "only one"]),
        ({"tensor": 0}, ["mesh.tensor=0", "at least 1", "-1"]),
        ({"tensor": -2}, ["mesh.tensor=-2", "at least 1", "-1"]),
        ({"dcn_expert": 3}, ["mesh.dcn_expert=3", "8 devices", "1, 2, 4, 8"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error_that_names_sizes_that_would(sizes, parts):
    with pytest.raises(ConfigError) as caught:
        resolve_mesh(MeshConfig(**sizes), 8)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"mesh.expert": 8, "moe.num_experts": 12},
            ["moe.num_experts=12", "mesh.expert=8", "8 or 16"],
        ),
        ({"mesh.expert": 8, "moe.num_experts": 4}, ["moe.num_experts=4", "mesh.expert=8", "use 8"]),
        (
            {
                "mesh.fsdp": 8,
                "model.d_model": 36,
                "attention.num_heads": 1,
                "attention.num_kv_heads": 1,
            },
            ["model.d_model=36", "mesh.fsdp=8", "32 or 40"],
        ),
        ({"mesh.tensor": 4}, ["attention.num_kv_heads=2", "mesh.tensor=4", "use 4"]),
        (
            {"mesh.tensor": 8, "attention.num_kv_heads": 4},
            ["attention.num_heads=4", "mesh.tensor=8", "use 8"],
        ),
        ({"mesh.tensor": 2, "moe.d_expert": 25}, ["moe.d_expert=25", "mesh.tensor=2", "24 or 26"]),
        (
            {"mesh.tensor": 2, "moe.num_experts": 0, "model.d_ff": 25},
            ["model.d_ff=25", "mesh.tensor=2", "24 or 26"],
        ),
        (
            {"mesh.tensor": 2, "data.vocab_size": 999},
            ["data.vocab_size=999", "mesh.tensor=2", "998 or 1000"],
        ),
        (
            {"mesh.expert": 4, "mesh.dcn_expert": 2, "moe.num_experts": 4},
            ["moe.num_experts=4", "mesh.dcn_expert * mesh.expert = 8", "use 8"],
        ),
        (
            {"mesh.context": 2, "data.seq_len": 255},
            ["data.seq_len=255", "mesh.context=2", "254 or 256"],
        ),
        (
            {"mesh.context": 2, "moe.router": "soft", "moe.allow_noncausal": True},
            ["mesh.context=2", "mesh.context=1"],
        ),
        (
            {"mesh.dcn_data": 2, "train.batch_size": 12},
            [
                "train.batch_size=12",
                "mesh.dcn_data * mesh.data * mesh.fsdp * mesh.expert = 8",
                "16",
            ],
        ),
        (
            {"mesh.expert": 2, "moe.exchange_chunks": 3, "data.seq_len": 8},
            ["moe.exchange_chunks=3", "16 tokens of a device", "1, 2, 4, 8, 16"],
        ),
        (
            {"mesh.expert": 2, "moe.per_layer": "0: exchange_chunks=3", "data.seq_len": 8},
            ["moe.exchange_chunks=3", "16 tokens of a device", "1, 2, 4, 8, 16"],
        ),
        (
            {"train.batch_size": 12},
            ["train.batch_size=12", "mesh.data * mesh.fsdp * mesh.expert = 8", "16"],
        ),
        (
            {"train.batch_size": 16, "train.accumulation": 4},
            ["train.accumulation=4", "microbatches of 4", "32"],
        ),
    ],
)
def test_a_size_that_the_mesh_cannot_split_is_refused_with_sizes_that_work(changes, parts):
    with pytest.raises(ConfigError) as caught:
        make_mesh(resolve(nested(changes)))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_the_mesh_has_all_axes_and_auto_types_and_one_device_is_a_mesh_too():
    mesh = make_mesh(resolve(nested({"mesh.expert": 4, "mesh.tensor": 2})))
    assert dict(mesh.shape) == {
        "data": 1,
        "fsdp": 1,
        "dcn_expert": 1,
        "expert": 4,
        "context": 1,
        "tensor": 2,
    }
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert dict(make_mesh(resolve({}), jax.devices()[:1]).shape) == dict.fromkeys(MESH_AXES, 1)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int = 0
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def test_fast_axes_stay_within_a_group_and_slow_ones_cross_groups():
    mesh = make_mesh(
        resolve(nested({"mesh.data": 1, "mesh.fsdp": 2, "mesh.dcn_fsdp": 2, "mesh.expert": 2}))
    )
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert dict(mesh.shape) == {
        "data": 1,
        "fsdp": 4,
        "dcn_expert": 1,
        "expert": 2,
        "context": 1,
        "tensor": 1,
    }
    # The first two parts of `fsdp` are in one group.
    assert ids.reshape(4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    mesh = make_mesh(resolve(nested({"mesh.data": 2, "mesh.dcn_data": 2, "mesh.dcn_expert": 2})))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids.reshape(4, 2).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_slices_stay_intact_and_require_slow_axes():
    devices = [FakeDevice(i, slice_index=i % 2, platform="tpu") for i in range(8)]
    assert [[device.id for device in group] for group in _groups(devices, 2)] == [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]
    assert [len(group) for group in _groups(devices, 4)] == [2, 2, 2, 2]
    assert {device.slice_index for device in _groups(devices, 4)[1]} == {0}
    for num_groups in (1, 3):
        with pytest.raises(
            ConfigError, match=f"= {num_groups} does not fit 2 slices.*use mesh.dcn_data=2"
        ):
            _groups(devices, num_groups)
    hosts = [FakeDevice(i, slice_index=i % 2, platform="gpu") for i in range(8)]
    assert _groups(hosts, 1) == [hosts]
    assert [[device.slice_index for device in group] for group in _groups(hosts, 2)] == [
        [0] * 4,
        [1] * 4,
    ]


# Sharding rules
# -------------------------------------------------------------------------------------------------


def parameter_axes(changes):
    """The logical axes of every parameter of a config, with its shape."""
    model = nnx.eval_shape(lambda: Decoder(resolve(nested(changes)), rngs=nnx.Rngs(params=0)))
    params = jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return [(param.axes, param.shape) for param in params]


@pytest.fixture(scope="module")
def all_axes():
    every_part = {
        "attention.qk_norm": "head",
        "attention.qkv_bias": True,
        "attention.out_bias": True,
        "model.tied_embeddings": False,
        "moe.first_dense": 1,
        "moe.every": 2,
        "moe.num_shared_experts": 1,
        "moe.d_latent": 16,
    }
    return [
        *parameter_axes(every_part),
        *parameter_axes({}),
        *parameter_axes({"moe.num_experts": 0}),
        *parameter_axes({"attention.kind": "routed"}),
    ]


def test_every_axis_of_every_parameter_has_a_name_and_a_rule(all_axes):
    for axes, shape in all_axes:
        assert len(axes) == len(shape)
        assert set(axes) <= set(RULES)
        partition_spec(axes)


def test_every_sharding_rule_is_used_by_a_parameter(all_axes):
    axes_of_slots = {"slots"}  # of experts that `place_experts` placed
    assert {axis for axes, _ in all_axes for axis in axes} | axes_of_slots == set(RULES)


def mesh_axes_of(axis):
    rule = RULES[axis] or ()
    return (rule,) if isinstance(rule, str) else rule


def test_no_parameter_would_be_split_twice_over_one_mesh_axis(all_axes):
    for axes, _ in all_axes:
        used = [mesh_axis for axis in axes for mesh_axis in mesh_axes_of(axis)]
        assert len(used) == len(set(used)), axes


def test_a_logical_axis_without_a_rule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'embd' has no rule .*'embed'"):
        partition_spec(("embd", "mlp"))
    assert partition_spec(("experts", "embed", "gate_up", "mlp")) == PartitionSpec(
        ("dcn_expert", "expert"), "fsdp", None, "tensor"
    )


def test_rules_name_mesh_axes_and_all_but_two_split_the_batch():
    assert {mesh_axis for axis in RULES for mesh_axis in mesh_axes_of(axis)} <= set(MESH_AXES)
    assert set(BATCH_AXES) == set(MESH_AXES) - {"context", "tensor"}


def test_heads_of_keys_split_nothing_where_every_head_has_keys_of_a_latent_vector():
    leaves = {"mesh.data": 1, "mesh.tensor": 4}
    with pytest.raises(ConfigError, match=r"attention\.num_kv_heads=2"):
        make_mesh(resolve(nested(leaves)), jax.devices()[:4])
    mesh = make_mesh(resolve(nested(leaves | {"attention.kind": "latent"})), jax.devices()[:4])
    assert mesh.shape["tensor"] == 4
