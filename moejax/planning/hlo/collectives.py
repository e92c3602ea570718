"""What travels between devices in a compiled program, counted from the program's text.

Bytes on the wire are those that a device sends, by the model of a ring of n devices: an all-gather
sends (n-1)/n of its result, a reduce-scatter (n-1)/n of its operand, an all-reduce twice that, an
all-to-all (n-1)/n of its buffer, a permutation all of it. What else a network or its collectives
can do (links in several directions, multicast) is left out: figures are to compare programs by, and
say nothing about time.
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
    "all-gather", "reduce-scatter", "all-reduce", "ragged-all-to-all", "all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
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
      is_open: whether it is in a loop that turns as often as data says, which is counted as once.
      operand_bytes: what a device gives, once.
      result_bytes: what it gets, once.
      is_asynchronous: whether start and end are instructions apart.
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
        return {
            "all-gather": share * self.result_bytes,
            "all-reduce": 2 * share * self.operand_bytes,
            "collective-permute": self.operand_bytes,
        }.get(self.kind, share * self.operand_bytes)


def list_collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every collective of a program that runs, in no particular order.

    Args:
      text: of the program, `compiled.as_text()`.
      mesh: that it was compiled for; its devices are numbered in the order of the mesh.

    Raises:
      ValueError: text without a program in it, or groups of devices in an unknown form.
    """
    program = Program(text)
    return [
        _collective(program, mesh, kind, instruction, executions)
        for instruction, executions in program.run()
        if (kind := instruction.opcode.removesuffix("-start")) in KINDS
        and not _is_repeated(program, instruction)
    ]


def collective_rows(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Collectives added up by kind and axis, most bytes first.

    Returns:
      Rows with `kind`, `axis`, `devices` of a group; `count`, how often it runs, and `bytes`, what
      a device sends, in one run of the program; `conditional_count` and `conditional_bytes`, what
      comes to that in branches if they are taken every time; `asynchronous`, how many of both
      counts are; `overlapped`, how many of those have something to compute meanwhile; `is_open`,
      whether some are in loops whose turns depend on data, counted as one.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in collectives:
        row = rows.setdefault(
            (one.kind, one.axis, one.devices),
            {"kind": one.kind, "axis": one.axis, "devices": one.devices, "count": 0, "bytes": 0.0}
            | {
                "conditional_count": 0,
                "conditional_bytes": 0.0,
                "asynchronous": 0,
                "overlapped": 0,
                "is_open": False,
            },
        )
        row["count"] += one.count
        row["bytes"] += one.count * one.wire_bytes
        row["conditional_count"] += one.conditional_count
        row["conditional_bytes"] += one.conditional_count * one.wire_bytes
        row["asynchronous"] += (one.count + one.conditional_count) * one.is_asynchronous
        row["overlapped"] += (one.count + one.conditional_count) * (one.overlapped > 0)
        row["is_open"] |= one.is_open
    for row in rows.values():
        row["bytes"], row["conditional_bytes"] = (
            round(row["bytes"]),
            round(row["conditional_bytes"]),
        )
    return sorted(
        rows.values(),
        key=lambda row: (-row["bytes"], -row["conditional_bytes"], row["kind"], row["axis"]),
    )


def _collective(
    program: Program, mesh: Mesh, kind: str, instruction: Instruction, executions: Executions
) -> Collective:
    axes, devices = _axes(instruction.rest, mesh)
    start = program.starters.get(instruction.name, instruction)
    done = program.done_of(start)
    operands = program.operands(instruction)
    if kind == "ragged-all-to-all":
        operands = operands[
            :1
        ]  # the buffer that is sent from; the others are that of the result, and sizes
    result = done if done and start is instruction else instruction
    if kind == "all-reduce" and program.home[instruction.name].startswith("all-reduce-scatter"):
        # So XLA:TPU writes a reduce-scatter of padded operands.
        kind, result = "reduce-scatter", program.root(program.home[instruction.name]) or instruction
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
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
        overlapped=0 if done is None else _computing_between(program, start, done),
        source=source[1] if source else "",
    )


