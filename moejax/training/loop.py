"""The training loop: data, steps, metrics, evaluation, checkpoints, and an orderly end."""

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import jax
from jax.sharding import Mesh

from moejax.config import Config, Knobs
from moejax.data import Batch, Corpus, TrainBatches, eval_batches, load_tokenizer, prepare
from moejax.locks import FolderLock
from moejax.models.parameters import count_parameters
from moejax.paths import resolve_path
from moejax.planning.memory import check_memory
from moejax.sharding import make_mesh
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.eval_step import make_eval_step
from moejax.training.evaluation import Evaluation, domains_of, evaluate
from moejax.training.health.alarms import AlarmError, stop_message
from moejax.training.health.nonfinite import nonfinite_error
from moejax.training.health.progress import StepProgress
from moejax.training.health.speed import median_speed
from moejax.training.health.watchdog import Watchdog
from moejax.training.multihost.processes import (
    SharedStop,
    broadcast_from_primary,
    is_first,
    primary_first,
    raise_on_all,
    wait_for_all,
)
from moejax.training.multihost.signals import ALARM, StopSignals, uninterrupted
from moejax.training.run_directory.changes import log_changes
from moejax.training.run_directory.files import RunFiles
from moejax.training.run_directory.layout import (
    check_run_directory,
    check_shared,
    warn_of_lost_checkpoints,
    write_run_directory,
)
from moejax.training.run_directory.metrics import FinishedStep, Recorder
from moejax.training.state import TrainSetup, TrainState, make_train_setup
from moejax.training.step import TrainStep, make_train_step, put_batch, rows_of_process

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Attributes:
      step: steps done.
      stopped_by: the signal that ended it early, or None.
      evaluation: of the final state; None if stopped early.
      tokens_per_s: median over logging intervals; None if this call completed no interval, and in
        processes other than the first.
    """

    step: int
    stopped_by: str | None
    evaluation: Evaluation | None
    tokens_per_s: float | None


def train(
    config: Config,
    workdir: str | Path,
    *,
    command: str = "",
    stop: StopSignals | None = None,
    on_evaluation: Callable[[int, Evaluation], None] | None = None,
) -> TrainResult:
    """Trains a configuration in a run directory, from its newest complete checkpoint if it has one.

    Several processes (`processes.initialize_distributed`) make the same call, on one shared
    `workdir`.

    Args:
      config: from `config.resolve`.
      workdir: created if absent; a run of another configuration is refused.
      command: recorded in `config.json`.
      stop: signals that the caller listens for; by default this call listens for SIGINT and
        SIGTERM.
      on_evaluation: called with the step and its evaluation after each, in every process; it may
        request a stop of `stop`.

    Returns:
      How it ended. A signal ends it after the step under way, which is saved.

    Raises:
      PathError: no directory can have the path `workdir`.
      ConfigError: the configuration does not fit the devices, or `workdir` holds another run.
      LockedError: another process writes `workdir`.
      DataError: data is missing or damaged.
      CheckpointError: the newest checkpoint is damaged or does not fit.
      AlarmError: a rule in `alarms.stop` held.
      NonFiniteError: `train.max_nonfinite_steps` steps in a row were not finite.
      ProcessError: another process failed.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals() if stop is None else stop)
        given = resolve_path(workdir)
        workdir = primary_first(lambda: lock_run(config, given, stack))
        mesh, corpus = primary_first(lambda: _open(config, workdir, command))
        check_shared(workdir)
        setup = make_train_setup(config, mesh)
        checkpoints = stack.enter_context(Checkpoints(workdir, setup))
        stack.enter_context(jax.set_mesh(mesh))
        state = checkpoints.restore()
        if state is None:
            warn_of_lost_checkpoints(workdir)
            state = setup.init(config.train.seed)
        else:
            step = int(state.step)
            log.info("continuing %s from step %d", workdir, step)
            log_changes(checkpoints.config(step), config, step)
        return _Loop(setup, corpus, checkpoints, workdir, stop, on_evaluation).run(state)


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


def _open(config: Config, workdir: Path, command: str) -> tuple[Mesh, Corpus]:
    """Returns the mesh and the rows, once the run is known to fit in memory."""
    check_memory(config)
    return make_mesh(config), open_run_directory(config, workdir, command)


