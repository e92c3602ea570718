"""Collectives counted from the text of compiled programs, beside what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.planning.hlo.collectives import Collective, bytes_of, collective_rows, list_collectives

P = PartitionSpec
AXES = ("data", "fsdp")


def mesh_of(*shape, axes=AXES):
    return jax.make_mesh(
        shape,
        axes,
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[: np.prod(shape)],
    )


MESH = mesh_of(2, 4)
SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""


def program(*lines, before=""):
    """The text of a program of these instructions, with a parameter `%x` of 8 x 16 numbers, 512 bytes."""
    body = "\n".join(f"  {line}" for line in ("%x = f32[8,16]{1,0} parameter(0)", *lines))
    return f"HloModule jit_f\n{SUM}{before}\nENTRY %main.1 (x: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n"


def only(text, mesh=MESH):
    """The one collective of a program."""
    (found,) = list_collectives(text, mesh)
    return found


IN_ROWS, IN_COLUMNS = "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}"  # of the mesh of 2 x 4


@pytest.mark.parametrize(
    ("line", "kind", "axis", "devices", "bytes_each_way", "wire_bytes"),
    [
        (
            f"%y = f32[32,16]{{1,0}} all-gather(%x), channel_id=1, replica_groups={IN_ROWS}, dimensions={{0}}",
            "all-gather", "fsdp", 4, (512, 2048), 3 / 4 * 2048,
        ),
        (
            f"%y = f32[4,16]{{1,0}} reduce-scatter(%x), replica_groups={IN_COLUMNS}, dimensions={{0}}, to_apply=%sum",
            "reduce-scatter", "data", 2, (512, 256), 1 / 2 * 512,
        ),
        (
            "%y = f32[8,16]{1,0} all-reduce(%x), replica_groups={}, to_apply=%sum",
            "all-reduce", "data+fsdp", 8, (512, 512), 2 * 7 / 8 * 512,
        ),
        (
            f"%y = f32[8,16]{{1,0}} all-to-all(%x), replica_groups={IN_ROWS}, dimensions={{0}}",
            "all-to-all", "fsdp", 4, (512, 512), 3 / 4 * 512,
        ),
        (
            "%y = f32[9,16]{1,0} ragged-all-to-all(%x, %out, %s, %s, %s, %s), replica_groups=" + IN_ROWS,
            "ragged-all-to-all", "fsdp", 4, (512, 576), 3 / 4 * 512,
        ),
        (
            "%y = f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute", "fsdp", 2, (512, 512), 512,
        ),
    ],
    ids=["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute"],
)  # fmt: skip
def test_every_kind_has_its_axis_its_bytes_and_what_a_ring_makes_of_them(
    line, kind, axis, devices, bytes_each_way, wire_bytes
):
    found = only(program("%out = f32[9,16]{1,0} parameter(1)", "%s = s32[4]{0} parameter(2)", line))
    assert (found.kind, found.axis, found.devices, found.count) == (kind, axis, devices, 1)
    assert (found.operand_bytes, found.result_bytes) == bytes_each_way
    assert found.wire_bytes == wire_bytes
    assert (found.conditional_count, found.is_asynchronous, found.overlapped) == (0, False, 0)


@pytest.mark.parametrize(
    ("groups", "axis", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
        ("{{0,1},{2,3},{4,5},{6,7}}", "fsdp", 2),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", "", 1),
        ("[2,4]<=[8]", "fsdp", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[1,8]<=[8]", "data+fsdp", 8),
        ("mesh['data'=2,'fsdp'=4] {'data'}", "data", 2),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", "data+fsdp", 8),
        ("mesh['axis_0'=1,'axis_1'=8] {'axis_1'}", "data+fsdp", 8),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", "data", 2),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", "fsdp", 2),
        ("mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}", "data+fsdp", 4),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp", 4),
        ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", "data", 2),
    ],
)
def test_groups_of_devices_are_read_in_every_form(groups, axis, devices):
    line = f"%y = f32[8,16]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%sum"
    found = only(program(line))
    assert (found.axis, found.devices) == (axis, devices)


def test_groups_in_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match=r"unknown form.*replica_groups=everyone"):
        list_collectives(
            program("%y = f32[8,16]{1,0} all-reduce(%x), replica_groups=everyone"), MESH
        )


def test_several_arrays_in_one_collective_add_up():
    line = "%y = (f32[8,16]{1,0}, bf16[4]{0}) all-reduce(%x, %b), replica_groups={}, to_apply=%sum"
    found = only(program("%b = bf16[4]{0:T(8,128)(2,1)} parameter(1)", line))
    assert (found.operand_bytes, found.result_bytes) == (520, 520)


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30), ("pred[7]{0}", 7), ("f8e4m3fn[9]{0}", 9), ("s4[9]{0}", 5), ("f32[]", 4),
        ("(f32[2]{0}, /*index=1*/u32[], token[])", 12),
    ],
)  # fmt: skip
def test_types_have_their_bytes(result, size):
    assert bytes_of(result) == size


def test_a_start_and_its_end_are_one_asynchronous_collective_with_what_is_computed_meanwhile():
    kernel = '%k = f32[8]{0} custom-call(%x), custom_call_target="sort"'
    nothing = '%n = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"'
    found = only(
        program(
            f"%start = (f32[8,16]{{1,0}}, f32[32,16]{{1,0}}) all-gather-start(%x), replica_groups={IN_ROWS}",
            "%fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum",
            "%bitcast.1 = f32[128]{0} bitcast(%x)", kernel, nothing,
            "%done = f32[32,16]{1,0} all-gather-done(%start)",
            "%fusion.2 = f32[8]{0} fusion(%done), kind=kLoop, calls=%sum",
        )
    )  # fmt: skip
    assert (found.kind, found.count, found.operand_bytes, found.result_bytes) == (
        "all-gather",
        1,
        512,
        2048,
    )
    assert (found.is_asynchronous, found.overlapped) == (True, 2)


@pytest.mark.parametrize("opcode", ["async", "call"])
def test_a_computation_that_is_started_apart_makes_its_collective_asynchronous(opcode):
    wrapped = f"""
