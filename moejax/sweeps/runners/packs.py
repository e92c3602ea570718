"""Training a sweep's packs, in this process, in one of a pool, or in a job of a cluster.

`work` goes through the packs, takes those that no process holds, and returns when all arms have
ended. A process that dies leaves its pack to the others, which continue it from its newest
checkpoint.
"""

import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pandas as pd

from moejax.compilation_cache import keep_compilation_cache
from moejax.locks import check_held
from moejax.planning.memory import check_memory
from moejax.sharding import make_mesh
from moejax.sweeps.arms import Arm, Recipe, SweepError, describe, plan_arms
from moejax.sweeps.matching import Match
from moejax.sweeps.packing import Ids
from moejax.sweeps.runners.pool import usable_cores
from moejax.sweeps.store.directory import CLAIMS_FOLDER, Sweep, join_records, write_sweep
from moejax.sweeps.store.record_files import RecordError
from moejax.sweeps.store.records import read_records, record_of, write_record
from moejax.training.checkpoints.meta import saved_steps
from moejax.training.health.alarms import AlarmError
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.health.speed import ARMS, SPEED
from moejax.training.loop import train
from moejax.training.multihost.signals import StopSignals
from moejax.training.packed.arms import devices_of_arm
from moejax.training.packed.train import train_packed
from moejax.training.run import TrainResult
from moejax.training.run_directory.reader import RunDirectory

WAIT_S = 1.0
"""Seconds between two attempts to take packs that other processes hold."""

log = logging.getLogger("moejax")


def prepare_devices(packs: Sequence[Ids]) -> None:
    """Sets the options of jax for a process that trains packs, before anything is computed.

    On CPU each core is a device, so that the arms of a pack are divided among the cores.
    """
    if any(len(pack) > 1 for pack in packs):
        jax.config.update("jax_num_cpu_devices", len(usable_cores()))
    keep_compilation_cache()


def check_devices(arms: Iterable[Arm]) -> None:
    """Raises `ConfigError` naming the first arm that does not fit the devices or their memory.

    Called before any arm trains.
    """
    for arm in arms:
        devices = jax.devices()
        try:
            own = devices[: devices_of_arm(arm.config)] if _is_cpu() else devices
            make_mesh(arm.config, own)
            check_memory(arm.config, own)
        except ValueError as error:
            raise type(error)(f"arm {arm.id} ({describe(arm.overrides)}): {error}") from error


def work(sweep: Sweep, stop: StopSignals) -> bool:
    """Trains packs until all arms have ended.

    Args:
      sweep: planned.
      stop: ends the work; the pack that is being trained is saved.

    Returns:
      Whether all arms have ended; False after a stop, and if some could not be trained, which
      the log says.
    """
    failed: set[int] = set()
    while not stop:
        open_packs = []
        for index, ids in enumerate(sweep.packs):
            if index not in failed and sweep.open_arms(ids):
                open_packs.append(index)
        if not open_packs:
            break
        is_idle = True
        for index in open_packs:
            with sweep.claim(sweep.packs[index]) as is_mine:
                if is_mine and not stop:
                    is_idle = False
                    if not _try_pack(sweep, index, stop):
                        failed.add(index)
        if is_idle:
            time.sleep(WAIT_S)
    return not sweep.open_arms()


def _try_pack(sweep: Sweep, index: int, stop: StopSignals) -> bool:
    """Trains a pack and returns whether that succeeded.

    A failure is no result of the arms: they get no record, and other packs go on.
    """
    ids = sweep.packs[index]
    try:
        train_pack(sweep, ids, stop)
    except Exception as error:  # whatever it is, it must not end the other packs
        # A ValueError says all in one line, with the remedy.
        has_traceback = not isinstance(error, ValueError)
        log.error("pack %d (%s) failed: %s", index, " ".join(ids), error, exc_info=has_traceback)
        return False
    finally:
        jax.clear_caches()  # programs of other packs have other shapes
    return True


