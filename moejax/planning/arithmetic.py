"""The arithmetic of matrix products in a compiled program, and its kernels, counted from the program's text.

On TPU the compiler says it itself, and kernels declare theirs (`cost_analysis`); for GPU it does not.
"""

import collections
import dataclasses
import functools
import math
import re

SHAPE = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
BOOKKEEPING = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "PrepareAsyncCallDone", "PrepareAsyncCallStart",
}  # fmt: skip
"""Custom calls of XLA:TPU that compute nothing."""

CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class UnknownKernelError(ValueError):
    """A program calls what may multiply matrices, and how much is not known."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What a program computes.

    Attributes:
      flops: multiplications and additions of all matrix products; loops are multiplied by how often they run.
      kernels: how often each custom call is made, by the kernel's name; the rest is code that XLA wrote.
      open_loops: loops whose number of turns depends on data; their bodies are counted once.
    """

    flops: int
    kernels: dict[str, int]
    open_loops: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text."""

    name: str
    result: tuple[int, ...]
    opcode: str
    rest: str


def count_arithmetic(text: str) -> Arithmetic:
    """Counts the products of a program for CPU or GPU, `compiled.as_text()`; on TPU they are written otherwise.

    Raises:
      ValueError: text without a program in it.
      UnknownKernelError: a kernel of a library that multiplies matrices.
    """
    entry, computations = _parse(text)
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    shapes = {i.name: i.result for instructions in computations.values() for i in instructions}

    @functools.cache
    def count(name: str) -> tuple[int, collections.Counter[str], int]:
        flops, open_loops = 0, 0
        kernels: collections.Counter[str] = collections.Counter()
        for instruction in computations.get(name, []):
            flops += _flops(instruction, shapes)
            if kernel := _kernel(instruction):
                kernels[kernel] += 1
            trips = TRIPS.search(instruction.rest)
            is_open = instruction.opcode == "while" and trips is None
            times = int(trips[1]) if trips and instruction.opcode == "while" else 1
            open_loops += is_open
            for called in _called(instruction):
                inner_flops, inner_kernels, inner_open = count(called)
                flops += times * inner_flops
                open_loops += inner_open
                kernels.update({key: times * number for key, number in inner_kernels.items()})
        return flops, kernels, open_loops

    flops, kernels, open_loops = count(entry)
    return Arithmetic(flops, dict(kernels), open_loops)


def _parse(text: str) -> tuple[str | None, dict[str, list[Instruction]]]:
    """The entry's name, and the instructions of every computation by its name."""
    entry, current = None, None
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            name, result, opcode, rest = found.groups()
            current.append(Instruction(name, _first_shape(result), opcode, rest))
    return entry, computations


def _first_shape(text: str) -> tuple[int, ...]:
    found = SHAPE.search(text)
    return _sizes(found[1]) if found else ()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _called(instruction: Instruction) -> list[str]:
    """Computations that run with an instruction; those of a branch all count."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    return CALLED.findall(instruction.rest) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])


def _kernel(instruction: Instruction) -> str | None:
    if instruction.opcode != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    name = target[1] if target else "unknown"
    if name in BOOKKEEPING:
        return None
    if name == "tpu_custom_call":
        return re.sub(r"\.\d+$", "", instruction.name)  # the kernel's own name
    tokamax = re.search(r"tokamax\._src\.ops\.ragged_dot\.(\w+)\.", instruction.rest)
    return f"tokamax {tokamax[1].removeprefix('pallas_')}" if tokamax else name


def _flops(instruction: Instruction, shapes: dict[str, tuple[int, ...]]) -> int:
    operands = [shapes[name] for name in re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0]) if name in shapes]
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        summed = _sizes(axes[1]) if axes else ()
        return 2 * math.prod(instruction.result) * math.prod(operands[0][axis] for axis in summed)
    kernel = _kernel(instruction) or ""
    if kernel.startswith(("__cublas", "__cudnn")):
        raise UnknownKernelError(f"{kernel} is a product of a library's, whose arithmetic is not known here")
    if kernel.startswith("tokamax "):
        # Rows by the matrices of their groups `[E, P, Q]`, or outer products of rows with rows: P * Q for every row.
        rows, width = operands[0]
        return 2 * rows * width * instruction.result[-1]
    return 0