%wrapped (p: f32[8,16]) -> f32[4,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %rs = f32[4,16]{{1,0}} reduce-scatter(%p), replica_groups={IN_COLUMNS}, dimensions={{0}}, to_apply=%sum
}}
"""
    lines = [
        f"%begin = ((f32[8,16]{{1,0}}), f32[4,16]{{1,0}}, u32[]) {opcode}-start(%x), calls=%wrapped",
        "%fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum",
        "%going = ((f32[8,16]{1,0}), f32[4,16]{1,0}, u32[]) async-update(%begin)",
        "%fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum",
        f"%end = f32[4,16]{{1,0}} {opcode}-done(%going)",
    ]
    found = only(program(*lines, before=wrapped))
    assert (found.kind, found.count, found.wire_bytes) == ("reduce-scatter", 1, 256)
    assert (found.is_asynchronous, found.overlapped) == (True, 2)


def test_a_collective_in_fusions_from_its_start_to_its_end_is_one_and_asynchronous():
    def part(name, result, root):
        return f"""
%{name} (p.{name}: f32[8,16]) -> {result} {{
  %p.{name} = f32[8,16]{{1,0}} parameter(0)
  %g.{name} = f32[32,16]{{1,0}} all-gather(%p.{name}), replica_groups={IN_ROWS}, dimensions={{0}}
  ROOT %r.{name} = {result} {root}
}}
"""

    pair = "(f32[8,16], f32[32,16], u32[])"
    before = (
        part("started", pair, 'custom-call(%g.started), custom_call_target="AsyncCollectiveStart"')
        + part("async_collective_fusion.7", pair, "tuple(%x, %g.async_collective_fusion.7, %c)")
        + part(
            "ended", "f32[32,16]", 'custom-call(%g.ended), custom_call_target="AsyncCollectiveDone"'
        )
    )
    lines = [
        f"%async-collective-start.1 = {pair} fusion(%x), kind=kCustom, calls=%started",
        "%gte.1 = f32[32,16] get-tuple-element(%async-collective-start.1), index=1",
        f"%fusion.7 = {pair} fusion(%gte.1), kind=kOutput, calls=%async_collective_fusion.7",
        "%gte.2 = f32[32,16] get-tuple-element(%fusion.7), index=1",
        "%async-collective-done.1 = f32[32,16] fusion(%gte.2), kind=kCustom, calls=%ended",
    ]
    found = only(program(*lines, before=before))
    assert (found.kind, found.axis, found.count, found.wire_bytes) == (
        "all-gather",
        "fsdp",
        1,
        3 / 4 * 2048,
    )
    assert (found.is_asynchronous, found.overlapped) == (True, 1)


def test_a_reduce_scatter_that_is_written_as_a_fusion_of_an_all_reduce_is_one():
    fused = f"""
