"""Counts the traffic between devices in a compiled program, from the program's text.

Bytes on the wire are those that a device sends, by the model of a ring of n devices: an all-gather
sends (n-1)/n of its result, a reduce-scatter (n-1)/n of its operand, an all-reduce twice that, an
all-to-all (n-1)/n of its buffer, a permutation all of it. What else a network or its collectives
can do (links in several directions, multicast) is left out: the figures are for comparing programs,
and say nothing about time.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from moejax.planning.hlo.arithmetic import kernel_of
from moejax.planning.hlo.program import SHAPE, Executions, Instruction, Program, sizes

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
COMPUTE = (
    "fusion",
    "dot",
    "convolution",
    "custom-call",
    "while",
    "conditional",
    "sort",
    "scatter",
    "gather",
)
"""Instructions that take time, and may run while a collective is under way."""


GROUPS_ALONG_AXES = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}"
)
GROUPS_IN_ORDER = re.compile(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program.

    Attributes:
      kind: one of `KINDS`.
      axis: the mesh axes that it runs along, joined by "+"; empty where it joins a device with
        itself alone.
      devices: how many take part in a group.
      count: how often it runs, outside of branches.
      conditional_count: how often it runs in branches, if they are taken every time.
      is_open: whether it is in a loop whose iterations depend on data, which are counted as one.
      operand_bytes: what a device gives, once.
      result_bytes: what it gets, once.
      is_asynchronous: whether its start and its end are separate instructions.
      overlapped: computing instructions between them.
      source: the operation of the traced program that it comes from.
    """

    kind: str
    axis: str
    devices: int
    count: int
    conditional_count: int
    is_open: bool
    operand_bytes: int
    result_bytes: int
    is_asynchronous: bool
    overlapped: int
    source: str

    @property
    def wire_bytes(self) -> float:
        """What a device sends, once."""
        share = (self.devices - 1) / self.devices
        if self.kind == "all-gather":
            return share * self.result_bytes
        if self.kind == "all-reduce":
            return 2 * share * self.operand_bytes
        if self.kind == "collective-permute":
            return self.operand_bytes
        return share * self.operand_bytes


