"""Times train steps by optimizer, against those of AdamW."""

import dataclasses
import typing
from typing import Any

import jax

from moejax.benchmarks.step import Step
from moejax.benchmarks.timing import interleave
from moejax.config import Config, OptimizerConfig

NAMES: tuple[str, ...] = typing.get_args(typing.get_type_hints(OptimizerConfig)["name"])


def bench_optimizers(config: Config, repetitions: int) -> dict[str, Any]:
    """Times train steps, on random tokens, of a config with each optimizer."""
    steps = {}
    for name in NAMES:
        leaves: dict[str, Any] = {"name": name}
        optimizer = dataclasses.replace(config.optimizer, **leaves)
        steps[name] = Step(dataclasses.replace(config, optimizer=optimizer))
    times = interleave(steps, repetitions)
    adamw_ms = times["adamw"].median_ms
    ratios = {}
    milliseconds = {}
    for name in NAMES:
        ratios[f"ratio_{name}"] = round(times[name].median_ms / adamw_ms, 3)
        milliseconds[f"{name}_ms"] = round(times[name].median_ms, 2)
    return {
        **ratios,
        **milliseconds,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }
