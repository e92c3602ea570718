"""Collectives counted from the text of compiled programs, compared with what is known of them."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.planning.hlo.collectives import Collective, bytes_of, collective_rows, list_collectives

P = PartitionSpec
AXES = ("data", "fsdp")


MESH = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""


def program(*lines, before=""):
    """Returns the text of a program, with a parameter `%x` of 8 x 16 numbers, 512 bytes."""
    parameter = "%x = f32[8,16]{1,0} parameter(0)"
    body = "\n".join(f"  {line}" for line in (parameter, *lines))
    entry = f"ENTRY %main.1 (x: f32[8,16]) -> f32[8,16] {{\n{body}\n}}\n"
    return f"HloModule jit_f\n{SUM}{before}\n{entry}"


def only(text):
    """Returns the one collective of a program."""
    (found,) = list_collectives(text, MESH)
    return found


# Groups along the rows and along the columns of the mesh of 2 x 4.
IN_ROWS = "{{0,1,2,3},{4,5,6,7}}"
IN_COLUMNS = "{{0,4},{1,5},{2,6},{3,7}}"


@pytest.mark.parametrize(
    ("line", "kind", "axis", "devices", "bytes_each_way", "wire_bytes"),
    [
        (
            f"f32[32,16]{{1,0}} all-gather(%x), replica_groups={IN_ROWS}, dimensions={{0}}",
            "all-gather",
            "fsdp",
            4,
            (512, 2048),
            3 / 4 * 2048,
        ),
        (
            f"f32[4,16]{{1,0}} reduce-scatter(%x), replica_groups={IN_COLUMNS}, to_apply=%sum",
            "reduce-scatter",
            "data",
            2,
            (512, 256),
            1 / 2 * 512,
        ),
        (
            "f32[8,16]{1,0} all-reduce(%x), replica_groups={}, to_apply=%sum",
            "all-reduce",
            "data+fsdp",
            8,
            (512, 512),
            2 * 7 / 8 * 512,
        ),
        (
            f"f32[8,16]{{1,0}} all-to-all(%x), replica_groups={IN_ROWS}, dimensions={{0}}",
            "all-to-all",
            "fsdp",
            4,
            (512, 512),
            3 / 4 * 512,
        ),
        (
            f"f32[9,16]{{1,0}} ragged-all-to-all(%x, %out, %s, %s), replica_groups={IN_ROWS}",
            "ragged-all-to-all",
            "fsdp",
            4,
            (512, 576),
            3 / 4 * 512,
        ),
        (
            "f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            "fsdp",
            2,
            (512, 512),
            512,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_every_kind_has_its_axis_its_bytes_and_those_on_a_ring(
    line, kind, axis, devices, bytes_each_way, wire_bytes
):
    parameters = ["%out = f32[9,16]{1,0} parameter(1)", "%s = s32[4]{0} parameter(2)"]
    found = only(program(*parameters, f"%y = {line}"))
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
    attributes = f"channel_id=1, replica_groups={groups}, to_apply=%sum"
    found = only(program(f"%y = f32[8,16]{{1,0}} all-reduce(%x), {attributes}"))
    assert (found.axis, found.devices) == (axis, devices)


def test_groups_in_an_unknown_form_are_an_error():
    text = program("%y = f32[8,16]{1,0} all-reduce(%x), replica_groups=everyone")
    with pytest.raises(ValueError, match=r"unknown form.*replica_groups=everyone"):
        list_collectives(text, MESH)


def test_several_arrays_in_one_collective_add_up():
    line = "%y = (f32[8,16]{1,0}, bf16[4]{0}) all-reduce(%x, %b), replica_groups={}, to_apply=%sum"
    found = only(program("%b = bf16[4]{0:T(8,128)(2,1)} parameter(1)", line))
    assert (found.operand_bytes, found.result_bytes) == (520, 520)


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("pred[7]{0}", 7),
        ("f8e4m3fn[9]{0}", 9),
        ("s4[9]{0}", 5),
        ("f32[]", 4),
        ("(f32[2]{0}, /*index=1*/u32[], token[])", 12),
    ],
)
def test_types_have_their_bytes(result, size):
    assert bytes_of(result) == size


def test_a_start_and_its_end_are_one_asynchronous_collective():
    pair = "(f32[8,16]{1,0}, f32[32,16]{1,0})"
    lines = [
        f"%start = {pair} all-gather-start(%x), replica_groups={IN_ROWS}",
        "%fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum",
        "%bitcast.1 = f32[128]{0} bitcast(%x)",
        '%k = f32[8]{0} custom-call(%x), custom_call_target="sort"',
        '%n = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"',
        "%done = f32[32,16]{1,0} all-gather-done(%start)",
        "%fusion.2 = f32[8]{0} fusion(%done), kind=kLoop, calls=%sum",
    ]
    found = only(program(*lines))
    assert (found.kind, found.count) == ("all-gather", 1)
    assert (found.operand_bytes, found.result_bytes) == (512, 2048)
    # Meanwhile the first fusion and the kernel that sorts are computed.
    assert (found.is_asynchronous, found.overlapped) == (True, 2)


@pytest.mark.parametrize("opcode", ["async", "call"])
def test_a_collective_in_an_asynchronous_computation_is_asynchronous(opcode):
    wrapped = f"""
