"""The training loop of a pack: arms of a sweep side by side in one program, each with a run directory of its own.

What an arm leaves behind is what `loop.train` leaves: metrics, routing, alarms, evaluations and
checkpoints, from which either continues. An arm that an alarm stops, or whose values are not
finite, ends; its lane goes on unheeded until the others are done.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeAlias

import jax

from moejax.config import Config, ConfigError, Knobs
from moejax.data import Batch, Corpus, TrainBatches, eval_batches
from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.evaluation import Evaluation, EvaluationSums, domains_of, eval_inputs
from moejax.training.health.alarms import AlarmError, stop_message
from moejax.training.health.nonfinite import NonFiniteError, nonfinite_error
from moejax.training.health.progress import StepProgress
from moejax.training.health.watchdog import Watchdog
from moejax.training.loop import lock_run, open_run_directory
from moejax.training.multihost.signals import StopSignals
from moejax.training.packed.arms import Pack
from moejax.training.run_directory.files import RunFiles
from moejax.training.run_directory.layout import log_changes, warn_of_lost_checkpoints
from moejax.training.run_directory.metrics import FinishedStep, Recorder
from moejax.training.state import TrainSetup, TrainState
from moejax.training.step import StepOutput, put_batch

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """How an arm of a pack ended.

    Attributes:
      step: steps done.
      stopped_by: the signal that ended the pack early, or None.
      evaluation: of the final state; None if it ended early.
      error: why the arm ended before the others, or None.
    """

    step: int
    stopped_by: str | None
    evaluation: Evaluation | None
    error: AlarmError | NonFiniteError | None


OnEnd: TypeAlias = Callable[[int, ArmResult], None]


def train_packed(
    configs: Sequence[Config],
    workdirs: Sequence[str | Path],
    *,
    command: str = "",
    stop: StopSignals | None = None,
    devices: Sequence[jax.Device] | None = None,
    on_end: OnEnd | None = None,
) -> list[ArmResult]:
    """Trains arms that differ in knobs and seeds alone, side by side in one program.

    They continue from the newest step of which all have a checkpoint; what some have of later steps
    is dropped. Where none has any, they start anew.

    Args:
      configs: of the arms, from `config.resolve`.
      workdirs: of each arm; created if absent; a run of another configuration is refused.
      command: recorded in each `config.json`.
      stop: signals that somebody else listens for; by default SIGINT and SIGTERM are heard
        during this call.
      devices: to spread the arms over; all by default.
      on_end: called with the index and the result of an arm that ends before the others, when it
        does: they may train on for hours, and be killed.

    Returns:
      How each arm ended. A signal ends all after the step at hand, saved.

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
        given = zip(configs, map(Path, workdirs), strict=True)
        folders = [lock_run(config, workdir, stack) for config, workdir in given]
        corpus = open_run_directory(configs[0], folders[0], command)
        for config, folder in zip(configs[1:], folders[1:], strict=True):
            open_run_directory(config, folder, command, corpus)
        stop = stack.enter_context(StopSignals() if stop is None else stop)
        num_arms = len(configs)
        arms = [
            _Arm(setup, folder, num_arms)
            for setup, folder in zip(pack.trainables, folders, strict=True)
        ]
        for arm in arms:
            stack.enter_context(arm.checkpoints)
        start_step = _start_step(arms)
        if start_step:
            log.info("continuing %d arms from step %d", len(arms), start_step)
        for arm in arms:
            if start_step:
                log_changes(arm.checkpoints.config(start_step), arm.config, start_step)
            else:
                warn_of_lost_checkpoints(arm.workdir)
        stack.enter_context(jax.set_mesh(pack.mesh))
        limit_s = configs[0].train.step_limit_s * pack.lanes_of_device  # of the step of one arm
        with Watchdog(limit_s, pack.mesh) as watchdog:
            return _PackedLoop(pack, corpus, arms, stop, watchdog, on_end).run(start_step)


def common_step(steps: Sequence[Sequence[int]]) -> int:
    """The newest step that all arms have saved; 0 if there is none."""
    return max(set.intersection(*map(set, steps)), default=0)


