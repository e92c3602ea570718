"""The training loop: data, steps, metrics, evaluation, checkpoints, and an orderly end.

It trains the runs of one program (`training.program`). A single run is the case of one; the arms of
a sweep that train side by side are the case of several. A run that an alarm stops, or whose values
are not finite, ends; its part of the program is still computed, without effect, until the others
are done.
"""

import dataclasses
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.config import Config, Knobs
from moejax.data import Batch, Corpus, TrainBatches, eval_batches
from moejax.paths import resolve_path
from moejax.planning.memory import check_memory
from moejax.sharding import make_mesh
from moejax.training.evaluation import Evaluation, domains_of, evaluate
from moejax.training.health.alarms import AlarmError, stop_message
from moejax.training.health.nonfinite import NonFiniteError, nonfinite_error
from moejax.training.health.progress import StepProgress
from moejax.training.health.watchdog import Watchdog
from moejax.training.multihost.processes import (
    SharedStop,
    is_first,
    primary_first,
    raise_on_all,
    wait_for_all,
)
from moejax.training.multihost.signals import ALARM, StopSignals, uninterrupted
from moejax.training.program import Program
from moejax.training.run import (
    OnEvaluation,
    TrainingRun,
    TrainResult,
    common_start,
    lock_run,
    open_run_directory,
)
from moejax.training.run_directory.layout import check_shared
from moejax.training.state import TrainState, make_train_setup
from moejax.training.step import StepOutput, put_batch, rows_of_process

log = logging.getLogger("moejax")


