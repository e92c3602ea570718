"""Times the experts of a layer for a few tokens, as in decoding.

The time is compared with that of reading the weights of the chosen experts once.
"""

from typing import Any

import numpy as np

from moejax.benchmarks.layer import DENSE, Shape, bench_layer, choose
from moejax.benchmarks.timing import Peaks


def bench_decode(
    shape: Shape,
    implementations: list[str],
    dtype: str,
    repetitions: int,
    peaks: Peaks,
) -> list[dict[str, Any]]:
    """Returns rows of `bench_layer` for the forward pass, and their ratio to reading the weights.

    Args:
      shape: of the layer; few tokens.
      implementations: names from `implementations_of`.
      dtype: of tokens and weights.
      repetitions: of every program, in turn.
      peaks: of this machine.
    """
    active_experts = len(np.unique(choose(shape)))
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    weight_bytes = active_experts * 3 * shape.d_model * shape.d_expert * itemsize
    reading_ms = weight_bytes / peaks.gbytes / 1e6
    rows = []
    for row in bench_layer(shape, implementations, ["forward"], dtype, repetitions, peaks):
        if row["implementation"] == DENSE:
            continue
        reading = {
            "active_experts": active_experts,
            "reading_ms": round(reading_ms, 3),
            "ratio_to_reading": round(row["ms"] / reading_ms, 3),
            "gbytes": round(weight_bytes / row["ms"] / 1e6, 2),
            "fraction_of_peak_gbytes": round(reading_ms / row["ms"], 3),
        }
        rows.append(row | reading)
    return rows