def list_collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Returns every collective of a program that runs, in no particular order.

    Args:
      text: of the program, `compiled.as_text()`.
      mesh: that it was compiled for; its devices are numbered in the order of the mesh.

    Raises:
      ValueError: text without a program in it, or groups of devices in an unknown form.
    """
    program = Program(text)
    found = []
    for instruction, executions in program.run():
        is_collective = _kind(instruction) in KINDS
        if is_collective and not _is_repeated(program, instruction):
            collective = _collective(program, mesh, instruction, executions)
            found.append(collective)
    return found


def collective_rows(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Adds up collectives by kind and axis, most bytes first.

    Returns:
      Rows with `kind`, `axis`, `devices` of a group; `count`, how often it runs, and `bytes`, what
      a device sends, in one run of the program; `conditional_count` and `conditional_bytes`, what
      is added in branches if they are taken every time; `asynchronous`, how many of both counts
      are; `overlapped`, how many of those have something to compute meanwhile; `is_open`, whether
      some are in loops whose iterations depend on data, counted as one.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for collective in collectives:
        key = (collective.kind, collective.axis, collective.devices)
        row = rows.setdefault(key, _empty_row(collective))
        _add_to_row(row, collective)
    for row in rows.values():
        _round_bytes(row)
    return sorted(rows.values(), key=_order)


def _round_bytes(row: dict[str, Any]) -> None:
    """Rounds sums of bytes to whole ones."""
    for name in ("bytes", "conditional_bytes"):
        row[name] = round(row[name])


def _order(row: dict[str, Any]) -> tuple:
    """Returns a key by which the rows with most bytes come first."""
    return -row["bytes"], -row["conditional_bytes"], row["kind"], row["axis"]


def _empty_row(collective: Collective) -> dict[str, Any]:
    """Returns the row of such collectives before any is added."""
    return {
        "kind": collective.kind,
        "axis": collective.axis,
        "devices": collective.devices,
        "count": 0,
        "bytes": 0.0,
        "conditional_count": 0,
        "conditional_bytes": 0.0,
        "asynchronous": 0,
        "overlapped": 0,
        "is_open": False,
    }


def _add_to_row(row: dict[str, Any], collective: Collective) -> None:
    count = collective.count
    conditional_count = collective.conditional_count
    either_count = count + conditional_count
    wire_bytes = collective.wire_bytes
    row["count"] += count
    row["bytes"] += count * wire_bytes
    row["conditional_count"] += conditional_count
    row["conditional_bytes"] += conditional_count * wire_bytes
    if collective.is_asynchronous:
        row["asynchronous"] += either_count
    if collective.overlapped:
        row["overlapped"] += either_count
    row["is_open"] |= collective.is_open


def _kind(instruction: Instruction) -> str:
    """Returns the operation, whether the instruction does it or starts it."""
    return instruction.opcode.removesuffix("-start")


def _collective(
    program: Program,
    mesh: Mesh,
    instruction: Instruction,
    executions: Executions,
) -> Collective:
    """Returns what an instruction sends."""
    kind = _kind(instruction)
    axes, devices = _axes(instruction.rest, mesh)
    start = program.starters.get(instruction.name, instruction)
    done = program.done_of(start)
    operands = program.operands(instruction)
    if kind == "ragged-all-to-all":
        operands = operands[:1]  # the send buffer; the others are the result's buffer, and sizes
    result = done if done and start is instruction else instruction
    computation = program.home[instruction.name]
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        # XLA:TPU writes a reduce-scatter of padded operands in this way.
        kind = "reduce-scatter"
        result = program.root(computation) or instruction
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    overlapped = 0
    if done is not None:
        overlapped = _computing_between(program, start, done)
    return Collective(
        kind=kind,
        axis="+".join(axes),
        devices=devices,
        count=executions.always,
        conditional_count=executions.conditional,
        is_open=executions.is_open,
        operand_bytes=sum(bytes_of(operand.result) for operand in operands),
        result_bytes=bytes_of(result.result),
        is_asynchronous=done is not None,
        overlapped=overlapped,
        source=source[1] if source else "",
    )


def _is_repeated(program: Program, instruction: Instruction) -> bool:
    """Whether it is a later part of what a fusion has started, as XLA:TPU writes it."""
    computation = program.home[instruction.name]
    if program.goes_on([computation]):
        return True
    root = program.root(computation)
    if root is None:
        return False
    return 'custom_call_target="AsyncCollectiveDone"' in root.rest


def _computing_between(program: Program, start: Instruction, done: Instruction) -> int:
    """Counts the instructions that take time between the start and the end of a collective."""
    computation = program.home[start.name]
    instructions = program.computations[computation]
    after_start = instructions.index(start) + 1
    end = instructions.index(done)
    between = instructions[after_start:end]
    return sum(map(_takes_time, between))


def _takes_time(instruction: Instruction) -> bool:
    """Whether a device computes for it."""
    if instruction.opcode == "custom-call":
        return kernel_of(instruction) is not None
    return instruction.opcode in COMPUTE


def bytes_of(result: str) -> int:
    """Returns the bytes of the arrays of a type, `bf16[8,4096]{1,0}` or a tuple of them."""
    total = 0
    for dtype, shape in SHAPE.findall(result):
        bits = _bits(dtype) * math.prod(sizes(shape))
        total += math.ceil(bits / 8)
    return total


def _bits(dtype: str) -> int:
    """Returns the bits of a number: `pred`, `bf16`, `f8e4m3fn`, `s4`."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found:
        return int(found[1])
    return 8 if dtype == "pred" else 0  # tokens, which order operations, have no bytes


