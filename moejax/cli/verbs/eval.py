"""Evaluate a run's checkpoint on the validation split, on all devices.

Nothing but the run directory is needed. A released model is evaluated on the validation split of
the speeches, or of --data.files.

moejax eval --workdir=runs/tiny_moe --step=500
moejax eval --workdir=runs/tiny_moe --average=moving
moejax eval --workdir=runs/tiny_moe --mesh=expert=4 --replicas=1
moejax eval --hf=mixtral-8x7b --data.files="texts/*.txt" --seq_len=4096
"""

from typing import Any

from absl import flags
from absl.flags import FlagValues

from moejax.cli.errors import UsageError
from moejax.cli.options import (
    define_average,
    define_hf,
    define_json,
    define_mesh,
    define_text,
    define_workdir,
    parse_mesh,
    read_hf,
    read_text_places,
    read_workdir,
    refuse_several_processes,
)
from moejax.cli.tables import evaluation_rows, print_result
from moejax.compilation_cache import keep_compilation_cache
from moejax.inference.evaluate import evaluate_run
from moejax.interop.hf.released import evaluate_released


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_hf(values)
    define_text(values)
    define_json(values)
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)
    define_average(values)
    define_mesh(values, "devices by axis instead of all for data")
    flags.DEFINE_integer(
        "replicas",
        None,
        "place experts by the load of the newest evaluation, with that many replicas of the most "
        "loaded ones on each device; default: experts in order, without replicas",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "seq_len",
        None,
        "with --hf: tokens of a row; default 1024",
        lower_bound=1,
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Evaluates and prints the figures."""
    refuse_several_processes("eval")
    keep_compilation_cache()
    folder = read_hf(values)
    mesh = parse_mesh(values.mesh) if values.mesh else None
    places = read_text_places(values)
    rows: dict[str, Any] = {}
    if folder is None:
        _refuse(values, "--hf", ("seq_len",))
        config, step, evaluation = evaluate_run(
            read_workdir(values),
            values.step,
            mesh,
            values.replicas,
            places=places,
            average=values.average,
        )
        rows["step"] = step
    else:
        _refuse(values, "--workdir", ("step", "replicas", "average", "data.source_dir"))
        config, evaluation = evaluate_released(folder, mesh, places=places, seq_len=values.seq_len)
    rows["tokens"] = evaluation.num_targets
    rows |= evaluation_rows(config, evaluation)
    print_result(rows, is_json=values.json)


def _refuse(values: FlagValues, needed: str, names: tuple[str, ...]) -> None:
    """Raises `UsageError` for a flag that only goes with another one."""
    for name in names:
        value = values[name].value
        if value is not None and value != "":
            raise UsageError(f"--{name}={value} goes with {needed} only; leave it out")
