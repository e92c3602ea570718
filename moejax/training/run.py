"""A run while it trains: its directory, its files, and how it ended."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import jax

from moejax.config import Config, check_vocabulary
from moejax.data import Corpus, prepare
from moejax.locks import FolderLock
from moejax.models.parameters import count_parameters
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.evaluation import Evaluation
from moejax.training.forking.fork import Beginning, beginning_of, fork_state, lineage_of
from moejax.training.health.alarms import AlarmError
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.health.speed import median_speed
from moejax.training.kept_tokenizer import kept_tokenizer
from moejax.training.multihost.processes import broadcast_from_primary, is_first
from moejax.training.run_directory.changes import log_changes
from moejax.training.run_directory.files import RunFiles
from moejax.training.run_directory.layout import (
    check_not_converted,
    check_run_directory,
    warn_of_lost_checkpoints,
    write_run_directory,
)
from moejax.training.run_directory.metrics import Recorder
from moejax.training.state import TrainSetup, TrainState
from moejax.training.step import StepOutput

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How training a run ended.

    Attributes:
      step: steps done.
      stopped_by: the signal that ended it early, or None.
      evaluation: of the final state; None if it ended early.
      tokens_per_s: median over logging intervals; None if this call completed no interval, and in
        processes other than the first.
      error: why the run could not go on, or None.
    """

    step: int
    stopped_by: str | None
    evaluation: Evaluation | None
    tokens_per_s: float | None = None
    error: AlarmError | NonFiniteError | None = None


OnEvaluation: TypeAlias = Callable[[int, Evaluation], None]
OnError: TypeAlias = Callable[[TrainResult], None]


class TrainingRun:
    """One of the runs of a program.

    Args:
      setup: the run's fixed part.
      workdir: the run directory, which this process has locked.
      name: of the run, in the log; "" where there is only one.
      num_arms: among which the time of a step is shared out.
      on_evaluation: called with the step and its evaluation after each, in every process.
      on_error: called with the result as soon as the run cannot go on: others of the program may
        train on for hours, and be killed.

    Attributes:
      checkpoints: of the run.
      evaluation: of the newest state; None if it was not evaluated.
      error: why the run cannot go on, or None.
      step: the newest step that was saved, or given up.
    """

    files: RunFiles  # once the first state is known

    def __init__(
        self,
        setup: TrainSetup,
        workdir: Path,
        *,
        name: str = "",
        num_arms: int = 1,
        on_evaluation: OnEvaluation | None = None,
        on_error: OnError | None = None,
    ):
        self.setup = setup
        self.config = setup.config
        self.seed = setup.config.train.seed
        self.workdir = workdir
        self.name = name
        self.num_arms = num_arms
        self.checkpoints = Checkpoints(workdir, setup)
        self.evaluation: Evaluation | None = None
        self.error: AlarmError | NonFiniteError | None = None
        self.step = 0
        self._on_evaluation = on_evaluation
        self._on_error = on_error

    @property
    def recorder(self) -> Recorder:
        """Takes the outputs of steps."""
        return self.files.recorder

    def restore(self, step: int) -> TrainState:
        """Returns the state of a step, as it is alone on the devices of `setup`."""
        with jax.set_mesh(self.setup.mesh):
            # Weights that were converted are a checkpoint of step 0.
            is_saved = step in self.checkpoints.steps()
            state = self.checkpoints.restore(step) if is_saved else None
            if state is None:
                check_not_converted(self.workdir)
                warn_of_lost_checkpoints(self.workdir)
                if self.config.init.source:
                    return fork_state(self.setup, self.seed, self.workdir)
                return self.setup.init(self.seed)
        if step:  # a run that begins with weights of others continues none
            log_changes(self.checkpoints.config(step), self.config, step)
        return state

    def beginning(self) -> Beginning:
        """Returns how far the run is when it begins."""
        return beginning_of(self.config, self.workdir)

    def open(self, start_step: int) -> RunFiles:
        """Opens its files, and drops what they and the checkpoints hold of later steps."""
        self.checkpoints.drop_after(start_step)
        self.step = start_step
        notes: dict[str, Any] = {}
        if start_step in self.checkpoints.steps():
            notes = self.checkpoints.notes(start_step) if start_step else {}
        elif start_step:
            notes = {"tokens": self.beginning().num_tokens}
        self.files = RunFiles(
            self.workdir,
            self.config,
            self.checkpoints,
            start_step,
            notes,
            name=self.name,
            num_arms=self.num_arms,
        )
        return self.files

    def add(self, output: StepOutput) -> None:
        """Takes the output of a step, and waits until it is done."""
        finished = self.recorder.add(output)
        self.evaluation = None
        if finished.step % self.config.train.log_every == 0:
            self.recorder.end_interval()

    def is_evaluated(self) -> bool:
        """Whether an evaluation of the first state is written; every process must call this."""
        return _is_true_for_first(self.files.is_evaluated)

    def is_alarmed(self) -> bool:
        """Whether an alarm is to stop the run; every process must call this."""
        return _is_true_for_first(bool(self.recorder.stopping))

    def take_evaluation(self, step: int, evaluation: Evaluation, *, is_noted: bool) -> None:
        """Takes the evaluation of the newest state, and writes it if it is to be noted."""
        self.evaluation = evaluation
        if is_noted:
            self.files.note(step, evaluation)
        log.info(
            "%sstep %d: validation loss %.4f, %.4f bits per byte",
            f"{self.name}, " if self.name else "",
            step,
            evaluation.loss,
            evaluation.bits_per_byte,
        )
        if self._on_evaluation:
            self._on_evaluation(step, evaluation)

    def save(self, state: TrainState) -> None:
        """Starts to save the state, with its evaluation if it has one."""
        self.step = int(state.step)
        self.files.save(state, self.evaluation)

    def end(self, error: AlarmError | NonFiniteError) -> None:
        """Ends the run, which cannot go on."""
        self.error = error
        if self._on_error:
            self._on_error(self.result(None))

    def result(self, stopped_by: str | None) -> TrainResult:
        """Returns how the run ended."""
        evaluation = None if self.error else self.evaluation
        speed = median_speed(self.recorder.rates)
        return TrainResult(self.step, stopped_by, evaluation, speed, self.error)


