"""Evaluate a run's checkpoint on the validation split, on all devices.

Nothing but the run directory is needed.

moejax eval --workdir=runs/tiny_moe --step=500
moejax eval --workdir=runs/tiny_moe --mesh=expert=4 --replicas=1
"""

from absl import flags
from absl.flags import FlagValues

from moejax.cli.options import (
    define_json,
    define_mesh,
    define_text,
    define_workdir,
    parse_mesh,
    read_text_places,
    read_workdir,
    refuse_several_processes,
)
from moejax.cli.tables import evaluation_rows, print_result
from moejax.compilation_cache import keep_compilation_cache
from moejax.inference.evaluate import evaluate_run


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_text(values)
    define_json(values)
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)
    define_mesh(values, "devices by axis instead of all for data")
    flags.DEFINE_integer(
        "replicas",
        None,
        "place experts by the load of the newest evaluation, with that many replicas of the most "
        "loaded ones on each device; default: experts in order, without replicas",
        flag_values=values,
    )


def run(values: FlagValues, rest: list[str]) -> None:
    """Evaluates and prints the figures."""
    refuse_several_processes("eval")
    keep_compilation_cache()
    config, step, evaluation = evaluate_run(
        read_workdir(values),
        values.step,
        parse_mesh(values.mesh) if values.mesh else None,
        values.replicas,
        places=read_text_places(values),
    )
    rows = {"step": step, "tokens": evaluation.num_targets}
    rows |= evaluation_rows(config, evaluation)
    print_result(rows, is_json=values.json)