%wrapped (p: f32[8,16]) -> f32[4,16] {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %rs = f32[4,16]{{1,0}} reduce-scatter(%p), replica_groups={IN_COLUMNS}, \
dimensions={{0}}, to_apply=%sum
}}
"""
    pair = "((f32[8,16]{1,0}), f32[4,16]{1,0}, u32[])"
    lines = [
        f"%begin = {pair} {opcode}-start(%x), calls=%wrapped",
        "%fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum",
        f"%going = {pair} async-update(%begin)",
        "%fusion.2 = f32[8]{0} fusion(%x), kind=kLoop, calls=%sum",
        f"%end = f32[4,16]{{1,0}} {opcode}-done(%going)",
    ]
    found = only(program(*lines, before=wrapped))
    assert (found.kind, found.count, found.wire_bytes) == ("reduce-scatter", 1, 256)
    assert (found.is_asynchronous, found.overlapped) == (True, 2)


def test_a_collective_spread_over_fusions_is_one_and_asynchronous():
    def part(name, result, root):
        return f"""
%{name} (p.{name}: f32[8,16]) -> {result} {{
  %p.{name} = f32[8,16]{{1,0}} parameter(0)
  %g.{name} = f32[32,16]{{1,0}} all-gather(%p.{name}), replica_groups={IN_ROWS}, dimensions={{0}}
  ROOT %r.{name} = {result} {root}
}}
"""

    pair = "(f32[8,16], f32[32,16], u32[])"
    start = 'custom-call(%g.started), custom_call_target="AsyncCollectiveStart"'
    done = 'custom-call(%g.ended), custom_call_target="AsyncCollectiveDone"'
    middle = "async_collective_fusion.7"
    started = part("started", pair, start)
    continued = part(middle, pair, f"tuple(%x, %g.{middle}, %c)")
    ended = part("ended", "f32[32,16]", done)
    lines = [
        f"%async-collective-start.1 = {pair} fusion(%x), kind=kCustom, calls=%started",
        "%gte.1 = f32[32,16] get-tuple-element(%async-collective-start.1), index=1",
        f"%fusion.7 = {pair} fusion(%gte.1), kind=kOutput, calls=%async_collective_fusion.7",
        "%gte.2 = f32[32,16] get-tuple-element(%fusion.7), index=1",
        "%async-collective-done.1 = f32[32,16] fusion(%gte.2), kind=kCustom, calls=%ended",
    ]
    found = only(program(*lines, before=started + continued + ended))
    assert (found.kind, found.axis, found.count) == ("all-gather", "fsdp", 1)
    assert found.wire_bytes == 3 / 4 * 2048
    assert (found.is_asynchronous, found.overlapped) == (True, 1)


def test_a_reduce_scatter_written_as_a_fusion_of_an_all_reduce_is_one():
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
    assert (found.kind, found.axis) == ("reduce-scatter", "fsdp")
    assert (found.operand_bytes, found.result_bytes) == (768, 192)


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
    pair = "(s32[], f32[8,16]{1,0})"
    lines = [
        "%two = s32[] constant(2)",
        "%first = s32[] copy(%two)",
        f"%start = {pair} tuple(%first, %x)",
        f"%loop = {pair} while(%start), condition=%up_to, body=%gather{attribute}",
    ]
    found = only(program(*lines, before=GATHER + UP_TO.format(bound=bound)))
    assert (found.count, found.is_open) == (count, is_open)


def test_branches_are_counted_apart():
    pair = "(s32[], f32[8,16]{1,0})"
    lines = [
        f"%t = {pair} tuple(%x, %x)",
        f"%c = {pair} conditional(%p, %t, %t), branch_computations={{%gather, %gather}}",
    ]
    found = only(program(*lines, before=GATHER))
    assert (found.count, found.conditional_count) == (0, 2)
    (row,) = collective_rows([found])
    assert (row["count"], row["bytes"], row["conditional_count"]) == (0, 0, 2)
    assert row["conditional_bytes"] == 2 * 3 / 4 * 2048


def test_rows_add_up_what_runs_along_the_same_axis():
    def gather(axis, count, conditional_count, overlapped):
        """A gather of 400 bytes; it is asynchronous where `overlapped` is a number."""
        return Collective(
            kind="all-gather",
            axis=axis,
            devices=4,
            count=count,
            conditional_count=conditional_count,
            is_open=False,
            operand_bytes=100,
            result_bytes=400,
            is_asynchronous=overlapped is not None,
            overlapped=overlapped or 0,
            source="",
        )

    along_fsdp = [gather("fsdp", 3, 0, 2), gather("fsdp", 5, 0, None), gather("fsdp", 0, 7, 0)]
    along_data = gather("data", 9, 0, None)
    row = {"kind": "all-gather", "devices": 4, "is_open": False}
    of_data = row | {
        "axis": "data",
        "count": 9,
        "bytes": 9 * 300,
        "conditional_count": 0,
        "conditional_bytes": 0,
        "asynchronous": 0,
        "overlapped": 0,
    }
    of_fsdp = row | {
        "axis": "fsdp",
        "count": 8,
        "bytes": 8 * 300,
        "conditional_count": 7,
        "conditional_bytes": 7 * 300,
        "asynchronous": 10,
        "overlapped": 3,
    }
    assert collective_rows([*along_fsdp, along_data]) == [of_data, of_fsdp]


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
    """Returns the bytes that a device sends, for an operand of `size` bytes."""
    share = (n - 1) / n
    factors = {"all-gather": n * share, "all-reduce": 2 * share, "collective-permute": 1}
    return factors.get(kind, share) * size


def compiled_rows(function):
    """Returns the rows of a program in which every device has `[16, 4]` numbers."""
    sharding = NamedSharding(MESH, P(AXES))
    x = jax.ShapeDtypeStruct((8 * 16, 4), jnp.float32, sharding=sharding)
    with jax.set_mesh(MESH):
        run = jax.shard_map(function, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
        compiled = jax.jit(run).lower(x).compile()
    return collective_rows(list_collectives(compiled.as_text(), MESH))


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "collective-permute"])
@pytest.mark.parametrize("axis", [("data",), ("fsdp",), AXES])
def test_a_collective_compiled_here_has_the_bytes_of_the_formula(kind, axis):
    assert_bytes_of_the_formula(kind, axis)


def test_a_permutation_compiled_here_has_the_bytes_of_the_formula():
    assert_bytes_of_the_formula("collective-permute", ("data",))  # of one sender and one receiver


def assert_bytes_of_the_formula(kind, axis):
    n = math.prod(MESH.shape[name] for name in axis)
    (row,) = compiled_rows(lambda x: ROWS[kind](x, axis))
    assert (row["kind"], row["axis"]) == (kind, "+".join(axis))
    assert (row["devices"], row["count"]) == (n, 1)
    assert row["bytes"] == wire_bytes(kind, n, 16 * 4 * 4)
    assert (row["conditional_count"], row["conditional_bytes"], row["is_open"]) == (0, 0, False)


def test_a_scan_and_its_gradient_count_as_often_as_they_run():
    def layer(x, w):
        gathered = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jnp.tanh(x @ gathered.T @ jnp.ones((64, 4))), None

    def gradient(x):
        def loss(w):
            y, _ = jax.lax.scan(layer, x, jnp.stack([w] * 6))
            return y.sum()

        return jax.grad(loss)(x)

    rows = {row["kind"]: row for row in compiled_rows(gradient)}
    gather, scatter = rows["all-gather"], rows["reduce-scatter"]
    assert (gather["axis"], gather["count"] % 6) == ("fsdp", 0)
    assert gather["bytes"] == gather["count"] * wire_bytes("all-gather", 4, 256)
    assert (scatter["axis"], scatter["count"]) == ("fsdp", 6)
    assert scatter["bytes"] == 6 * wire_bytes("reduce-scatter", 4, 4 * 256)


def test_both_sides_of_a_cond_are_counted_apart_from_what_always_runs():
    def swap(x):
        return jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)

    def gather_and_scatter(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum_scatter(gathered, "fsdp", tiled=True)

    def run(x):
        total = jax.lax.psum(x[0, 0], AXES)
        return jax.lax.cond(total > 0, swap, gather_and_scatter, x)

    rows = {row["kind"]: row for row in compiled_rows(run)}
    counts = {kind: (row["count"], row["conditional_count"]) for kind, row in rows.items()}
    assert counts == {
        "all-reduce": (1, 0),
        "all-to-all": (0, 1),
        "all-gather": (0, 1),
        "reduce-scatter": (0, 1),
    }
    for kind, size in (("all-to-all", 256), ("all-gather", 256), ("reduce-scatter", 4 * 256)):
        assert rows[kind]["bytes"] == 0
        assert rows[kind]["conditional_bytes"] == wire_bytes(kind, 4, size)


def test_what_the_partitioner_inserts_is_seen_too():
    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))

    x, w = array((64, 32), P(AXES)), array((32, 16), P("fsdp"))
    run = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(MESH, P(AXES)))
    compiled = run.lower(x, w).compile()
    (row,) = collective_rows(list_collectives(compiled.as_text(), MESH))
    assert (row["kind"], row["axis"]) == ("all-gather", "fsdp")
    assert row["bytes"] == wire_bytes("all-gather", 4, 8 * 16 * 4)
