"""Evaluate a run's checkpoint on the validation split, on all devices, from the run directory alone.

moejax eval --workdir=runs/tiny_moe --step=500
"""

from absl import flags
from absl.flags import FlagValues

from moejax.cli.options import define_json, define_workdir, read_workdir, refuse_several_processes
from moejax.cli.tables import evaluation_rows, print_result
from moejax.inference.evaluate import evaluate_run


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_workdir(values)
    define_json(values)
    flags.DEFINE_integer("step", None, "a saved step; default the newest", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Evaluates and prints the figures."""
    refuse_several_processes("eval")
    config, step, evaluation = evaluate_run(read_workdir(values), values.step)
    rows = {"step": step, "tokens": evaluation.num_targets, **evaluation_rows(config, evaluation)}
    print_result(rows, is_json=values.json)
