"""Train a configuration in a run directory, or continue it from its newest checkpoint.

  moejax train --config=configs/tiny_moe.py --workdir=runs/tiny_moe --config.moe.num_experts=16

SIGINT and SIGTERM save the state and exit 0; the same command continues.
"""

import logging
import sys
from pathlib import Path

from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from moejax.cli.options import define_config, define_json, define_workdir, read_config_flag
from moejax.cli.tables import print_result, summary_rows
from moejax.inspection.build import build_report
from moejax.models.parameters import count_parameters
from moejax.training.loop import train
from moejax.training.signals import StopSignals

log = logging.getLogger("moejax")


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_workdir(values, "the run directory; default runs/NAME-OF-THE-RECIPE")
    define_json(values)
    flags.DEFINE_bool("report", True, "write report.html at the end", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Trains, reports, prints the table."""
    config = read_config_flag(values)
    recipe = Path(config_flags.get_config_filename(values["config"]))
    workdir = Path(values.workdir or f"runs/{recipe.stem}")
    parameters = count_parameters(config)
    log.info("%s: %s parameters, %s active per token", recipe.stem, f"{parameters.total:,}", f"{parameters.active:,}")
    with StopSignals() as stop:
        result = train(config, workdir, command=" ".join(["moejax", *sys.argv[1:]]), stop=stop)
        if result.stopped_by:
            log.info("%s: saved step %d in %s; the same command continues", result.stopped_by, result.step, workdir)
            return
        report = _report(workdir) if values.report else None
    print_result(summary_rows(config, parameters, result, report), is_json=values.json)


def _report(workdir: Path) -> Path | None:
    """The page; a failure is logged and does not hide the figures of a finished run."""
    try:
        return build_report(workdir)
    except Exception as error:  # any part of it: data gone, memory, disk
        log.warning("no report: %s; moejax report --workdir=%s tries again", error, workdir)
        return None
