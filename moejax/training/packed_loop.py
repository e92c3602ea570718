"""The training loop of a pack: arms of a sweep side by side in one program, each with a run directory of its own.

What an arm leaves behind is what `loop.train` leaves: metrics, routing, alarms, evaluations and checkpoints, from which
either continues. An arm that an alarm stops, or whose values are not finite, ends; its lane goes on unheeded until the
others are done.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import jax

from moejax.config import Config, Knobs
from moejax.data import Batch, Corpus, TrainBatches, eval_batches
from moejax.training.alarms import AlarmError, AlarmLog, stop_message
from moejax.training.checkpoint import Checkpoints
from moejax.training.evaluation import Evaluation, EvaluationSums, domains_of, eval_inputs
from moejax.training.evaluation_log import EvaluationLog
from moejax.training.loop import open_run_directory
from moejax.training.metrics import FinishedStep, MetricsFile, Recorder
from moejax.training.nonfinite import NonFiniteError, nonfinite_error
from moejax.training.packed import Pack
from moejax.training.progress import StepProgress
from moejax.training.routing_log import RoutingLog
from moejax.training.signals import StopSignals
from moejax.training.state import Trainable, TrainState
from moejax.training.step import StepOutput, put_batch
from moejax.training.telemetry import LAYER_METRICS
from moejax.training.watchdog import Watchdog

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

    They continue from the newest step of which all have a checkpoint, or start anew if there is none.

    Args:
      configs: of the arms, from `config.resolve`.
      workdirs: of each arm; created if absent; a run of another configuration is refused.
      command: recorded in each `config.json`.
      stop: signals that somebody else listens for; by default SIGINT and SIGTERM are heard during this call.
      devices: to spread the arms over; all by default.
      on_end: called with the index and the result of an arm that ends before the others, when it does: they may train
        on for hours, and be killed.

    Returns:
      How each arm ended. A signal ends all after the step at hand, saved.

    Raises:
      ConfigError: arms that no single program can train, or a run directory of another run.
      DataError: data is missing or damaged.
      CheckpointError: a checkpoint is damaged or does not fit.
    """
    pack = Pack(configs, devices)
    folders = [Path(workdir) for workdir in workdirs]
    corpus = open_run_directory(configs[0], folders[0], command)
    for config, folder in zip(configs[1:], folders[1:], strict=True):
        open_run_directory(config, folder, command, corpus)
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals() if stop is None else stop)
        num_arms = len(configs)
        arms = [_Arm(trainable, folder, num_arms) for trainable, folder in zip(pack.trainables, folders, strict=True)]
        for arm in arms:
            stack.enter_context(arm.checkpoints)
        start_step = common_step([arm.checkpoints.steps() for arm in arms])
        if start_step:
            log.info("continuing %d arms from step %d", len(arms), start_step)
        stack.enter_context(jax.set_mesh(pack.mesh))
        with Watchdog(configs[0].train.step_limit_s, pack.mesh) as watchdog:
            return _PackedLoop(pack, corpus, arms, stop, watchdog, on_end).run(start_step)


def common_step(steps: Sequence[Sequence[int]]) -> int:
    """The newest step that all arms have saved; 0 if there is none."""
    return max(set.intersection(*map(set, steps)), default=0)


class _ArmMetrics(MetricsFile):
    """Metrics of an arm: its intervals say in `perf/arms` among how many arms the pack's seconds are to be shared out.

    It is said of each interval, for an arm may continue alone or in another pack.
    """

    def __init__(self, workdir: Path, after_step: int, num_arms: int):
        super().__init__(workdir, after_step)
        self._num_arms = num_arms

    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, {**values, "perf/arms": self._num_arms} if "perf/tokens_per_s" in values else values)