def train(
    config: Config,
    workdir: str | Path,
    *,
    command: str = "",
    stop: StopSignals | None = None,
    on_evaluation: OnEvaluation | None = None,
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
        run = TrainingRun(setup, workdir, on_evaluation=on_evaluation)
        stack.enter_context(run.checkpoints)
        (result,) = Loop(Program(setup), corpus, [run], stop).run()
        if result.error is not None:
            _raise(result.error)
        return result


def _open(config: Config, workdir: Path, command: str) -> tuple[Mesh, Corpus]:
    """Returns the mesh and the rows, once the run is known to fit in memory."""
    check_memory(config)
    return make_mesh(config), open_run_directory(config, workdir, command)


def _raise(error: AlarmError | NonFiniteError) -> None:
    """Raises the error of a run; of several processes the first, which logs, says why."""

    def fail() -> None:
        if is_first():
            raise error

    raise_on_all(fail)


class Loop:
    """The parts of a training that the steps share.

    Args:
      program: what all runs compute together.
      corpus: the rows, the same for all.
      runs: in the order of `program.setups`, with their checkpoints open. Their configurations
        differ in what one program can train, see `packed.arms`.
      stop: the signals of this process.
    """

    progress: StepProgress
    watchdog: Watchdog

    def __init__(
        self, program: Program, corpus: Corpus, runs: Sequence[TrainingRun], stop: StopSignals
    ):
        self.program = program
        self.corpus = corpus
        self.runs = runs
        self.own_stop = stop
        self.stop = SharedStop(stop, program.mesh)
        self.config = runs[0].config.train  # the same in all runs, except the seed
        self.domains = domains_of(corpus)
        num_domains = len(self.domains.domains) if self.domains else 0
        self.eval_step = program.make_eval_step(num_domains)
        batch_size = self.config.batch_size
        rows = rows_of_process(program.mesh, batch_size)
        self.batches: dict[int, TrainBatches] = {}  # by seed
        for run in runs:
            if run.seed not in self.batches:
                self.batches[run.seed] = TrainBatches(corpus, batch_size, run.seed, rows)

    @property
    def training(self) -> list[TrainingRun]:
        """The runs that have not ended."""
        return [run for run in self.runs if run.error is None]

    def run(self) -> list[TrainResult]:
        """Trains from the newest step that all runs have saved, to the end or to a signal."""
        start_step = common_start(self.runs)
        with ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.program.mesh))
            state = self._restore(start_step)
            self._open(start_step, stack)
            self._make_up_evaluation(state, start_step)
            if start_step >= self.config.num_steps or self.stop:
                self._end_part(state, start_step, self.runs)
            else:
                self._train(state, start_step)
        return [run.result(self.stop.received) for run in self.runs]

    def _restore(self, start_step: int) -> TrainState:
        """Returns the state to begin with."""
        if start_step:
            num_runs = len(self.runs)
            name = self.runs[0].workdir if num_runs == 1 else f"{num_runs} arms"
            log.info("continuing %s from step %d", name, start_step)
        return self.program.join(run.restore(start_step) for run in self.runs)

    def _open(self, start_step: int, stack: ExitStack) -> None:
        """Opens what is open while the steps run."""
        # The limit is that of a step of one run.
        limit_s = self.config.step_limit_s * self.program.runs_of_device
        watchdog = Watchdog(limit_s, self.program.mesh)
        self.watchdog = stack.enter_context(watchdog)
        progress = StepProgress(self.config.num_steps, start_step, is_first())
        self.progress = stack.enter_context(progress)
        for run in self.runs:
            files = run.open(start_step)
            stack.enter_context(files)

    def _make_up_evaluation(self, state: TrainState, step: int) -> None:
        """Evaluates the first state if a signal came before that was done.

        It is also evaluated if it is the last one, whose result is asked for again.
        """
        unknown: list[TrainingRun] = []
        if step > 0 and self.config.is_evaluated(step):
            unknown = [run for run in self.runs if not run.is_evaluated()]
        if not unknown and step < self.config.num_steps:
            return
        self._evaluate(state, step, self.runs, unknown)
        for run in unknown:
            if run.evaluation:
                run.files.add_evaluation(step, run.evaluation)

    def _train(self, state: TrainState, step: int) -> None:
        """Trains from a step on."""
        with closing(self._iterate(step)) as batches:
            train_step = self._compile(state, step)
            self._resume_clocks()
            running: StepOutput | None = None
            is_over = False
            while step < self.config.num_steps and self.training and not is_over:
                self.watchdog.step(step + 1)
                batch = self.program.put_batches(next(batches))
                step += 1
                has_norms = np.bool_(step % self.config.log_every == 0)
                state, output = train_step(state, batch, self.program.knobs, has_norms)
                # This waits for the step before, so that the device never waits for the host.
                self._take(running)
                running = output
                self.stop.poll()
                is_saved = self.config.is_saved(step) or bool(self.stop)
                ending = self._ending(is_saved)
                if ending:
                    self._take(running)
                    running = None
                    self._end_part(state, step, ending)
                    is_over = is_saved and bool(self.stop)  # a signal may have come meanwhile
                    self._resume_clocks()
                self._give_up_nonfinite(state)

    def _iterate(self, step: int) -> Generator[list[Batch]]:
        """Yields the batches of all runs, step by step; runs of one seed share theirs."""
        with ExitStack() as stack:
            streams = {}
            for seed, batches in self.batches.items():
                stream = closing(batches.iterate(step))
                streams[seed] = stack.enter_context(stream)
            while True:
                batch_of_seed = {seed: next(stream) for seed, stream in streams.items()}
                yield [batch_of_seed[run.seed] for run in self.runs]

    def _compile(self, state: TrainState, step: int) -> jax.stages.Compiled:
        """Compiles the step before the clock starts.

        All processes wait for each other afterwards: gloo would not wait for a slow one.
        """
        started_at = time.perf_counter()
        batches = [self.batches[run.seed][step] for run in self.runs]
        batch = self.program.put_batches(batches)
        self.watchdog.other_work("compiling the train step")
        log.info("compiling the train step")
        with uninterrupted("compiling the train step"):
            compiled = self.program.compile_step(state, batch)
        log.info("compiled the train step in %.1f s", time.perf_counter() - started_at)
        wait_for_all()
        return compiled

    def _resume_clocks(self) -> None:
        for run in self.training:
            run.recorder.resume()

    def _take(self, output: StepOutput | None) -> None:
        """Hands the output of a step, if there is one, to its runs; waits until it is done."""
        if output is None:
            return
        losses = []
        own_outputs = self.program.outputs(output)
        for run, own_output in zip(self.runs, own_outputs, strict=True):
            if run.error is None:
                run.add(own_output)
                losses.append(run.recorder.last.loss)
        step = self.training[0].recorder.last.step
        mean_loss = sum(losses) / len(losses)
        rate = sum(run.recorder.rate for run in self.training)
        self.progress.update(step, mean_loss, rate)

    def _ending(self, is_saved: bool) -> list[TrainingRun]:
        """Returns the runs that are saved now: all of them, or those that an alarm stops."""
        if is_saved:
            return self.training
        alarmed = [run for run in self.training if run.recorder.stopping]
        if alarmed and self.stop.is_shared:
            # Only the first process knows of it; all of them agree on a step by `stop`.
            self.own_stop.request(ALARM)
            return []
        return alarmed

    def _end_part(self, state: TrainState, step: int, runs: Sequence[TrainingRun]) -> None:
        """Evaluates what is due, and saves these runs; those that an alarm stops end."""
        for run in runs:
            run.recorder.flush()
        alarmed = [run for run in runs if run.is_alarmed()]
        due = [run for run in runs if run not in alarmed and run.evaluation is None]
        if due and self.config.is_evaluated(step) and not self.stop:
            self._evaluate(state, step, due, due)
        self.watchdog.other_work(f"saving step {step}")
        own_states = self._split(state, runs)
        for run, own_state in zip(runs, own_states, strict=True):
            run.save(own_state)
        for run in alarmed:
            run.checkpoints.wait()
            message = stop_message(step, run.recorder.stopping)
            run.end(AlarmError(message))

    def _split(self, state: TrainState, runs: Sequence[TrainingRun]) -> Iterator[TrainState]:
        """Yields the states of these runs, one after another."""
        indices = [self.runs.index(run) for run in runs]
        return self.program.split(state, indices)

    def _evaluate(
        self,
        state: TrainState,
        step: int,
        runs: Sequence[TrainingRun],
        noted: Sequence[TrainingRun],
    ) -> None:
        """Evaluates the validation split; does nothing if a signal comes meanwhile.

        Args:
          state: of all runs.
          step: steps done.
          runs: that get the result.
          noted: those of them that write it, too.
        """
        self.watchdog.other_work(f"the evaluation of step {step}")
        evaluations = self._evaluate_weights(state, state.params)
        averages: Sequence[Evaluation | None] = [None] * len(evaluations)
        if state.average is not None and evaluations:
            averages = self._evaluate_weights(state, state.average)
        # None if it was given up.
        for run, evaluation, average in zip(self.runs, evaluations, averages, strict=False):
            if run in runs:
                both = dataclasses.replace(evaluation, of_average=average)
                run.take_evaluation(step, both, is_noted=run in noted)

    def _evaluate_weights(self, state: TrainState, weights: Any) -> list[Evaluation]:
        """Returns the evaluation of weights of each run; none if a signal comes meanwhile."""
        microbatch = self.config.batch_size // self.config.accumulation
        rows = rows_of_process(self.program.mesh, microbatch)
        with closing(eval_batches(self.corpus, microbatch, rows=rows)) as batches:
            return evaluate(
                self.program,
                self.eval_step,
                weights,
                state.router_state,
                batches,
                self.corpus.num_bytes["validation"],
                should_stop=self.stop.poll,
                domains=self.domains,
            )

    def _give_up_nonfinite(self, state: TrainState) -> None:
        """Ends the runs of which too many steps in a row were not finite."""
        for run in self.training:
            if run.recorder.last.skipped_in_row >= self.config.max_nonfinite_steps:
                self._give_up(run, state)
                self._resume_clocks()

    def _give_up(self, run: TrainingRun, state: TrainState) -> None:
        """Ends a run whose steps are not finite; all processes look for the place."""
        self.watchdog.other_work("the search for values that are not finite")
        run.recorder.flush()
        run.step = run.recorder.last.step
        num_steps = run.recorder.last.skipped_in_row
        first = run.step - num_steps + 1
        with jax.set_mesh(run.setup.mesh):
            (own_state,) = self._split(state, [run])
            rows = self.batches[run.seed][first - 1]
            batch = put_batch(rows, run.setup)
            knobs = Knobs.from_config(run.config)
            error = nonfinite_error(run.setup, own_state, batch, knobs, first, num_steps)
        run.end(error)
