"""A few tokens, as decoding has them: the time beside that of reading the weights of the chosen experts once."""

from typing import Any

import numpy as np

from moejax.benchmarks.layer import Shape, bench_layer, choose
from moejax.benchmarks.timing import Peaks


def bench_decode(
    shape: Shape, implementations: list[str], dtype: str, repetitions: int, peaks: Peaks
) -> list[dict[str, Any]]:
    """Rows of `bench_layer` for the forward pass, with what only the chosen experts' weights would take.

    Args:
      shape: of the layer; few tokens.
      implementations: names from `implementations_of`.
      dtype: of tokens and weights.
      repetitions: of every program, in turn.
      peaks: of this machine.
    """
    active = len(np.unique(choose(shape)))
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    weight_bytes = active * 3 * shape.d_model * shape.d_expert * itemsize
    reading_ms = weight_bytes / peaks.gbytes / 1e6
    rows = bench_layer(shape, implementations, ["forward"], dtype, repetitions, peaks)
    return [
        row
        | {
            "active_experts": active,
            "reading_ms": round(reading_ms, 3),
            "ratio_to_reading": round(row["ms"] / reading_ms, 3),
            "gbytes": round(weight_bytes / row["ms"] / 1e6, 2),
            "fraction_of_peak_gbytes": round(reading_ms / row["ms"], 3),
        }
        for row in rows
        if row["implementation"] != "dense_layer"
    ]
