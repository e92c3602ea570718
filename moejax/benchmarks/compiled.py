"""Compiles the experts of a layer for another machine, and says what they compute, hold and call.

The programs are those of `moejax bench layer`, for one device. Nothing is timed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.benchmarks.layer import (
    DENSE,
    DIRECTIONS,
    Shape,
    dense_layer,
    draw,
    implementations_of,
    named_row,
    through,
)
from moejax.benchmarks.timing import Arguments, program_of
from moejax.kernels.grouped_matmul import resolve_implementation, unavailable
from moejax.planning.hlo.arithmetic import Arithmetic, count_arithmetic
from moejax.planning.targets import Target, TargetError, make_target_mesh

FIGURES = ("flops", "flops_over_ideal", "temporary_bytes", "kernels", "open_loops")
"""What a row says of a program that compiles."""


def bench_compiled(
    shape: Shape,
    implementations: Sequence[str],
    dtype: str,
    target: Target,
) -> list[dict[str, Any]]:
    """Compiles all of these on one shape, the dense layer among them.

    Args:
      shape: of the layer; its load does not matter.
      implementations: names from `implementations_of`; none: what "auto" stands for there, and
        "ragged".
      dtype: of tokens and weights.
      target: the device.

    Returns:
      A row for each direction and implementation, the dense layer first: whether it fits the memory
      of the target, and figures, unless the compiler refuses what does not.

    Raises:
      TargetError: the target's compiler or an implementation is missing there.
      UnknownKernelError: a program calls a kernel whose arithmetic is not known.
    """
    mesh = make_target_mesh(target)
    rows = []
    with jax.set_mesh(mesh):
        names = dict.fromkeys(implementations or (resolve_implementation("auto"), "ragged"))
        _check_available(names, target)
        arrays = _abstract_arrays(shape, dtype, mesh)
        for direction, name in itertools.product(DIRECTIONS, (DENSE, *names)):
            lowered = _lower(shape, name, direction, arrays)
            row = named_row(shape, name, direction, dtype)
            figures = _row(shape, direction, target, lowered)
            rows.append(row | figures)
    return rows


def _check_available(names: Iterable[str], target: Target) -> None:
    """Raises for an implementation that cannot run on the target."""
    missing = unavailable()
    for name in names:
        if name in missing:
            raise TargetError(f"{name} cannot run on {target.name}: {missing[name]}")


def _abstract_arrays(shape: Shape, dtype: str, mesh: Mesh) -> dict[str, Any]:
    """Returns shapes of the inputs of a layer and its dense twin, by the fields of `Arrays`."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def make() -> dict[str, Any]:
        return vars(draw(shape, dtype))

    def on_mesh(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    abstract = jax.eval_shape(make)
    return jax.tree.map(on_mesh, abstract)


def _lower(shape: Shape, name: str, direction: str, arrays: dict[str, Any]) -> Any:
    """Lowers the dense layer or an implementation, for arrays that do not exist."""
    dy_TD = arrays["dy_TD"]
    x_TD = arrays["x_TD"]
    if name == DENSE:
        layer: Callable[..., jax.Array] = dense_layer
        arguments = Arguments(dy_TD, (x_TD, *arrays["dense_weights"]))
    else:
        layer = functools.partial(through, implementations_of(shape)[name])
        inputs = (x_TD, arrays["weights_TK"], *arrays["expert_weights"])
        arguments = Arguments(dy_TD, inputs, (arrays["experts_TK"],))
    program = jax.jit(program_of(layer, direction))
    return program.lower(*arguments)


def _row(shape: Shape, direction: str, target: Target, lowered: Any) -> dict[str, Any]:
    """Returns figures of a program; None where the compiler refuses what does not fit."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"target": target.name, "fits": False} | dict.fromkeys(FIGURES)
    counted = arithmetic_of(compiled, target)
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "target": target.name,
        "fits": target.memory_bytes == 0 or needed <= target.memory_bytes,
        "flops": counted.flops,
        "flops_over_ideal": round(counted.flops / shape.flops(direction), 3),
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": counted.kernels,
        "open_loops": counted.open_loops,
    }


def arithmetic_of(compiled: Any, target: Target) -> Arithmetic:
    """Returns what a program compiled for a target computes.

    It is read from the program's text; on TPU it is what the compiler reports, which also counts
    the operations between the products.

    Raises:
      UnknownKernelError: it calls a kernel whose arithmetic is not known.
    """
    counted = count_arithmetic(compiled.as_text())
    if target.platform != "tpu":
        return counted
    reported = compiled.cost_analysis()
    return dataclasses.replace(counted, flops=int(reported["flops"]))