def train_pack(sweep: Sweep, ids: Sequence[str], stop: StopSignals) -> None:
    """Trains those of the given arms that have not ended, and records them.

    They train together as far as their checkpoints allow.
    """
    for arms in together(sweep, sweep.open_arms(ids)):
        if stop:
            return
        num_ended = sum(sweep.has_ended(arm_id) for arm_id in sweep.arms)
        names = " ".join(arm.id for arm in arms)
        log.info("%d of %d arms have ended; training %s", num_ended, len(sweep.arms), names)
        results = _train_arms(sweep, arms, stop)
        done = []
        for arm, result in zip(arms, results, strict=True):
            if result.stopped_by is None and result.error is None:
                done.append(arm)
        _record_all(sweep, done, packed=len(arms))
    join_records(sweep.directory)


def _record_all(sweep: Sweep, arms: Sequence[Arm], packed: int) -> None:
    """Records arms that were trained together.

    If the files of one are damaged, the others are recorded before the error is raised.
    """
    damages = []
    for arm in arms:
        try:
            _record(sweep, arm, None, packed)
        except RecordError as damage:
            damages.append(f"arm {arm.id} is trained to its end and has no record: {damage}")
    if damages:
        join_records(sweep.directory)
        raise RecordError("; ".join(damages))


def together(sweep: Sweep, arms: Sequence[Arm]) -> list[list[Arm]]:
    """Groups arms that continue from one step.

    All arms continue together if none has a checkpoint, or if all have one of the step that the
    slowest has reached, as where a pack was killed while it saved. Arms that were in different
    packs would lose more than the steps between two saves: they are grouped by their newest step.
    An arm that was trained to its end, and killed before its record was written, is alone: it is
    not trained again with others.
    """
    steps = {arm.id: saved_steps(sweep.workdir(arm.id)) for arm in arms}
    newest = {arm_id: max(saved, default=0) for arm_id, saved in steps.items()}
    groups: list[list[Arm]] = []
    others = []
    for arm in arms:
        if newest[arm.id] >= arm.config.train.num_steps:
            groups.append([arm])
        else:
            others.append(arm)
    if not others:
        return groups
    if _can_continue_together([steps[arm.id] for arm in others]):
        return [*groups, others]
    by_step: dict[int, list[Arm]] = {}
    for arm in others:
        same = by_step.setdefault(newest[arm.id], [])
        same.append(arm)
    return [*groups, *by_step.values()]


def _can_continue_together(steps_of_arms: Sequence[Sequence[int]]) -> bool:
    """Whether no arm has a checkpoint, or all have one of the step that the slowest has reached."""
    if not any(steps_of_arms):
        return True
    newest = [max(saved, default=0) for saved in steps_of_arms]
    slowest = min(newest)
    return all(slowest in saved for saved in steps_of_arms)


def _train_arms(sweep: Sweep, arms: Sequence[Arm], stop: StopSignals) -> list[TrainResult]:
    """Trains arms together, or one alone on all devices.

    Those that cannot go on are recorded when they end.
    """
    workdirs = [sweep.workdir(arm.id) for arm in arms]

    def on_end(index: int, result: TrainResult) -> None:
        _record(sweep, arms[index], result.error, packed=len(arms))

    if len(arms) > 1 or _is_cpu():
        configs = [arm.config for arm in arms]
        return train_packed(configs, workdirs, command=sweep.command, stop=stop, on_end=on_end)
    try:
        return [train(arms[0].config, workdirs[0], command=sweep.command, stop=stop)]
    except (AlarmError, NonFiniteError) as error:
        ended = TrainResult(0, None, None, error=error)
        on_end(0, ended)
        return [ended]


def _is_cpu() -> bool:
    return jax.devices()[0].platform == "cpu"


def _record(sweep: Sweep, arm: Arm, error: AlarmError | NonFiniteError | None, packed: int) -> None:
    status = {type(None): "done", AlarmError: "stopped", NonFiniteError: "failed"}[type(error)]
    record_arm(sweep.workdir(arm.id), arm, status, None if error is None else str(error), packed)
    log.info("arm %s: %s", arm.id, status)


