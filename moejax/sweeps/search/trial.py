"""What a worker of a search does with a point.

It trains the point's arm alone, reports its evaluations, and records it.
"""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from moejax.config import Config, ConfigError, TrainConfig
from moejax.sweeps.arms import Arm, plan_arms
from moejax.sweeps.runners.packs import record_arm
from moejax.sweeps.search.definition import BITS, Axis, Definition
from moejax.sweeps.search.progress import Outcome, Report
from moejax.sweeps.search.worker import Point
from moejax.sweeps.store.directory import (
    ARMS_FOLDER,
    add_arm,
    claimed,
    join_records,
    recorded_id,
)
from moejax.sweeps.store.records import RECORD_FILE, read_record
from moejax.training.evaluation import Evaluation
from moejax.training.health.alarms import AlarmError
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.loop import train
from moejax.training.multihost.signals import StopSignals

LOCK_POLL_S = 0.2
"""Seconds between two attempts to claim an arm that another process still trains."""

log = logging.getLogger("moejax")


def common_fractions(config: Config, axes: Sequence[Axis]) -> tuple[float, ...]:
    """Returns the fractions of the schedule at which every arm of a search is evaluated, ascending.

    Args:
      config: the recipe.
      axes: of the search; its lengths and cadences, if they are axes, are listed values.
    """
    lengths = (config.train.num_steps,)
    cadences = (config.train.eval_every,)
    for axis in axes:
        if axis.key == "train.num_steps":
            lengths = axis.values
        if axis.key == "train.eval_every":
            cadences = axis.values
    fractions = []
    for length, cadence in itertools.product(lengths, cadences):
        train_config = dataclasses.replace(config.train, num_steps=length, eval_every=cadence)
        fractions.append(_evaluated_fractions(train_config))
    return tuple(sorted(set.intersection(*fractions)))


def _evaluated_fractions(config: TrainConfig) -> set[float]:
    """Returns the fractions of the schedule at which a run is evaluated.

    Equal fractions are equal floats, because a quotient is rounded correctly.
    """
    steps = filter(config.is_evaluated, range(1, config.num_steps + 1))
    return {step / config.num_steps for step in steps}


@dataclasses.dataclass
class Trials:
    """The trials of one worker.

    Attributes:
      directory: of the sweep: workers that share it go on with each other's arms.
      definition: of the study.
      command: recorded in each run.
      stop: of the worker; a signal that comes during an arm is handed to it.
      allows: whether a point is in the space; only a process that has the recipe's space can say
        (`Definition.is_filtered`).
    """

    directory: Path
    definition: Definition
    command: str
    stop: StopSignals
    allows: Callable[[Mapping[str, object]], bool] = lambda point: True

    def arm_of(self, point: Point) -> str:
        """Returns the id of a point's arm.

        Raises:
          ConfigError: the space does not allow the point, or the configuration cannot work.
        """
        if not self.allows(point):
            raise ConfigError(f"{point} is not in the space")
        return recorded_id(self.directory, self._arm(point))

    def known(self, arm_id: str) -> Outcome | None:
        """Returns the outcome of an arm that has ended, from its record; None for other arms.

        An arm that another study has pruned has not ended for this one.
        """
        row = read_record(self.directory / ARMS_FOLDER / arm_id)
        if row is None or row["status"] == "pruned":
            return None
        if row["status"] == "done":
            return Outcome("done", loss=row.get(f"final/{self.definition.objective}"))
        # An arm that an alarm stopped has no loss, either.
        return Outcome("failed", error=row.get("error"))

    def run(self, point: Point, arm_id: str, report: Report) -> Outcome:
        """Trains a point's arm, from its newest checkpoint if it has one.

        The arm is recorded unless it was stopped.

        Raises:
          TrialLostError: the trial is another worker's by now.
        """
        recipe = self.definition.recipe
        sweep = add_arm(self.directory, self._arm(point), recipe=recipe, command=self.command)
        arm = sweep.arms[arm_id]
        workdir = sweep.workdir(arm_id)
        with self._claim(arm_id, report) as is_mine:
            if not is_mine:
                return Outcome("stopped")
            # A worker that was taken for dead may have recorded it meanwhile.
            known = self.known(arm_id)
            if known is not None:
                return known
            # The record of a study that pruned it: for this study it has not ended.
            (workdir / RECORD_FILE).unlink(missing_ok=True)
            return self._train(arm, workdir, report)

    @contextlib.contextmanager
    def _claim(self, arm_id: str, report: Report) -> Iterator[bool]:
        """Holds the arm's lock during the block and yields True; False after a stop meanwhile.

        A worker that was taken for dead may still train the arm.
        """
        while not report.should_stop():
            with claimed(self.directory, arm_id) as is_mine:
                if is_mine:
                    yield True
                    return
            time.sleep(LOCK_POLL_S)
        yield False

    def _train(self, arm: Arm, workdir: Path, report: Report) -> Outcome:
        config = arm.config
        num_steps = config.train.num_steps
        stop = StopSignals()  # of this arm
        is_pruned = False

        def on_evaluation(step: int, evaluation: Evaluation) -> None:
            nonlocal is_pruned
            if report(step, step / num_steps, self._objective_value(evaluation)):
                is_pruned = True
                stop.request("PRUNED")
            elif report.should_stop():
                stop.request("STOP")

        try:
            result = train(
                config, workdir, command=self.command, stop=stop, on_evaluation=on_evaluation
            )
        except ConfigError as error:
            log.error("arm %s cannot be trained: %s", arm.id, error)
            return Outcome("failed", error=str(error), is_result=False)
        except (AlarmError, NonFiniteError) as error:
            status = "stopped" if isinstance(error, AlarmError) else "failed"
            return self._record(arm, status, Outcome("failed", error=str(error)), report)
        finally:
            if stop.signal is not None:  # meant for the worker, however the arm ended
                self.stop.request(stop.signal)
            jax.clear_caches()  # programs of other arms may have other shapes
        if is_pruned and result.step < num_steps:
            return self._record(arm, "pruned", Outcome("pruned"), report)
        if result.evaluation is None:
            return Outcome("stopped")
        loss = self._objective_value(result.evaluation)
        return self._record(arm, "done", Outcome("done", loss=loss), report)

    def _objective_value(self, evaluation: Evaluation) -> float:
        """Returns what the study minimises."""
        return evaluation.bits_per_byte if self.definition.objective == BITS else evaluation.loss

    def _arm(self, point: Point) -> Arm:
        return plan_arms(self.definition.base, [point]).arms[0]

    def _record(self, arm: Arm, status: str, outcome: Outcome, report: Report) -> Outcome:
        report.check()  # another worker that has the trial writes its record
        record_arm(self.directory / ARMS_FOLDER / arm.id, arm, status, outcome.error, packed=1)
        join_records(self.directory)
        return outcome
