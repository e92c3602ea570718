"""Evaluate a checkpoint under changed routing, and write counterfactuals.json in the run directory.

  moejax counterfactuals --workdir=runs/tiny_moe --rows=64 --kinds=top_k,ablate

The same validation rows are evaluated as trained and under each change, on one device. Kinds: other
numbers of experts per token (top_k), capacity factors (capacity), no selection bias (bias_off),
without each expert of each layer in turn (ablate), two experts with each other's weights (swap) or
the mean of them (merge), experts at random (random), and all experts alike (uniform). A change
within two standard errors of 0 may be noise. Of ablations the table shows the mean and the extremes
of each layer; the file, --json and --csv have all.
"""

import csv
import dataclasses
from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli.options import (
    define_json,
    define_text,
    define_workdir,
    read_file_to_write,
    read_text_places,
    read_workdir_to_write,
    refuse_several_processes,
)
from moejax.cli.tables import print_counterfactuals
from moejax.inspection.counterfactuals.evaluate import counterfactuals
from moejax.inspection.counterfactuals.plan import KINDS
from moejax.inspection.counterfactuals.result import FILE_NAME, Counterfactuals, Outcome
from moejax.strict_json import to_json


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_text(values)
    define_json(values)
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)
    flags.DEFINE_integer(
        "rows",
        None,
        "validation rows, spread over the split; default all",
        flag_values=values,
    )
    flags.DEFINE_list("kinds", list(KINDS), "kinds of change", flag_values=values)
    flags.DEFINE_string("csv", "", "also write all outcomes to this file", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Evaluates, writes the file and prints the outcomes."""
    refuse_several_processes("counterfactuals")
    workdir = read_workdir_to_write(values)
    csv_file = read_file_to_write(values.csv, "--csv") if values.csv else None
    result = counterfactuals(
        workdir,
        step=values.step,
        max_rows=values.rows,
        kinds=values.kinds,
        places=read_text_places(values),
    )
    result.save(workdir / FILE_NAME)
    if csv_file:
        _write_csv(csv_file, result)
    if values.json:
        print(to_json(result.to_dict(), indent=1))
        return
    print_counterfactuals(result)


def _write_csv(path: Path, result: Counterfactuals) -> None:
    names = [field.name for field in dataclasses.fields(Outcome)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for outcome in result.rows:
            values = [getattr(outcome, name) for name in names]
            writer.writerow(map(_cell, values))


def _cell(value: object) -> object:
    """Returns a value of an outcome; the numbers of a tuple are joined by spaces."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