class _Arm:
    """One arm: what it writes, and whether it still trains."""

    def __init__(self, trainable: Trainable, workdir: Path, num_arms: int):
        self.trainable = trainable
        self.config = trainable.config
        self.workdir = workdir
        self.num_arms = num_arms
        self.checkpoints = Checkpoints(workdir, trainable)
        self.evaluation: Evaluation | None = None
        self.error: AlarmError | NonFiniteError | None = None
        self.step = 0

    @contextmanager
    def writing(self, start_step: int) -> Iterator[None]:
        """Opens the files of the arm, without what they hold of later steps."""
        config = self.config
        self.step = start_step
        with _ArmMetrics(self.workdir, start_step, self.num_arms) as self.metrics:
            self.evaluations, routing, self.alarms = None, None, None
            if config.num_moe_layers:
                self.evaluations = EvaluationLog(self.workdir, after_step=start_step)
                routing = RoutingLog(self.workdir, config.moe_layers, config.moe.num_choices, LAYER_METRICS)
                routing.truncate(start_step)
                counts = self.checkpoints.notes(start_step).get("alarms") if start_step else None
                self.alarms = AlarmLog(self.workdir, start_step, config, counts, name=f"arm {self.workdir.name}")
            silent = StepProgress(config.train.num_steps, start_step, is_shown=False)
            self.recorder = Recorder(self.metrics, routing, silent, start_step, self.alarms)
            yield

    def restore(self, step: int) -> TrainState:
        """The state of a step, on the devices of the first arm."""
        with jax.set_mesh(self.trainable.mesh):
            state = self.checkpoints.restore(step) if step else None
            return self.trainable.init(self.config.train.seed) if state is None else state

    def note(self, evaluation: Evaluation, step: int) -> None:
        """Writes an evaluation."""
        self.evaluation = evaluation
        of_routing = self.evaluations.append(step, evaluation) if self.evaluations else {}
        self.metrics.write(step, evaluation.scalars() | of_routing)

    def save(self, state: TrainState) -> None:
        """Starts to save the state, with its evaluation if it has one."""
        self.step = int(state.step)
        loss = self.evaluation.loss if self.evaluation else math.nan
        notes = {"alarms": self.alarms.counts} if self.alarms else None
        self.checkpoints.save(state, {"eval/loss": loss} if math.isfinite(loss) else None, notes)


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
            for arm in self.arms:
                stack.enter_context(arm.writing(start_step))
            self.progress = stack.enter_context(StepProgress(self.config.num_steps, start_step))
            state = self.pack.join([arm.restore(start_step) for arm in self.arms])
            is_complete, are_known = start_step == self.config.num_steps, all(a.metrics.is_evaluated for a in self.arms)
            if start_step and self.config.is_evaluated(start_step) and (is_complete or not are_known):
                self._evaluate(state, start_step)  # a signal came before it was done, or the result is asked for again
            self._train(state, start_step)
        return [ArmResult(a.step, self.stop.received, None if a.error else a.evaluation, a.error) for a in self.arms]

    def _train(self, state: TrainState, step: int) -> None:
        if step >= self.config.num_steps or self.stop:
            return
        with ExitStack() as stack:
            streams = {s: stack.enter_context(closing(b.iterate(step))) for s, b in self.batches.items()}
            train_step = self._compile(state, {seed: batches[step] for seed, batches in self.batches.items()})
            self._resume_clock()
            running: StepOutput | None = None
            is_stopping = False
            while step < self.config.num_steps and self.training and not is_stopping:
                self.watchdog.step(step + 1)
                batches = self._put({seed: next(stream) for seed, stream in streams.items()})
                state, output = train_step(state, batches, self.pack.knobs)
                step += 1
                if running is not None:
                    self._take(running, state)
                running = output
                is_stopping = bool(self.stop)
                if self.config.is_saved(step) or is_stopping:
                    self._take(running, state)
                    running = None
                    self._end_part(state, step)
                    self._resume_clock()

    def _put(self, by_seed: dict[int, Batch]) -> Batch:
        return self.pack.put_batches([by_seed[arm.config.train.seed] for arm in self.arms])

    def _compile(self, state: TrainState, by_seed: dict[int, Batch]) -> jax.stages.Compiled:
        self.watchdog.other_work("compiling the train step")
        started = time.perf_counter()
        compiled = self.pack.compile_step(state, self._put(by_seed))
        log.info("compiled the train step of %d arms in %.1f s", len(self.arms), time.perf_counter() - started)
        return compiled

    def _resume_clock(self) -> None:
        for arm in self.training:
            arm.recorder.resume()

    def _take(self, output: StepOutput, state: TrainState) -> None:
        """Hands the output of a step that is done to its arms; those that cannot go on end."""
        rate, losses = 0.0, []
        for arm, own in zip(self.arms, self.pack.outputs(output), strict=True):
            if arm.error is not None:
                continue
            finished = arm.recorder.add_finished(own)
            rate += arm.recorder.rate
            losses.append(float(own.scalars["loss/lm"]))
            if finished.step % self.config.log_every == 0:
                arm.recorder.end_interval()
            if finished.skipped_in_row >= self.config.max_nonfinite_steps:
                self._give_up(arm, state, finished)
        if losses:
            self.progress.update(finished.step, sum(losses) / len(losses), rate)

    def _give_up(self, arm: _Arm, state: TrainState, finished: FinishedStep) -> None:
        """Ends an arm whose steps are not finite; the error says where, and in which arm is the caller's to say."""
        self.watchdog.other_work("the search for values that are not finite")
        arm.recorder.flush()
        arm.step = finished.step
        first = finished.step - finished.skipped_in_row + 1
        with jax.set_mesh(arm.trainable.mesh):
            own = self.pack.split(state)[self.arms.index(arm)]
            batch = put_batch(self.batches[arm.config.train.seed][first - 1], arm.trainable)
            knobs = Knobs.of(arm.config)
            error = nonfinite_error(arm.trainable, own, batch, knobs, first, finished.skipped_in_row)
        self._end(arm, error)

    def _end_part(self, state: TrainState, step: int) -> None:
        """Evaluates and saves what is due; arms that an alarm stops are saved and end."""
        stopped = []
        for arm in self.training:
            arm.recorder.flush()
            arm.evaluation = None
            if arm.recorder.stopping:
                stopped.append(arm)
        if self.config.is_evaluated(step) and not self.stop and len(stopped) < len(self.training):
            self._evaluate(state, step, stopped)
        self.watchdog.other_work(f"saving step {step}")
        for arm, own in zip(self.arms, self.pack.split(state), strict=True):
            if arm.error is None:
                arm.save(own)
        for arm in stopped:
            arm.checkpoints.wait()
            self._end(arm, AlarmError(stop_message(step, arm.recorder.stopping)))

    def _end(self, arm: _Arm, error: AlarmError | NonFiniteError) -> None:
        arm.error = error
        log.warning("%s: %s", arm.workdir, error)
        if self.on_end is not None:
            self.on_end(self.arms.index(arm), ArmResult(arm.step, None, None, error))

    def _evaluate(self, state: TrainState, step: int, without: Sequence[_Arm] = ()) -> None:
        """Evaluates the validation split for all arms at once; nothing is known if a signal comes meanwhile."""
        self.watchdog.other_work(f"the evaluation of step {step}")
        sums = EvaluationSums(self.domains)
        with closing(eval_batches(self.corpus, self.config.batch_size // self.config.accumulation)) as batches:
            for batch in batches:
                if self.stop:
                    return
                inputs = (self.pack.put_batch(x) for x in eval_inputs(batch, self.domains))
                sums.add(self.eval_step(state.params, state.router_state, *inputs))
        losses = []
        for index, arm in enumerate(self.arms):
            if arm.error is not None or arm in without:
                continue
            evaluation = sums.result(self.corpus.num_bytes["validation"], arm=index)
            losses.append(evaluation.loss)
            if step > arm.step or not arm.metrics.is_evaluated:
                arm.note(evaluation, step)
            arm.evaluation = evaluation
        log.info("step %d: validation losses %s", step, " ".join(f"{loss:.4f}" for loss in losses))
