"""A logging interval that a stop has cut short.

Its steps go into the checkpoint, and a continued run begins with them. So an interrupted run writes
the lines, and raises the alarms, of one that was not interrupted.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.moe.balancing.stats import RoutingStats
from moejax.training.step import StepOutput

PARTS = ("scalars", "layers", "state")


class TimedOutput(NamedTuple):
    """The output of a step, and how long the step took."""

    output: StepOutput
    seconds: float


def pack_steps(steps: Sequence[TimedOutput]) -> dict[str, Any]:
    """Returns the steps as JSON, from which `unpack_steps` makes the same bits."""
    rows = [_flatten(jax.device_get(step.output)) for step in steps]
    columns = {}
    for name in rows[0] if rows else ():
        arrays = [row[name] for row in rows]
        columns[name] = _to_json(np.stack(arrays))
    seconds = [step.seconds for step in steps]
    return {"seconds": seconds, "arrays": columns}


def unpack_steps(packed: Mapping[str, Any]) -> list[TimedOutput]:
    """Returns the steps that `pack_steps` has packed.

    Raises:
      ValueError: they were packed by another version.
    """
    try:
        columns = {name: _from_json(column) for name, column in packed["arrays"].items()}
        steps = []
        for i, seconds in enumerate(packed["seconds"]):
            row = {name: np.asarray(column[i]) for name, column in columns.items()}
            steps.append(TimedOutput(_unflatten(row), float(seconds)))
        return steps
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"no steps of a logging interval ({type(error).__name__}: {error})"
        ) from error


def _flatten(output: StepOutput) -> dict[str, np.ndarray]:
    """Returns arrays by the part of the output and their names in it: `scalars.loss/lm`."""
    arrays = {}
    for part in PARTS:
        for name, array in getattr(output, part).items():
            arrays[f"{part}.{name}"] = np.asarray(array)
    if output.routing is not None:
        for field in dataclasses.fields(RoutingStats):
            array = getattr(output.routing, field.name)
            if array is not None:
                arrays[f"routing.{field.name}"] = np.asarray(array)
    return arrays


def _unflatten(arrays: Mapping[str, np.ndarray]) -> StepOutput:
    """Makes an output of the arrays that `_flatten` gave."""
    parts = {part: _of_part(arrays, part) for part in PARTS}
    fields = _of_part(arrays, "routing")
    routing = RoutingStats(**fields) if fields else None
    return StepOutput(routing=routing, **parts)


def _of_part(arrays: Mapping[str, np.ndarray], part: str) -> dict[str, jax.Array]:
    """Returns the arrays of one part of an output, by their names in it."""
    prefix = f"{part}."
    found = {}
    for key, array in arrays.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            found[name] = jnp.asarray(array)
    return found


def _to_json(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _from_json(column: Mapping[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(column["data"]), column["dtype"])
    return flat.reshape(column["shape"])
