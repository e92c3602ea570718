"""Check that activations and updates keep their size as a model grows: learning rates carry over.

  moejax coordcheck --config=configs/transfer.py
  moejax coordcheck --config=configs/transfer.py --config.mup.base_width=0 --figure=usual.svg

Models of 5 widths, 3 numbers of experts and 3 of experts per token take a few steps at the recipe's
learning rate. The table has the slope of each size in the logarithms of both; what is flat has one
of 0.25 at most. Logits may shrink before the first step, as they are meant to. See
docs/transfer.md.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import define_config, define_json, read_config_flag, read_file_to_write
from moejax.cli.tables import print_result, print_table
from moejax.compilation_cache import keep_compilation_cache
from moejax.data import prepare
from moejax.inspection.coordinates.check import Line, check_coordinates

log = logging.getLogger("moejax")


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_json(values)
    flags.DEFINE_integer("steps", 4, "between the two measurements", flag_values=values)
    flags.DEFINE_integer("seeds", 2, "over which sizes are averaged, from 0", flag_values=values)
    flags.DEFINE_string("figure", "", "a file to draw, ending in .svg or .png", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Trains the models, and prints and draws what was measured."""
    for flag in ("steps", "seeds"):
        if getattr(values, flag) < 1:
            raise UsageError(f"--{flag}={getattr(values, flag)} must be at least 1")
    path = read_file_to_write(values.figure, "--figure") if values.figure else None
    if path is not None and path.suffix not in (".svg", ".png"):
        raise UsageError(f"--figure={values.figure} must end in .svg or .png")
    config = read_config_flag(values)
    keep_compilation_cache()
    lines = check_coordinates(
        config,
        prepare(config.data),
        num_steps=values.steps,
        num_seeds=values.seeds,
        on_model=lambda axis, size: log.info("%s %d", axis, size),
    )
    _show(values, lines, path)


def _show(values: FlagValues, lines: Sequence[Line], path: Path | None) -> None:
    if path is not None:
        from moejax.inspection.figures.coordinates import draw_coordinates

        draw_coordinates(lines).save(path)
    judged = [line for line in lines if line.is_judged]
    flat = [line for line in judged if line.is_flat]
    found: dict[str, Any] = {"flat": len(flat), "not flat": len(judged) - len(flat)}
    if path is not None:
        found["figure"] = str(path)
    if values.json:
        content = {"lines": [line.to_json() for line in lines], "is_flat": len(flat) == len(judged)}
        print_result(found | content, is_json=True)
        return
    print_table([_row(line) for line in lines], "sizes of activations and of their changes")
    print_result(found, is_json=False)


def _row(line: Line) -> dict[str, Any]:
    slope = "not finite" if math.isnan(line.slope) else f"{line.slope:+.2f}"
    verdict = "flat" if line.is_flat else "not flat"
    return {
        "along": line.axis,
        "what": f"{line.what} of {line.place}",
        "sizes": " ".join(map(str, line.sizes)),
        "root mean squares": " ".join(f"{value:.3g}" for value in line.values),
        "slope": slope,
        "": verdict if line.is_judged else f"{verdict}, not judged",
    }