class _Arm:
    """One arm: what it writes, and whether it still trains."""

    files: RunFiles  # from when the first state is known

    def __init__(self, setup: TrainSetup, workdir: Path, num_arms: int):
        self.setup = setup
        self.config = setup.config
        self.workdir = workdir
        self.num_arms = num_arms
        self.checkpoints = Checkpoints(workdir, setup)
        self.evaluation: Evaluation | None = None
        self.error: AlarmError | NonFiniteError | None = None
        self.last = FinishedStep(0, 0)
        self.step = 0

    @property
    def recorder(self) -> Recorder:
        """Of its steps."""
        return self.files.recorder

    def restore(self, step: int) -> TrainState:
        """The state of a step, on the devices of the first arm."""
        with jax.set_mesh(self.setup.mesh):
            state = self.checkpoints.restore(step) if step else None
            return self.setup.init(self.config.train.seed) if state is None else state

    def open(self, start_step: int) -> RunFiles:
        """Its files, without what they hold of later steps, nor the checkpoints of those."""
        self.checkpoints.drop_after(start_step)
        self.step = start_step
        silent = StepProgress(self.config.train.num_steps, start_step, is_shown=False)
        name = f"arm {self.workdir.name}"
        self.files = RunFiles(
            self.workdir, self.config, self.checkpoints, start_step, silent, name, self.num_arms
        )
        return self.files

    def save(self, state: TrainState) -> None:
        """Starts to save the state, with its evaluation if it has one."""
        self.step = int(state.step)
        self.files.save(state, self.evaluation)


def _start_step(arms: Sequence[_Arm]) -> int:
    for arm in arms:
        arm.checkpoints.check_listing()
    steps = [arm.checkpoints.steps() for arm in arms]
    common = common_step(steps)
    if not common and any(steps):
        listed = "; ".join(
            f"{arm.workdir}: {own or 'none'}" for arm, own in zip(arms, steps, strict=True)
        )
        raise CheckpointError(
            f"arms of a pack have checkpoints of no common step ({listed}); train them apart"
        )
    return common


