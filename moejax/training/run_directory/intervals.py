"""A logging interval that a stop has cut: its steps go into the checkpoint, and a continued run begins with them.

So an interrupted run writes the lines, and raises the alarms, of one that was not.
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
    """The output of a step, and the seconds that the step took."""

    output: StepOutput
    seconds: float


def pack_steps(steps: Sequence[TimedOutput]) -> dict[str, Any]:
    """The steps as JSON, exactly."""
    rows = [_flatten(jax.device_get(step.output)) for step in steps]
    columns = {
        name: _to_json(np.stack([row[name] for row in rows])) for name in (rows[0] if rows else {})
    }
    return {"seconds": [step.seconds for step in steps], "arrays": columns}


def unpack_steps(packed: Mapping[str, Any]) -> list[TimedOutput]:
    """The steps that `pack_steps` has packed.

    Raises:
      ValueError: they were packed by another version.
    """
    try:
        columns = {name: _from_json(column) for name, column in packed["arrays"].items()}
        rows = [
            {name: np.asarray(column[i]) for name, column in columns.items()}
            for i in range(len(packed["seconds"]))
        ]
        return [
            TimedOutput(_unflatten(row), float(s))
            for row, s in zip(rows, packed["seconds"], strict=True)
        ]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"no steps of a logging interval ({type(error).__name__}: {error})"
        ) from error


def _flatten(output: StepOutput) -> dict[str, np.ndarray]:
    """Arrays by the part of the output and their names in it."""
    arrays = {
        f"{part}.{name}": np.asarray(x)
        for part in PARTS
        for name, x in getattr(output, part).items()
    }
    if output.routing is not None:
        fields = {
            field.name: getattr(output.routing, field.name)
            for field in dataclasses.fields(RoutingStats)
        }
        arrays |= {f"routing.{name}": np.asarray(x) for name, x in fields.items() if x is not None}
    return arrays


def _unflatten(arrays: Mapping[str, np.ndarray]) -> StepOutput:
    parts: dict[str, dict[str, jax.Array]] = {part: {} for part in (*PARTS, "routing")}
    for key, array in arrays.items():
        part, name = key.split(".", 1)
        parts[part][name] = jnp.asarray(array)
    routing = parts.pop("routing")
    return StepOutput(routing=RoutingStats(**routing) if routing else None, **parts)


def _to_json(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": data}


def _from_json(column: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(column["data"]), column["dtype"]).reshape(column["shape"])
