"""Which sizes of tiles are fastest for a shape, and the table that keeps what was found."""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax

from moejax.benchmarks.layer import Program, Shape, draw, through
from moejax.benchmarks.timing import Times, interleave
from moejax.kernels.tiles import guess_sizes, problem, read_table
from moejax.moe.dispatch.on_device import run_dropless


def candidates(num_rows: int, num_groups: int) -> list[tuple[int, ...]]:
    """Sizes worth a try, those of the guess first: coarser and finer steps, smaller and larger tiles."""
    mean = max(8, num_rows // num_groups // 8 * 8)
    tried = [
        guess_sizes(num_rows, num_groups),
        (64, 128, 192, 256),
        (128, 256, 384, 512),
        tuple(sorted({max(8, mean // 4), max(8, mean // 2), mean, mean * 5 // 32 * 8, 2 * mean})),
        tuple(sorted({max(8, mean * i // 64 * 8) for i in (4, 6, 7, 8, 9, 10)})),
    ]
    return list(dict.fromkeys(tried))


def bench_tune(shape: Shape, dtype: str, repetitions: int) -> tuple[list[dict[str, Any]], tuple[int, ...] | None]:
    """Times every candidate, forward and backward together.

    Args:
      shape: of the layer.
      dtype: of tokens and weights.
      repetitions: of every candidate, in turn.

    Returns:
      A row for each candidate, and the fastest if it is not the guess and its upper quartile is below the guess's lower
      one: what could be noise is not kept.
    """
    arrays, num_rows = draw(shape, dtype), shape.tokens * shape.top_k
    inputs = arrays.x_TD, arrays.weights_TK, *arrays.expert_weights
    programs = {}
    for sizes in candidates(num_rows, shape.num_experts):
        layer = functools.partial(through, functools.partial(run_dropless, implementation="tiled", sizes=sizes))
        programs[sizes] = Program.compile(layer, "forward_backward", arrays.dy_TD, inputs, (arrays.experts_TK,))
    logging.getLogger("moejax").info("tuning %s: %d sets of sizes", shape, len(programs))
    times = interleave({" ".join(map(str, sizes)): program for sizes, program in programs.items()}, repetitions)
    rows = [
        {"shape": str(shape), "sizes": name, "ms": round(t.median_ms, 3), "ratio_to_guess": _ratio(t, times)}
        for name, t in times.items()
    ]
    return rows, _better_than_the_first(times)


def _ratio(t: Times, times: dict[str, Times]) -> float:
    return round(t.median_ms / next(iter(times.values())).median_ms, 3)


def _better_than_the_first(times: dict[str, Times]) -> tuple[int, ...] | None:
    guess, *_ = times
    best = min(times, key=lambda name: times[name].median_ms)
    is_clear = times[best].quartiles_ms[1] < times[guess].quartiles_ms[0]
    return tuple(map(int, best.split())) if best != guess and is_clear else None


def update_table(path: Path, shape: Shape, sizes: tuple[int, ...] | None) -> None:
    """Enters `sizes` for the shape on this platform, or removes what stands there."""
    table = {platform: dict(entries) for platform, entries in read_table(path).items()}
    entries = table.setdefault(jax.default_backend(), {})
    name = problem(shape.tokens * shape.top_k, shape.num_experts, shape.d_model, shape.d_expert)
    entries.pop(name, None)
    if sizes:
        entries[name] = sizes
    text = json.dumps({platform: entries for platform, entries in sorted(table.items()) if entries}, indent=2)
    complete = path.with_suffix(".incomplete")
    complete.write_text(text + "\n", encoding="utf-8")
    complete.replace(path)
    read_table.cache_clear()