def open_run_directory(
    config: Config, workdir: Path, command: str, corpus: Corpus | None = None
) -> Corpus:
    """Returns the rows; process 0 writes configuration and tokenizer where they are absent.

    Args:
      config: of the run.
      workdir: its directory.
      command: recorded there.
      corpus: of another run on the same data; None prepares it.
    """
    has_tokenizer = (workdir / "tokenizer.json").exists()
    if corpus is None:
        # A run keeps its tokenizer: one that is learned again from changed text would not fit its
        # weights.
        tokenizer = load_tokenizer(workdir) if has_tokenizer else None
        corpus = prepare(config.data, tokenizer)
    if is_first():
        parameters = count_parameters(config)
        write_run_directory(workdir, config, parameters, corpus.directory.name, command)
        if not has_tokenizer:
            corpus.tokenizer.save(workdir)
    return corpus


class _Loop:
    """The parts of a run that the steps share."""

    files: RunFiles  # open while `run` is called

    def __init__(
        self,
        setup: TrainSetup,
        corpus: Corpus,
        checkpoints: Checkpoints,
        workdir: Path,
        stop: StopSignals,
        on_evaluation: Callable[[int, Evaluation], None] | None,
    ):
        self.config = setup.config.train
        self.setup = setup
        self.corpus = corpus
        self.checkpoints = checkpoints
        self.workdir = workdir
        self.own_stop = stop
        self.on_evaluation = on_evaluation
        self.stop = SharedStop(stop, setup.mesh)
        self.watchdog = Watchdog(self.config.step_limit_s, setup.mesh)
        self.knobs = Knobs.from_config(setup.config)
        self.domains = domains_of(corpus)
        self.eval_step = make_eval_step(setup, len(self.domains.domains) if self.domains else 0)
        rows = rows_of_process(setup.mesh, self.config.batch_size)
        self.batches = TrainBatches(corpus, self.config.batch_size, self.config.seed, rows)

    @property
    def recorder(self) -> Recorder:
        """Takes the outputs of steps."""
        return self.files.recorder

    def run(self, state: TrainState) -> TrainResult:
        """Trains from `state` to the end of the run or to a signal."""
        start_step = int(state.step)
        with ExitStack() as stack:
            stack.enter_context(self.watchdog)
            shown = StepProgress(self.config.num_steps, start_step, is_first())
            progress = stack.enter_context(shown)
            files = RunFiles(
                self.workdir, self.setup.config, self.checkpoints, start_step, progress
            )
            self.files = stack.enter_context(files)
            evaluation = self._make_up_evaluation(state)
            state, evaluation = self._train(state, evaluation)
            self.recorder.flush()
            if self._is_alarmed():
                self._stop_by_alarm(state)
            if evaluation is None and not self.stop:  # the run was complete before this call
                evaluation = self._evaluate(state, is_noted=False)
            self._save(state, evaluation)
        return TrainResult(
            step=int(state.step),
            stopped_by=self.stop.received,
            evaluation=evaluation,
            tokens_per_s=median_speed(self.recorder.rates),
        )

    def _make_up_evaluation(self, state: TrainState) -> Evaluation | None:
        """Evaluates the first state if a signal came before that was done."""
        step = int(state.step)
        is_known = broadcast_from_primary("evaluated" if self.files.is_evaluated else "")
        if is_known or step == 0 or not self.config.is_evaluated(step):
            return None
        evaluation = self._evaluate(state)
        if evaluation:
            self.files.add_evaluation(step, evaluation)
        return evaluation

    def _train(
        self, state: TrainState, evaluation: Evaluation | None
    ) -> tuple[TrainState, Evaluation | None]:
        """Trains; returns the last state and its evaluation, if it was evaluated."""
        step = int(state.step)
        if step >= self.config.num_steps or self.stop:
            return state, evaluation
        with closing(self.batches.iterate(step)) as batches:
            train_step = self._compile(state, self.batches[step])
            self.recorder.resume()
            while step < self.config.num_steps and not self.stop:
                self.watchdog.step(step + 1)
                batch = put_batch(next(batches), self.setup)
                state, output = train_step(state, batch, self.knobs)
                step += 1
                # This waits for the step before, so that the device never waits for the host.
                finished = self.recorder.add(output)
                self.stop.poll()
                if finished.step % self.config.log_every == 0:
                    self.recorder.end_interval()
                    self._check_stop()
                evaluation = None
                if self.config.is_saved(step) or self.stop:
                    finished = self.recorder.flush()
                    evaluation, is_alarmed = self._end_part(state, step)
                    if is_alarmed:
                        break
                    self.recorder.resume()
                if finished.skipped_in_row >= self.config.max_nonfinite_steps:
                    self.recorder.flush()
                    self._give_up(state, finished)
        return state, evaluation

    def _end_part(self, state: TrainState, step: int) -> tuple[Evaluation | None, bool]:
        """Evaluates the state if that is due, and saves it.

        Returns:
          The evaluation, if there is one, and whether an alarm is to stop the run.
        """
        self._check_stop()
        is_alarmed = self._is_alarmed()
        evaluation = None
        if self.config.is_evaluated(step) and not self.stop and not is_alarmed:
            evaluation = self._evaluate(state)
        self._save(state, evaluation)
        return evaluation, is_alarmed

    def _compile(self, state: TrainState, batch: Batch) -> TrainStep:
        """Compiles the step before the clock starts.

        All processes wait for each other afterwards: gloo would not wait for a slow one.
        """
        started_at = time.perf_counter()
        arguments = (state, put_batch(batch, self.setup), self.knobs)
        log.info("compiling the train step")
        with uninterrupted("compiling the train step"):
            compiled = make_train_step(self.setup).lower(*arguments).compile()
        log.info("compiled the train step in %.1f s", time.perf_counter() - started_at)
        wait_for_all()
        return compiled

    def _evaluate(self, state: TrainState, *, is_noted: bool = True) -> Evaluation | None:
        """Evaluates the validation split and notes the result; None if a signal came meanwhile."""
        step = int(state.step)
        self.watchdog.other_work(f"the evaluation of step {step}")
        microbatch = self.config.batch_size // self.config.accumulation
        rows = rows_of_process(self.setup.mesh, microbatch)
        with closing(eval_batches(self.corpus, microbatch, rows=rows)) as batches:
            evaluation = evaluate(
                self.eval_step,
                self.setup,
                state.params,
                state.router_state,
                batches,
                self.corpus.num_bytes["validation"],
                should_stop=self.stop.poll,
                domains=self.domains,
            )
        if evaluation is None:
            return None
        if is_noted:
            self.files.note(step, evaluation)
        log.info(
            "step %d: validation loss %.4f, %.4f bits per byte",
            step,
            evaluation.loss,
            evaluation.bits_per_byte,
        )
        if self.on_evaluation:
            self.on_evaluation(step, evaluation)
        return evaluation

    def _save(self, state: TrainState, evaluation: Evaluation | None) -> None:
        self.watchdog.other_work(f"saving step {int(state.step)}")
        self.files.save(state, evaluation)

    def _check_stop(self) -> None:
        """Requests a stop if an interval that was just written holds an alarm of `alarms.stop`."""
        if self.recorder.stopping:
            self.own_stop.request(ALARM)

    def _is_alarmed(self) -> bool:
        """Whether an alarm is to stop the run; every process must call this.

        A stop may be granted only after the last step, so that `stop` alone does not say.
        """
        return broadcast_from_primary("alarmed" if self.recorder.stopping else "") == "alarmed"

    def _stop_by_alarm(self, state: TrainState) -> None:
        """Raises `AlarmError` once the state is on disk.

        Of several processes the first, which logs, says why.
        """
        self.checkpoints.wait()

        def fail() -> None:
            if is_first():
                raise AlarmError(stop_message(int(state.step), self.recorder.stopping))

        raise_on_all(fail)

    def _give_up(self, state: TrainState, finished: FinishedStep) -> None:
        """Raises `NonFiniteError`; all processes look for the place, and the first names it."""
        self.watchdog.other_work("the search for values that are not finite")
        num_steps = finished.skipped_in_row
        first = finished.step - num_steps + 1
        batch = put_batch(self.batches[first - 1], self.setup)
        error = nonfinite_error(self.setup, state, batch, self.knobs, first, num_steps)

        def fail() -> None:
            if is_first():
                raise error

        raise_on_all(fail)
