"""Trains planned arms, in this process, in a pool of processes, or as jobs: flags and work."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from absl.flags import FlagValues

from moejax.cli import UsageError
from moejax.cli.options import recipe_text
from moejax.cli.printable import printable
from moejax.cli.sweep.search import shown_command
from moejax.sweeps.arms import Plan
from moejax.sweeps.packing import pack_arms
from moejax.sweeps.runners.packs import check_devices, check_open, prepare_devices, work
from moejax.sweeps.runners.pool import Share, run_pool, share_out
from moejax.sweeps.runners.slurm import Jobs, check_jobs, submit
from moejax.sweeps.store.directory import Sweep, write_sweep
from moejax.training.multihost.signals import StopSignals

RUNNERS_OF = {
    "processes": ("pool", "slurm"),
    "gpus": ("pool", "slurm"),
    "minutes": ("slurm",),
    "partition": ("slurm",),
    "account": ("slurm",),
}
"""By flag, the runners to which alone it means something."""

log = logging.getLogger("moejax")


def define_runners(values: FlagValues) -> None:
    """Flags of what trains the arms."""
    flags.DEFINE_integer(
        "pack",
        8,
        "arms that train side by side, at most; 1: none",
        flag_values=values,
    )
    flags.DEFINE_enum("runner", "here", ["here", "pool", "slurm"], "who trains", flag_values=values)
    flags.DEFINE_integer("processes", 2, "--runner=pool: how many; slurm: jobs", flag_values=values)
    flags.DEFINE_integer(
        "gpus",
        0,
        "--runner=pool: GPUs to share out; slurm: of each job; 0: CPU",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "minutes",
        240,
        "--runner=slurm: of a job, which is queued again",
        flag_values=values,
    )
    flags.DEFINE_string("partition", "", "--runner=slurm", flag_values=values)
    flags.DEFINE_string("account", "", "--runner=slurm", flag_values=values)


def check_runners(values: FlagValues) -> None:
    """Raises `UsageError` for a number that cannot be, and for a flag that would change nothing."""
    for flag, least in {"pack": 1, "processes": 1, "gpus": 0}.items():
        number = getattr(values, flag)
        if number < least:
            raise UsageError(f"--{flag}={number} must be at least {least}")
    for flag, runners in RUNNERS_OF.items():
        if values[flag].present and values.runner not in runners:
            raise UsageError(
                f"--{flag}={values[flag].value} goes with --runner={' or '.join(runners)}, not "
                f"{values.runner}; leave one out"
            )


def train_arms(
    values: FlagValues,
    directory: Path,
    plan: Plan,
    *,
    match: str = "",
    on_written: Callable[[Sweep], object] = lambda sweep: None,
) -> bool:
    """Writes what is to run, and trains it or submits it.

    Args:
      values: parsed flags.
      directory: of the sweep.
      plan: all arms.
      match: what arms have in common with the recipe.
      on_written: called once `sweep.json` is written.

    Returns:
      Whether all arms have ended; False after a signal, and of jobs that were submitted.

    Raises:
      SweepError: arms could not be trained.
    """
    # What cannot work is refused before the sweep's directory is written.
    shares: list[Share] = []
    if values.runner == "slurm":
        check_jobs(_jobs(values))
    elif values.runner == "pool":
        shares = share_out(values.processes, values.gpus)
    else:
        prepare_devices(pack_arms(plan.arms, values.pack))
        check_devices(plan.arms)
    sweep = write_sweep(
        directory,
        plan,
        largest_pack=values.pack,
        recipe=recipe_text(values),
        match=match,
        command=own_command(),
    )
    on_written(sweep)
    if values.runner == "slurm":
        _submit(values, sweep)
        return False
    with StopSignals() as stop:
        if values.runner == "pool":
            run_pool(sweep, shares, stop)
        else:
            work(sweep, stop)
        if stop:
            log.info("%s: saved in %s; the same command continues", stop.received, sweep.directory)
            return False
    check_open(sweep)
    return True


def own_command() -> str:
    """Returns the command line of this process as it may be written down."""
    return shown_command(sys.argv[1:])


def _jobs(values: FlagValues) -> Jobs:
    return Jobs(values.processes, values.gpus, 8, values.minutes, values.partition, values.account)


def _submit(values: FlagValues, sweep: Sweep) -> None:
    for job in submit(sweep, _jobs(values)):
        log.info("job %s: logs in %s", job.job_id, job.paths.stdout)
    verb = own_command().split()[1]
    print(f"moejax {verb} report {printable(str(sweep.directory))}  shows what has ended")
