"""The arithmetic of matrix products in a compiled program, and its kernels, counted from the program's text.

On TPU the compiler says it itself, and kernels declare theirs (`cost_analysis`); for GPU
it does not.
"""

import collections
import dataclasses
import math
import re

from moejax.planning.hlo.program import Instruction, Program, sizes

BOOKKEEPING = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "PrepareAsyncCallDone", "PrepareAsyncCallStart",
}  # fmt: skip
"""Custom calls of XLA:TPU that compute nothing."""


class UnknownKernelError(ValueError):
    """A program calls what may multiply matrices, and how much is not known."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What a program computes.

    Attributes:
      flops: multiplications and additions of all matrix products; loops are multiplied by how
        often they run.
      kernels: how often each custom call is made, by the kernel's name; the rest is code
        that XLA wrote.
      open_loops: loops whose number of turns depends on data; their bodies are counted once.
    """

    flops: int
    kernels: dict[str, int]
    open_loops: int


def count_arithmetic(text: str) -> Arithmetic:
    """Counts the products of a program for CPU or GPU, `compiled.as_text()`; on TPU they are written otherwise.

    Raises:
      ValueError: text without a program in it.
      UnknownKernelError: a kernel of a library that multiplies matrices.
    """
    program = Program(text)
    flops, open_loops = 0, 0
    kernels: collections.Counter[str] = collections.Counter()
    for instruction, executions in program.run():
        times = executions.always + executions.conditional
        flops += times * _flops(instruction, program)
        if kernel := kernel_of(instruction):
            kernels[kernel] += times
        open_loops += instruction.opcode == "while" and program.trips(instruction) is None
    return Arithmetic(flops, dict(kernels), open_loops)


def kernel_of(instruction: Instruction) -> str | None:
    """The kernel that a custom call runs; None for other instructions and for custom calls that compute nothing."""
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


def _flops(instruction: Instruction, program: Program) -> int:
    if instruction.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        summed, left = sizes(axes[1]) if axes else (), program.operands(instruction)[0].shape
        return 2 * math.prod(instruction.shape) * math.prod(left[axis] for axis in summed)
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
