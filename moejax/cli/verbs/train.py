"""Train a configuration in a run directory, or continue it from its newest checkpoint.

  moejax train --config=configs/tiny_moe.py --workdir=runs/tiny_moe --config.moe.num_experts=16
  moejax train --config=runs/a/config.json --init=runs/a:400 --workdir=runs/b

--init=DIR[:STEP] begins with the weights of another run; the section init of the configuration
says what is taken. SIGINT and SIGTERM save the state and exit 0; the same command continues.
Several processes, each with the same command, train one model on all their devices with
--distributed, or with --coordinator, --num_processes and --process_id: docs/pods.md.
"""

import logging
import shlex
import sys
from pathlib import Path

import jax
from absl import flags
from absl.flags import FlagValues

from moejax.cli.init_source import take_init_flag
from moejax.cli.options import (
    define_config,
    define_json,
    define_processes,
    define_workdir,
    distributed_context,
    read_config_flag,
    read_folder_to_write,
    recipe_text,
)
from moejax.cli.recipe import recipe_name
from moejax.cli.tables import print_result, summary_rows
from moejax.compilation_cache import keep_compilation_cache
from moejax.config import ROUTER_RULES, Config, to_dict
from moejax.inspection.report.build import build_report
from moejax.models.parameters import count_parameters
from moejax.moe.expert_parallel.strategy import Strategy, choose_strategy
from moejax.planning.memory import check_memory
from moejax.sharding import EXPERT_AXES, make_mesh
from moejax.training.loop import train
from moejax.training.multihost.processes import agree, has_others, is_first, primary_first
from moejax.training.multihost.signals import StopSignals

log = logging.getLogger("moejax")


def define(values: FlagValues, arguments: list[str]) -> None:
    """Flags of the verb."""
    define_config(values, arguments)
    define_workdir(values, "the run directory; default runs/NAME-OF-THE-RECIPE")
    define_json(values)
    define_processes(values)
    flags.DEFINE_string(
        "init",
        "",
        "begin with the weights of another run, DIR or DIR:STEP; the same as config.init.source",
        flag_values=values,
    )
    flags.DEFINE_bool("report", True, "write report.html at the end", flag_values=values)


def run(values: FlagValues, rest: list[str]) -> None:
    """Trains, reports, prints the table."""
    with distributed_context(values, "train"):
        if not is_first():  # process 0 logs what all would log
            logging.getLogger("moejax").setLevel(logging.WARNING)
        config = primary_first(lambda: _read_config(values))
        agree(to_dict(config), "recipe and flags")
        keep_compilation_cache()
        _train(values, config)


def _read_config(values: FlagValues) -> Config:
    """Returns the resolved configuration, with the source of `--init`."""
    recipe_text(values)  # raises the error where there is none
    take_init_flag(values)
    return read_config_flag(values)


def _train(values: FlagValues, config: Config) -> None:
    check_memory(config)
    name = recipe_name(recipe_text(values))
    workdir = read_folder_to_write(values.workdir or f"runs/{name}", "--workdir")
    parameters = count_parameters(config)
    log.info(
        "%s: %s parameters, %s active per token",
        name,
        f"{parameters.total:,}",
        f"{parameters.active:,}",
    )
    _log_devices(config)
    command = shlex.join(["moejax", *sys.argv[1:]])
    with StopSignals() as stop:
        result = train(config, workdir, command=command, stop=stop)
        if result.stopped_by:
            log.info(
                "%s: saved step %d in %s; the same command continues",
                result.stopped_by,
                result.step,
                workdir,
            )
            return
        report = _report(workdir) if values.report and is_first() else None
    if is_first():
        print_result(summary_rows(config, parameters, result, report), is_json=values.json)


def _log_devices(config: Config) -> None:
    """Logs devices, mesh, and how tokens reach the experts; the kernel is logged where chosen."""
    mesh = make_mesh(config)
    axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    log.info(
        "%d x %s, mesh: %s",
        mesh.size,
        jax.devices()[0].device_kind,
        ", ".join(axes) or "one device",
    )
    slow, fast = (mesh.shape[axis] for axis in EXPERT_AXES)
    if config.num_moe_layers and slow * fast > 1:
        moe = config.moe
        how = Strategy(moe.exchange, moe.exchange_buffer, moe.exchange_chunks)
        top_k = moe.top_k if ROUTER_RULES[moe.router].takes_capacity else 0
        strategy = choose_strategy(how, slow, fast, moe.num_experts, top_k)
        log.info("tokens reach experts by moe.exchange=%s", strategy)


def _report(workdir: Path) -> Path | None:
    """Writes the page; a failure is logged and does not hide the figures of a finished run."""
    if has_others():
        log.info(
            "no report by several processes; moejax report --workdir=%s writes it in one", workdir
        )
        return None
    try:
        return build_report(workdir)
    except Exception as error:  # any part of it can fail: data gone, memory, disk
        log.warning("no report: %s; moejax report --workdir=%s tries again", error, workdir)
        return None