class _PackedLoop:
    """The parts of a pack's run that the steps share."""

    def __init__(
        self,
        pack: Pack,
        corpus: Corpus,
        arms: Sequence[_Arm],
        stop: StopSignals,
        watchdog: Watchdog,
        on_end: OnEnd | None,
    ):
        self.pack = pack
        self.corpus = corpus
        self.arms = arms
        self.stop = stop
        self.watchdog = watchdog
        self.on_end = on_end
        self.config = arms[0].config.train  # alike in all but the seed
        self.domains = domains_of(corpus)
        self.eval_step = pack.make_eval_step(len(self.domains.domains) if self.domains else 0)
        seeds = dict.fromkeys(arm.config.train.seed for arm in arms)
        self.batches = {seed: TrainBatches(corpus, self.config.batch_size, seed) for seed in seeds}

    @property
    def training(self) -> list[_Arm]:
        """The arms that have not ended."""
        return [arm for arm in self.arms if arm.error is None]

    def run(self, start_step: int) -> list[ArmResult]:
        """Trains from a step that all have saved to the end, or to a signal."""
        with ExitStack() as stack:
            state = self.pack.join(arm.restore(start_step) for arm in self.arms)
            for arm in self.arms:
                stack.enter_context(arm.open(start_step))
            self.progress = stack.enter_context(StepProgress(self.config.num_steps, start_step))
            is_due = start_step > 0 and self.config.is_evaluated(start_step)
            unknown = [arm for arm in self.arms if is_due and not arm.files.is_evaluated]
            if unknown or start_step >= self.config.num_steps:
                # A signal came before it was done, or the result is asked for again.
                self._evaluate(state, start_step, self.arms, unknown)
                for arm in unknown:
                    if arm.evaluation:
                        arm.files.add_evaluation(start_step, arm.evaluation)
            self._train(state, start_step)
            for arm in self.training:
                arm.recorder.flush()
        return [
            ArmResult(a.step, self.stop.received, None if a.error else a.evaluation, a.error)
            for a in self.arms
        ]

    def _train(self, state: TrainState, step: int) -> None:
        if step >= self.config.num_steps or self.stop:
            return
        with ExitStack() as stack:
            streams = {
                s: stack.enter_context(closing(b.iterate(step))) for s, b in self.batches.items()
            }
            train_step = self._compile(
                state, {seed: batches[step] for seed, batches in self.batches.items()}
            )
            self._resume_clock()
            running: StepOutput | None = None
            is_over = False
            while step < self.config.num_steps and self.training and not is_over:
                self.watchdog.step(step + 1)
                batches = self._put({seed: next(stream) for seed, stream in streams.items()})
                state, output = train_step(state, batches, self.pack.knobs)
                step += 1
                if running is not None:
                    self._take(running)
                running = output
                is_saved = self.config.is_saved(step) or bool(self.stop)
                ending = (
                    self.training
                    if is_saved
                    else [arm for arm in self.training if arm.recorder.stopping]
                )
                if ending:
                    self._take(running)
                    running = None
                    self._end_part(state, step, ending)
                    is_over = is_saved and bool(self.stop)  # a signal may have come meanwhile
                    self._resume_clock()
                for arm in self.training:
                    if arm.last.skipped_in_row >= self.config.max_nonfinite_steps:
                        self._give_up(arm, state)
                        self._resume_clock()

    def _put(self, by_seed: dict[int, Batch]) -> Batch:
        return self.pack.put_batches([by_seed[arm.config.train.seed] for arm in self.arms])

    def _compile(self, state: TrainState, by_seed: dict[int, Batch]) -> jax.stages.Compiled:
        self.watchdog.other_work("compiling the train step")
        started = time.perf_counter()
        compiled = self.pack.compile_step(state, self._put(by_seed))
        log.info(
            "compiled the train step of %d arms in %.1f s",
            len(self.arms),
            time.perf_counter() - started,
        )
        return compiled

    def _resume_clock(self) -> None:
        for arm in self.training:
            arm.recorder.resume()

    def _take(self, output: StepOutput) -> None:
        """Hands the output of a step that is done to its arms."""
        losses = []
        for arm, own in zip(self.arms, self.pack.outputs(output), strict=True):
            if arm.error is None:
                arm.last = arm.recorder.add_finished(own)
                losses.append(float(own.scalars["loss/lm"]))
                if arm.last.step % self.config.log_every == 0:
                    arm.recorder.end_interval()
        rate = sum(arm.recorder.rate for arm in self.training)
        self.progress.update(self.training[0].last.step, sum(losses) / len(losses), rate)

    def _give_up(self, arm: _Arm, state: TrainState) -> None:
        """Ends an arm whose steps are not finite; the error says where, and in which arm is the caller's to say."""
        self.watchdog.other_work("the search for values that are not finite")
        arm.recorder.flush()
        arm.step = arm.last.step
        first = arm.last.step - arm.last.skipped_in_row + 1
        with jax.set_mesh(arm.setup.mesh):
            (own,) = self.pack.split(state, [self.arms.index(arm)])
            batch = put_batch(self.batches[arm.config.train.seed][first - 1], arm.setup)
            knobs = Knobs.from_config(arm.config)
            error = nonfinite_error(arm.setup, own, batch, knobs, first, arm.last.skipped_in_row)
        self._end(arm, error)

    def _end_part(self, state: TrainState, step: int, arms: Sequence[_Arm]) -> None:
        """Evaluates what is due, and saves these arms; those that an alarm stops end."""
        for arm in arms:
            arm.recorder.flush()
            arm.evaluation = None
        stopped = [arm for arm in arms if arm.recorder.stopping]
        going_on = [arm for arm in arms if arm not in stopped]
        if self.config.is_evaluated(step) and going_on and not self.stop:
            self._evaluate(state, step, going_on, going_on)
        self.watchdog.other_work(f"saving step {step}")
        for arm, own in zip(
            arms, self.pack.split(state, [self.arms.index(arm) for arm in arms]), strict=True
        ):
            arm.save(own)
        for arm in stopped:
            arm.checkpoints.wait()
            self._end(arm, AlarmError(stop_message(step, arm.recorder.stopping)))

    def _end(self, arm: _Arm, error: AlarmError | NonFiniteError) -> None:
        arm.error = error
        log.warning("%s: %s", arm.workdir, error)
        if self.on_end is not None:
            self.on_end(self.arms.index(arm), ArmResult(arm.step, None, None, error))

    def _evaluate(
        self, state: TrainState, step: int, arms: Sequence[_Arm], noted: Sequence[_Arm]
    ) -> None:
        """Evaluates the validation split for arms, and notes it for some; nothing if a signal comes meanwhile."""
        self.watchdog.other_work(f"the evaluation of step {step}")
        sums = EvaluationSums(self.domains)
        with closing(
            eval_batches(self.corpus, self.config.batch_size // self.config.accumulation)
        ) as batches:
            for batch in batches:
                if self.stop:
                    return
                inputs = (self.pack.put_batch(x) for x in eval_inputs(batch, self.domains))
                sums.add(self.eval_step(state.params, state.router_state, *inputs))
        for arm in arms:
            arm.evaluation = sums.result(
                self.corpus.num_bytes["validation"], arm=self.arms.index(arm)
            )
            if arm in noted:
                arm.files.note(step, arm.evaluation)
        losses = " ".join(f"{arm.evaluation.loss:.4f}" for arm in arms if arm.evaluation)
        log.info("step %d: validation losses %s", step, losses)