def _is_repeated(program: Program, instruction: Instruction) -> bool:
    """Whether it stands for the rest of what a fusion has started, as XLA:TPU writes it."""
    root = program.root(program.home[instruction.name])
    is_end = root is not None and 'custom_call_target="AsyncCollectiveDone"' in root.rest
    return is_end or program.goes_on([program.home[instruction.name]])


def _computing_between(program: Program, start: Instruction, done: Instruction) -> int:
    instructions = program.computations[program.home[start.name]]
    between = instructions[instructions.index(start) + 1 : instructions.index(done)]
    return sum(
        i.opcode in COMPUTE and (i.opcode != "custom-call" or kernel_of(i) is not None)
        for i in between
    )


def bytes_of(result: str) -> int:
    """Of the arrays of a type, `bf16[8,4096]{1,0}` or a tuple of them."""
    return sum(
        math.ceil(_bits(dtype) * math.prod(sizes(shape)) / 8)
        for dtype, shape in SHAPE.findall(result)
    )


def _bits(dtype: str) -> int:
    """Of a number: `pred`, `bf16`, `f8e4m3fn`, `s4`."""
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 8 if dtype == "pred" else 0  # tokens have no bytes


def _axes(attributes: str, mesh: Mesh) -> tuple[list[str], int]:
    """The mesh axes along which devices of a group differ, and how many devices are in a group."""
    groups = _groups(attributes, mesh.size)
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())), axis=-1)
    differ = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    return [
        name for name, differs in zip(mesh.shape, differ, strict=True) if differs
    ], groups.shape[1]


def _groups(attributes: str, num_devices: int) -> np.ndarray:
    """Devices that exchange something, one group in a row, as places in the mesh.

    The forms are `{{0,1},{2,3}}`; `[2,4]<=[8]` and `[2,4]<=[4,2]T(1,0)`, numbers in order,
    reshaped, transposed, reshaped; `mesh['a'=2,'b'=4] {'a'}`, the axes of a mesh; and pairs of
    sender and receiver.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        return np.array(sizes(pairs[1])).reshape(-1, 2)
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(num_devices)[None]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([sizes(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])])
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", attributes
    ):
        return _groups_of_mesh(*named.groups())
    if counted := re.search(
        r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    ):
        return _iota(counted[2]).reshape(sizes(counted[1]))
    raise ValueError(f"groups of devices in an unknown form: {attributes[:200]}")


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: numbers from 0 in this shape, transposed, one after the other."""
    shape, order = (sizes(part) for part in re.findall(r"(\[.*?\])(?:T\((.*)\))?", text)[0])
    return (
        np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape))).reshape(-1)
    )


def _groups_of_mesh(axes: str, devices: str | None, along: str) -> np.ndarray:
    """Groups along axes of a mesh, or along a part of one: `'a':(2)4` has 4 places, and 2 divide the axis before it."""
    lengths = {name: int(length) for name, length in re.findall(r"'?([^'=,]+)'?=(\d+)", axes)}
    numbers = np.arange(math.prod(lengths.values()))
    if devices is not None:
        numbers = _iota(devices) if devices.startswith("[") else np.array(sizes(devices))
    rest = dict(
        zip(
            lengths, np.unravel_index(np.arange(numbers.size), tuple(lengths.values())), strict=True
        )
    )
    for name, before, size in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", along):
        behind = lengths[name] // (int(before) * int(size)) if before else 1
        place = rest[name] // behind % int(size or lengths[name])
        rest[name] = rest[name] - place * behind
    group = np.ravel_multi_index(tuple(rest.values()), tuple(lengths.values()))
    return numbers[np.argsort(group, kind="stable")].reshape(np.unique(group).size, -1)