def record_arm(workdir: Path, arm: Arm, status: str, error: str | None, packed: int) -> None:
    """Writes the record of an arm, which says that it has ended.

    Args:
      workdir: of the arm.
      arm: which arm.
      status: see `record_of`.
      error: see `record_of`.
      packed: arms in its pack, if the arm ended before it logged their number.

    Raises:
      LockedError: another process has taken over the arm, and writes its record.
    """
    check_held(workdir.parents[1] / CLAIMS_FOLDER / arm.id)
    seconds = training_seconds(workdir)
    row = record_of(
        workdir,
        arm.to_json(),
        status=status,
        error=error,
        wall_s=seconds.wall_s if seconds else None,
        step_s=seconds.step_s if seconds else None,
        packed=seconds.arms if seconds else packed,
    )
    write_record(workdir, row)


class Seconds(NamedTuple):
    """The seconds that an arm's training took: its share of those of its packs.

    Attributes:
      wall_s: of all steps.
      step_s: of a step, the median.
      arms: the number of arms in its last pack.
    """

    wall_s: float
    step_s: float
    arms: int


def training_seconds(workdir: Path) -> Seconds | None:
    """Returns the seconds of an arm's training; None if its log has no interval to count.

    They follow from what each logging interval says about its tokens, their rate and the number of
    arms in the pack. Lines that are damaged or cut off, and intervals in which nothing was
    predicted, say nothing about time.
    """
    run = RunDirectory(workdir)
    if not run.metrics.is_file():
        return None
    wall_s, arms = 0.0, 1
    step_seconds = []
    last_tokens, last_step = 0.0, 0
    for line in run.metric_lines():
        values = line.values
        if values is None or values["step"] <= last_step:
            continue
        tokens = _number(values, "tokens")
        rate = _number(values, SPEED)
        if tokens is None or rate is None:
            continue
        if tokens > last_tokens and rate > 0:
            arms = _num_arms(values)
            seconds = (tokens - last_tokens) / rate / arms
            num_steps = values["step"] - last_step
            step_seconds.append(seconds / num_steps)
            wall_s += seconds
        last_tokens, last_step = tokens, values["step"]
    if not step_seconds:
        return None
    return Seconds(wall_s, statistics.median(step_seconds), arms)


def _num_arms(line: Mapping[str, Any]) -> int:
    """Returns the number of arms in the pack that a line logs; 1 where it has none."""
    arms = line.get(ARMS)
    return arms if type(arms) is int and arms > 0 else 1


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value)


def check_open(sweep: Sweep) -> None:
    """Raises `SweepError` if arms have not ended."""
    left = sweep.open_arms()
    if left:
        raise SweepError(
            f"{len(left)} of {len(sweep.arms)} arms have not ended ({left[0].id} ...): "
            "the log says why; the same command tries them again"
        )


def run_sweep(
    base: Recipe,
    points: Iterable[Mapping[str, Any]],
    directory: str | Path,
    *,
    largest_pack: int = 8,
    match: Match = "",
) -> pd.DataFrame:
    """Plans and trains a sweep in this process, as `moejax sweep` does: for notebooks.

    A sweep that was begun is continued.

    Args:
      base: the recipe: sections of leaves.
      points: what arms override.
      directory: of the sweep.
      largest_pack: the number of arms that train together, at most.
      match: see `plan_arms`.

    Returns:
      The records, see `read_records`.

    Raises:
      SweepError: a point that cannot work, another sweep in the directory, or arms that could
        not be trained.
    """
    plan = plan_arms(base, points, match=match)
    check_devices(plan.arms)
    sweep = write_sweep(
        directory, plan, largest_pack=largest_pack, recipe="", match=match, command="run_sweep"
    )
    with StopSignals() as stop:
        work(sweep, stop)
    join_records(sweep.directory)
    check_open(sweep)
    return read_records(directory)