%all-reduce-scatter.2 (p: f32[8,16]) -> f32[3,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  %pad = f32[12,16]{{1,0}} pad(%p, %zero), padding=0_4x0_0
  %ar = f32[12,16]{{1,0}} all-reduce(%pad), replica_groups={IN_ROWS}, to_apply=%sum
  ROOT %slice = f32[3,16]{{1,0}} dynamic-slice(%ar, %i, %j), dynamic_slice_sizes={{3,16}}
}}
"""
    line = "%fusion.1 = f32[3,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2"
    found = only(program(line, before=fused))
    assert (found.kind, found.axis, found.operand_bytes, found.result_bytes) == (
        "reduce-scatter",
        "fsdp",
        768,
        192,
    )


GATHER = f"""
%gather (q: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {{
  %q = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %v = f32[8,16]{{1,0}} get-tuple-element(%q), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %g = f32[32,16]{{1,0}} all-gather(%v), replica_groups={IN_ROWS}, dimensions={{0}}
  ROOT %tuple.1 = (s32[], f32[8,16]{{1,0}}) tuple(%next, %v)
}}
"""
UP_TO = """
%up_to (r: (s32[], f32[8,16])) -> pred[] {{
  %r = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%r), index=0
  %n = s32[]{{:T(128)}} {bound}
  ROOT %less = pred[] compare(%j, %n), direction=LT
}}
"""


@pytest.mark.parametrize(
    ("bound", "attribute", "count", "is_open"),
    [
        ("constant(5)", ', backend_config={"known_trip_count":{"n":"12"}}', 12, False),
        ("constant(5)", "", 3, False),
        ("get-tuple-element(%r), index=0", "", 1, True),
    ],
    ids=["said by the loop", "seen in its condition", "up to data"],
)
def test_loops_multiply_in_the_forms_of_all_compilers(bound, attribute, count, is_open):
    text = program(
        "%two = s32[] constant(2)", "%first = s32[] copy(%two)",
        "%start = (s32[], f32[8,16]{1,0}) tuple(%first, %x)",
        f"%loop = (s32[], f32[8,16]{{1,0}}) while(%start), condition=%up_to, body=%gather{attribute}",
        before=GATHER + UP_TO.format(bound=bound),
    )  # fmt: skip
    found = only(text)
    assert (found.count, found.is_open) == (count, is_open)


def test_branches_are_counted_apart():
    branch = "%c = (s32[], f32[8,16]{1,0}) conditional(%p, %t, %t), branch_computations={%gather, %gather}"
    found = only(program("%t = (s32[], f32[8,16]{1,0}) tuple(%x, %x)", branch, before=GATHER))
    assert (found.count, found.conditional_count) == (0, 2)
    (row,) = collective_rows([found])
    assert (row["count"], row["bytes"], row["conditional_count"]) == (0, 0, 2)
    assert row["conditional_bytes"] == 2 * 3 / 4 * 2048


def test_rows_add_up_what_runs_along_the_same_axis():
    size = {"operand_bytes": 100, "result_bytes": 400, "is_open": False, "source": ""}
    alike = {"kind": "all-gather", "axis": "fsdp", "devices": 4} | size
    collectives = [
        Collective(**alike, count=3, conditional_count=0, is_asynchronous=True, overlapped=2),
        Collective(**alike, count=5, conditional_count=0, is_asynchronous=False, overlapped=0),
        Collective(**alike, count=0, conditional_count=7, is_asynchronous=True, overlapped=0),
        Collective(
            **alike | {"axis": "data"},
            count=9,
            conditional_count=0,
            is_asynchronous=False,
            overlapped=0,
        ),
    ]
    assert collective_rows(collectives) == [
        {"kind": "all-gather", "axis": axis, "devices": 4, "count": count, "bytes": count * 300}
        | {"conditional_count": conditional, "conditional_bytes": conditional * 300}
        | {"asynchronous": asynchronous, "overlapped": overlapped, "is_open": False}
        for axis, count, conditional, asynchronous, overlapped in (
            ("data", 9, 0, 0, 0),
            ("fsdp", 8, 7, 10, 3),
        )
    ]


# Programs compiled here.

ROWS = {
    "all-gather": lambda x, axis: jax.lax.all_gather(x, axis, axis=0, tiled=True),
    "reduce-scatter": lambda x, axis: jax.lax.psum_scatter(
        x, axis, scatter_dimension=0, tiled=True
    ),
    "all-reduce": jax.lax.psum,
    "all-to-all": lambda x, axis: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
    "collective-permute": lambda x, axis: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]),
}


def wire_bytes(kind, n, size):
    """Of an operand of `size` bytes."""
    share = (n - 1) / n
    return {"all-gather": n * share, "all-reduce": 2 * share, "collective-permute": 1}.get(
        kind, share
    ) * size


def compiled_rows(function, *, num=1, dtype=jnp.float32):
    """Rows of a program in which every device has `[16, 4]` numbers."""
    shape = jax.ShapeDtypeStruct((8 * 16, 4), dtype, sharding=NamedSharding(MESH, P(AXES)))
    with jax.set_mesh(MESH):
        run = jax.shard_map(function, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
        text = jax.jit(run).lower(*[shape] * num).compile().as_text()
    return collective_rows(list_collectives(text, MESH))


@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        ("collective-permute", ("data",)),  # has a sender and a receiver, and no groups
        *(
            (kind, axis)
            for kind in ROWS
            if kind != "collective-permute"
            for axis in (("data",), ("fsdp",), AXES)
        ),
    ],
)
def test_a_collective_compiled_here_has_the_bytes_of_the_formula(kind, axis):
    n = int(np.prod([MESH.shape[name] for name in axis]))
    (row,) = compiled_rows(lambda x: ROWS[kind](x, axis))
    assert (row["kind"], row["axis"], row["devices"], row["count"]) == (kind, "+".join(axis), n, 1)
    assert row["bytes"] == wire_bytes(kind, n, 16 * 4 * 4)
    assert (row["conditional_count"], row["conditional_bytes"], row["is_open"]) == (0, 0, False)


def test_a_scan_and_its_gradient_count_as_often_as_they_run():
    def layer(x, w):
        return jnp.tanh(
            x @ jax.lax.all_gather(w, "fsdp", axis=0, tiled=True).T @ jnp.ones((64, 4))
        ), None

    def run(x):
        return jax.grad(lambda w: jax.lax.scan(layer, x, jnp.stack([w] * 6))[0].sum())(x)

    found = {row["kind"]: row for row in compiled_rows(run)}
    assert (found["all-gather"]["axis"], found["all-gather"]["count"] % 6) == ("fsdp", 0)
    assert found["all-gather"]["bytes"] == found["all-gather"]["count"] * wire_bytes(
        "all-gather", 4, 256
    )
    assert (found["reduce-scatter"]["axis"], found["reduce-scatter"]["count"]) == ("fsdp", 6)
    assert found["reduce-scatter"]["bytes"] == 6 * wire_bytes("reduce-scatter", 4, 4 * 256)


def test_both_sides_of_a_cond_are_counted_apart_from_what_always_runs():
    def run(x):
        total = jax.lax.psum(x[0, 0], AXES)
        return jax.lax.cond(
            total > 0,
            lambda x: jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True),
            lambda x: jax.lax.psum_scatter(
                jax.lax.all_gather(x, "fsdp", tiled=True), "fsdp", tiled=True
            ),
            x,
        )

    rows = {row["kind"]: row for row in compiled_rows(run)}
    assert {kind: (row["count"], row["conditional_count"]) for kind, row in rows.items()} == {
        "all-reduce": (1, 0), "all-to-all": (0, 1), "all-gather": (0, 1), "reduce-scatter": (0, 1),
    }  # fmt: skip
    for kind, size in (("all-to-all", 256), ("all-gather", 256), ("reduce-scatter", 4 * 256)):
        assert (rows[kind]["bytes"], rows[kind]["conditional_bytes"]) == (
            0,
            wire_bytes(kind, 4, size),
        )


def test_what_the_partitioner_inserts_is_seen_too():
    shapes = (64, 32), (32, 16)
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))
        for shape, spec in zip(shapes, (P(AXES), P("fsdp")), strict=True)
    )
    run = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(MESH, P(AXES)))
    (row,) = collective_rows(list_collectives(run.lower(x, w).compile().as_text(), MESH))
    assert (row["kind"], row["axis"], row["bytes"]) == (
        "all-gather",
        "fsdp",
        wire_bytes("all-gather", 4, 8 * 16 * 4),
    )