def _axes(attributes: str, mesh: Mesh) -> tuple[list[str], int]:
    """Returns the mesh axes along which devices of a group differ, and the size of a group."""
    groups = _groups(attributes, mesh.size)
    mesh_shape = tuple(mesh.shape.values())
    coordinates_by_axis = np.unravel_index(groups, mesh_shape)
    axes = []
    for axis, coordinates in zip(mesh.shape, coordinates_by_axis, strict=True):
        first_of_group = coordinates[:, :1]
        differs = coordinates != first_of_group
        if differs.any():
            axes.append(axis)
    _, num_devices = groups.shape
    return axes, num_devices


def _groups(attributes: str, num_devices: int) -> np.ndarray:
    """Returns the devices that communicate, a group in each row, as places in the mesh.

    The forms are `{{0,1},{2,3}}`; `[2,4]<=[8]` and `[2,4]<=[4,2]T(1,0)`, numbers in order,
    reshaped, transposed, reshaped; `mesh['a'=2,'b'=4] {'a'}`, the axes of a mesh; and pairs of
    sender and receiver.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        senders_and_receivers = np.array(sizes(pairs[1]))
        return senders_and_receivers.reshape(-1, 2)
    if re.search(r"replica_groups=\{\}", attributes):
        all_devices = np.arange(num_devices)
        return all_devices[None]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return np.array([sizes(group) for group in groups])
    if named := GROUPS_ALONG_AXES.search(attributes):
        axes, devices, along = named.groups()
        return _groups_of_mesh(axes, devices, along)
    if counted := GROUPS_IN_ORDER.search(attributes):
        shape_text, numbers_text = counted.groups()
        numbers = _iota(numbers_text)
        return numbers.reshape(sizes(shape_text))
    raise ValueError(f"groups of devices in an unknown form: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """Returns the numbers that `[4,2]T(1,0)` stands for.

    Those are the numbers from 0 in this shape, transposed, one after the other.
    """
    shape_text, order_text = re.findall(r"(\[.*?\])(?:T\((.*)\))?", text)[0]
    shape = sizes(shape_text)
    order = sizes(order_text) or range(len(shape))
    numbers = np.arange(math.prod(shape))
    reshaped = numbers.reshape(shape)
    transposed = reshaped.transpose(order)
    return transposed.reshape(-1)


def _groups_of_mesh(axes: str, devices: str | None, along: str) -> np.ndarray:
    """Returns groups along axes of a mesh, or along a part of one.

    A part is `'a':(2)4`, which has 4 places, with 2 dividing the axis before it.
    """
    named_lengths = re.findall(r"'?([^'=,]+)'?=(\d+)", axes)
    lengths = {name: int(length) for name, length in named_lengths}
    mesh_shape = tuple(lengths.values())
    numbers = _mesh_numbers(mesh_shape, devices)
    places = np.arange(numbers.size)
    coordinates = np.unravel_index(places, mesh_shape)
    # Places of a group have the same coordinates but for the axes, or parts of them, along it.
    of_group = dict(zip(lengths, coordinates, strict=True))
    for name, before, size in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", along):
        stride, length = _part_of_axis(lengths[name], before, size)
        within_group = of_group[name] // stride % length
        of_group[name] = of_group[name] - within_group * stride
    coordinates_of_group = tuple(of_group.values())
    group = np.ravel_multi_index(coordinates_of_group, mesh_shape)
    order = np.argsort(group, kind="stable")
    num_groups = np.unique(group).size
    by_group = numbers[order]
    return by_group.reshape(num_groups, -1)


def _part_of_axis(axis_length: int, before: str, size: str) -> tuple[int, int]:
    """Returns the distance between neighbours along a part of an axis, and how many there are."""
    if not before:
        return 1, axis_length
    length = int(size)
    stride = axis_length // (int(before) * length)
    return stride, length


def _mesh_numbers(mesh_shape: tuple[int, ...], devices: str | None) -> np.ndarray:
    """Returns the number of the device at each place of a mesh."""
    if devices is None:
        return np.arange(math.prod(mesh_shape))
    if devices.startswith("["):
        return _iota(devices)
    return np.array(sizes(devices))
