"""Trains the arms of a sweep side by side in one program.

Each arm has a run directory of its own, with the files that `loop.train` writes: metrics, routing,
alarms, evaluations and checkpoints. A run may go on alone or in a pack, whichever it began in.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import jax

from moejax.config import Config, ConfigError
from moejax.training.loop import Loop
from moejax.training.multihost.signals import StopSignals
from moejax.training.packed.arms import Pack
from moejax.training.run import TrainingRun, TrainResult, lock_run, open_run_directory

log = logging.getLogger("moejax")

OnEnd: TypeAlias = Callable[[int, TrainResult], None]


def train_packed(
    configs: Sequence[Config],
    workdirs: Sequence[str | Path],
    *,
    command: str = "",
    stop: StopSignals | None = None,
    devices: Sequence[jax.Device] | None = None,
    on_end: OnEnd | None = None,
) -> list[TrainResult]:
    """Trains arms that differ only in knobs and seeds, side by side in one program.

    They continue from the newest step of which all have a checkpoint; what some have of later steps
    is dropped. Where none has any, they start from the beginning.

    Args:
      configs: of the arms, from `config.resolve`.
      workdirs: of each arm; created if absent; a run of another configuration is refused.
      command: recorded in each `config.json`.
      stop: signals that the caller listens for; by default this call listens for SIGINT and
        SIGTERM.
      devices: to spread the arms over; all by default.
      on_end: called with the index and the result of an arm as soon as it ends before the others:
        they may train on for hours, and be killed.

    Returns:
      How each arm ended. A signal ends all after the step under way, which is saved.

    Raises:
      ConfigError: arms that no single program can train, a run directory of another run, or another
        number of them.
      LockedError: another process writes a run directory.
      DataError: data is missing or damaged.
      CheckpointError: a checkpoint is damaged or does not fit, or arms have some but none of a
        common step.
    """
    if len(configs) != len(workdirs):
        raise ConfigError(f"{len(configs)} arms have {len(workdirs)} workdirs; give one for each")
    pack = Pack(configs, devices)
    with ExitStack() as stack:
        folders = []
        for config, workdir in zip(configs, workdirs, strict=True):
            folders.append(lock_run(config, Path(workdir), stack))
        corpus = open_run_directory(configs[0], folders[0], command)
        for config, folder in zip(configs[1:], folders[1:], strict=True):
            open_run_directory(config, folder, command, corpus)
        stop = stack.enter_context(StopSignals() if stop is None else stop)
        runs = []
        for index, (setup, folder) in enumerate(zip(pack.setups, folders, strict=True)):
            run = TrainingRun(
                setup,
                folder,
                name=f"arm {folder.name}",
                num_arms=len(configs),
                on_error=functools.partial(_report_end, on_end, index, folder),
            )
            stack.enter_context(run.checkpoints)
            runs.append(run)
        return Loop(pack, corpus, runs, stop).run()


def _report_end(on_end: OnEnd | None, index: int, workdir: Path, result: TrainResult) -> None:
    """Logs why an arm ends before the others, and tells the caller."""
    log.warning("%s: %s", workdir, result.error)
    if on_end is not None:
        on_end(index, result)
