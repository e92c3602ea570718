"""Counts the arithmetic of matrix products in a compiled program, and its kernels, from its text.

On TPU the compiler reports the arithmetic, and kernels declare theirs (`cost_analysis`); for GPU it
does not.
"""

import collections
import dataclasses
import math
import re

from moejax.planning.hlo.program import Instruction, Program, sizes

BOOKKEEPING = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
}
"""Custom calls of XLA:TPU that compute nothing."""


class UnknownKernelError(ValueError):
    """A program calls a kernel that may multiply matrices, by how much is not known."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What a program computes.

    Attributes:
      flops: multiplications and additions of all matrix products; those of a loop are multiplied by
        its number of iterations.
      kernels: how often each custom call is made, by the kernel's name; the rest is code that XLA
        wrote.
      open_loops: loops whose number of iterations depends on data; their bodies are counted once.
    """

    flops: int
    kernels: dict[str, int]
    open_loops: int


def count_arithmetic(text: str) -> Arithmetic:
    """Counts the products in `compiled.as_text()` of a program for CPU or GPU.

    On TPU products are written in other ways, which this does not know.

    Raises:
      ValueError: text without a program in it.
      UnknownKernelError: a kernel of a library that multiplies matrices.
    """
    program = Program(text)
    flops = 0
    open_loops = 0
    kernels: collections.Counter[str] = collections.Counter()
    for instruction, executions in program.run():
        times = executions.always + executions.conditional
        flops += times * _flops(instruction, program)
        kernel = kernel_of(instruction)
        if kernel:
            kernels[kernel] += times
        if instruction.opcode == "while" and program.trips(instruction) is None:
            open_loops += 1
    return Arithmetic(flops, dict(kernels), open_loops)


def kernel_of(instruction: Instruction) -> str | None:
    """Returns the kernel that a custom call runs; None for whatever else, and for bookkeeping."""
    if instruction.opcode != "custom-call":
        return None
    target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    name = target[1] if target else "unknown"
    if name in BOOKKEEPING:
        return None
    if name == "tpu_custom_call":
        return re.sub(r"\.\d+$", "", instruction.name)  # the kernel's own name
    tokamax = re.search(r"tokamax\._src\.ops\.ragged_dot\.(\w+)\.", instruction.rest)
    if not tokamax:
        return name
    kernel = tokamax[1].removeprefix("pallas_")
    return f"tokamax {kernel}"


def _flops(instruction: Instruction, program: Program) -> int:
    """Returns the arithmetic of an instruction, executed once; 0 for all but matrix products."""
    if instruction.opcode == "dot":
        return _dot_flops(instruction, program)
    kernel = kernel_of(instruction) or ""
    if kernel.startswith(("__cublas", "__cudnn")):
        raise UnknownKernelError(
            f"{kernel} is a product of a library's, whose arithmetic is not known here"
        )
    if kernel.startswith("tokamax "):
        # Rows by the matrices of their groups `[E, P, Q]`, or outer products of rows with rows: P *
        # Q for every row.
        rows, width = program.operands(instruction)[0].shape
        return 2 * rows * width * instruction.shape[-1]
    return 0


def _dot_flops(dot: Instruction, program: Program) -> int:
    """Returns the arithmetic of a matrix product."""
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
    contracted_axes: tuple[int, ...] = ()
    if contracting:
        contracted_axes = sizes(contracting[1])
    left, *_ = program.operands(dot)
    left_shape = left.shape
    num_outputs = math.prod(dot.shape)
    num_terms = math.prod(left_shape[axis] for axis in contracted_axes)
    return 2 * num_outputs * num_terms