def _is_true_for_first(fact: bool) -> bool:
    """Returns what is true in process 0; every process must call this."""
    return broadcast_from_primary("true" if fact else "") == "true"


def common_start(runs: Sequence[TrainingRun]) -> int:
    """Returns the step from which all runs continue; 0 if none has a checkpoint of a later one."""
    for run in runs:
        run.checkpoints.check_listing()
    steps = [run.checkpoints.steps() for run in runs]
    common = common_step(steps)
    if not common and any(map(any, steps)):
        known = zip(runs, steps, strict=True)
        listed = "; ".join(f"{run.workdir}: {own or 'none'}" for run, own in known)
        raise CheckpointError(
            f"arms of a pack have checkpoints of no common step ({listed}); train them apart"
        )
    return common or _common_beginning(runs)


def _common_beginning(runs: Sequence[TrainingRun]) -> int:
    """Returns the step at which all runs begin."""
    steps = [run.beginning().step for run in runs]
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"arms of a pack begin at different steps, {steps}, as init.state=all says; train "
            "them apart"
        )
    return steps[0]


def common_step(steps: Sequence[Sequence[int]]) -> int:
    """Returns the newest step that all runs have saved; 0 if there is none."""
    common = set(steps[0]).intersection(*steps[1:])
    return max(common, default=0)


def lock_run(config: Config, workdir: Path, stack: ExitStack) -> Path:
    """Locks a run directory, so that from now on no other process and no other run writes it.

    Args:
      config: of the run.
      workdir: the directory; process 0 creates and locks it.
      stack: holds the lock.

    Returns:
      Its absolute path.

    Raises:
      ConfigError: it holds another run, or cannot hold one.
      LockedError: another process writes it.
    """
    check_run_directory(workdir, config)
    workdir = workdir.resolve()
    if is_first():
        stack.enter_context(FolderLock(workdir, "train"))
        # Again, since the process that held the lock until now may have begun a run.
        check_run_directory(workdir, config)
    return workdir


def open_run_directory(
    config: Config, workdir: Path, command: str, corpus: Corpus | None = None
) -> Corpus:
    """Returns the rows; process 0 writes configuration and tokenizer where they are absent.

    Args:
      config: of the run.
      workdir: its directory.
      command: recorded there.
      corpus: of another run on the same data; None prepares it.

    Raises:
      ConfigError: a tokenizer with more ids than the embedding has rows.
    """
    check_vocabulary(config)
    has_tokenizer = (workdir / "tokenizer.json").exists()
    if corpus is None:
        corpus = prepare(config.data, kept_tokenizer(workdir, config))
    if is_first():
        parameters = count_parameters(config)
        lineage = lineage_of(config, workdir)
        write_run_directory(workdir, config, parameters, corpus.directory.name, command, lineage)
        if not has_tokenizer:
            corpus.tokenizer.save(workdir)
    return corpus
