"""The experts of a layer compiled for a machine one does not have: what it computes, holds and calls there.

The same programs as in `moejax bench layer`, for one device. No time comes out of it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moejax.benchmarks.layer import (
    DENSE,
    DIRECTIONS,
    Shape,
    dense_layer,
    draw,
    implementations_of,
    named_row,
    program_of,
    through,
)
from moejax.kernels.grouped_matmul import resolve_implementation, unavailable
from moejax.planning.hlo.arithmetic import Arithmetic, count_arithmetic
from moejax.planning.targets import Target, TargetError, make_target_mesh


def bench_compiled(
    shape: Shape, implementations: Sequence[str], dtype: str, target: Target
) -> list[dict[str, Any]]:
    """Compiles all of these on one shape, the dense layer among them.

    Args:
      shape: of the layer; its load does not matter.
      implementations: names from `implementations_of`; none: what "auto" stands for there, and
        `ragged_dot`.
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
    with jax.set_mesh(mesh):
        names = dict.fromkeys(implementations or (resolve_implementation("auto"), "ragged"))
        for name in names:
            if name in unavailable():
                raise TargetError(f"{name} cannot run on {target.name}: {unavailable()[name]}")
        arrays = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(mesh, PartitionSpec())
            ),
            jax.eval_shape(lambda: vars(draw(shape, dtype))),
        )
        programs: dict[str, tuple[Any, tuple, tuple]] = {
            DENSE: (dense_layer, (arrays["x_TD"], *arrays["dense_weights"]), ())
        }
        for name in names:
            layer = functools.partial(through, implementations_of(shape)[name])
            inputs = arrays["x_TD"], arrays["weights_TK"], *arrays["expert_weights"]
            programs[name] = layer, inputs, (arrays["experts_TK"],)
        rows = []
        for direction in DIRECTIONS:
            for name, (layer, inputs, choices) in programs.items():
                lowered = jax.jit(program_of(layer, direction)).lower(
                    arrays["dy_TD"], inputs, choices
                )
                rows.append(
                    named_row(shape, name, direction, dtype)
                    | _row(shape, direction, target, lowered)
                )
    return rows


def _row(shape: Shape, direction: str, target: Target, lowered: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("flops", "flops_over_ideal", "temporary_bytes", "kernels", "open_loops")
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"target": target.name, "fits": False} | row
    counted, memory = arithmetic_of(compiled, target), compiled.memory_analysis()
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
    """What a program compiled for a target computes.

    From its text; on TPU from what the compiler says, which counts what lies between the
    products, too.

    Raises:
      UnknownKernelError: it calls a kernel whose arithmetic is not known.
    """
    counted = count_arithmetic(compiled.as_text())
    if target.platform != "tpu":
        return counted
    return Arithmetic(int(compiled.cost_analysis()["flops"]), counted.kernels, counted.open_loops)
