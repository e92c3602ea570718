"""The training loop of a pack: arms of a sweep side by side in one program.

Each arm has a run directory of its own, with the files that `loop.train` writes: metrics, routing,
alarms, evaluations and checkpoints. Either loop continues from them. An arm that an alarm stops, or
whose values are not finite, ends; its slot is still computed, without effect, until the others are
done.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeAlias

import jax

from moejax.config import Config, ConfigError, Knobs
from moejax.data import Batch, Corpus, TrainBatches, eval_batches
from moejax.training.evaluation import EvaluationSums, domains_of, eval_inputs
from moejax.training.health.alarms import AlarmError, stop_message
from moejax.training.health.nonfinite import NonFiniteError, nonfinite_error
from moejax.training.health.progress import StepProgress
from moejax.training.health.watchdog import Watchdog
from moejax.training.loop import lock_run, open_run_directory
from moejax.training.multihost.signals import StopSignals
from moejax.training.packed.arm import ArmResult, PackedArm, common_start
from moejax.training.packed.arms import Pack
from moejax.training.run_directory.changes import log_changes
from moejax.training.run_directory.layout import warn_of_lost_checkpoints
from moejax.training.state import TrainState
from moejax.training.step import StepOutput, put_batch

log = logging.getLogger("moejax")


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
        arms = []
        for setup, folder in zip(pack.trainables, folders, strict=True):
            arm = PackedArm(setup, folder, len(configs))
            stack.enter_context(arm.checkpoints)
            arms.append(arm)
        start_step = common_start(arms)
        _log_start(arms, start_step)
        stack.enter_context(jax.set_mesh(pack.mesh))
        # The limit is that of a step of one arm.
        limit_s = configs[0].train.step_limit_s * pack.slots_of_device
        watchdog = stack.enter_context(Watchdog(limit_s, pack.mesh))
        return _PackedLoop(pack, corpus, arms, stop, watchdog, on_end).run(start_step)


def _log_start(arms: Sequence[PackedArm], start_step: int) -> None:
    """Logs from where the arms continue, and what has changed or is lost since."""
    if start_step:
        log.info("continuing %d arms from step %d", len(arms), start_step)
    for arm in arms:
        if start_step:
            log_changes(arm.checkpoints.config(start_step), arm.config, start_step)
        else:
            warn_of_lost_checkpoints(arm.workdir)


class _PackedLoop:
    """The parts of a pack's run that the steps share."""

    def __init__(
        self,
        pack: Pack,
        corpus: Corpus,
        arms: Sequence[PackedArm],
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
        self.config = arms[0].config.train  # the same in all arms, except the seed
        self.domains = domains_of(corpus)
        self.eval_step = pack.make_eval_step(len(self.domains.domains) if self.domains else 0)
        seeds = dict.fromkeys(arm.config.train.seed for arm in arms)
        self.batches = {seed: TrainBatches(corpus, self.config.batch_size, seed) for seed in seeds}

    @property
    def training(self) -> list[PackedArm]:
        """The arms that have not ended."""
        return [arm for arm in self.arms if arm.error is None]

    def run(self, start_step: int) -> list[ArmResult]:
        """Trains from a step that all have saved to the end, or to a signal."""
        with ExitStack() as stack:
            state = self.pack.join(arm.restore(start_step) for arm in self.arms)
            for arm in self.arms:
                stack.enter_context(arm.open(start_step))
            progress = StepProgress(self.config.num_steps, start_step)
            self.progress = stack.enter_context(progress)
            self._make_up_evaluation(state, start_step)
            self._train(state, start_step)
            for arm in self.training:
                arm.recorder.flush()
        results = []
        for arm in self.arms:
            evaluation = None if arm.error else arm.evaluation
            results.append(ArmResult(arm.step, self.stop.received, evaluation, arm.error))
        return results

    def _make_up_evaluation(self, state: TrainState, step: int) -> None:
        """Evaluates the first state if a signal came before that was done.

        It is also evaluated if it is the last one, whose result is asked for again.
        """
        unknown: list[PackedArm] = []
        if step > 0 and self.config.is_evaluated(step):
            unknown = [arm for arm in self.arms if not arm.files.is_evaluated]
        if not unknown and step < self.config.num_steps:
            return
        self._evaluate(state, step, self.arms, unknown)
        for arm in unknown:
            if arm.evaluation:
                arm.files.add_evaluation(step, arm.evaluation)

    def _train(self, state: TrainState, step: int) -> None:
        if step >= self.config.num_steps or self.stop:
            return
        with ExitStack() as stack:
            streams = {}
            for seed, batches in self.batches.items():
                streams[seed] = stack.enter_context(closing(batches.iterate(step)))
            train_step = self._compile(state, step)
            self._resume_clock()
            running: StepOutput | None = None
            is_over = False
            while step < self.config.num_steps and self.training and not is_over:
                self.watchdog.step(step + 1)
                batch = self._put({seed: next(stream) for seed, stream in streams.items()})
                state, output = train_step(state, batch, self.pack.knobs)
                step += 1
                # This waits for the step before, so that the device never waits for the host.
                if running is not None:
                    self._take(running)
                running = output
                is_saved = self.config.is_saved(step) or bool(self.stop)
                ending = self._ending(is_saved)
                if ending:
                    self._take(running)
                    running = None
                    self._end_part(state, step, ending)
                    is_over = is_saved and bool(self.stop)  # a signal may have come meanwhile
                    self._resume_clock()
                self._give_up_nonfinite(state)

    def _ending(self, is_saved: bool) -> list[PackedArm]:
        """Returns the arms that are saved now: all of them, or those that an alarm stops."""
        if is_saved:
            return self.training
        return [arm for arm in self.training if arm.recorder.stopping]

    def _put(self, batch_of_seed: Mapping[int, Batch]) -> Batch:
        """Puts the batch of each arm on its devices."""
        batches = [batch_of_seed[arm.config.train.seed] for arm in self.arms]
        return self.pack.put_batches(batches)

    def _compile(self, state: TrainState, step: int) -> jax.stages.Compiled:
        """Compiles the step before the clock starts."""
        batch_of_seed = {seed: batches[step] for seed, batches in self.batches.items()}
        self.watchdog.other_work("compiling the train step")
        started_at = time.perf_counter()
        compiled = self.pack.compile_step(state, self._put(batch_of_seed))
        seconds = time.perf_counter() - started_at
        log.info("compiled the train step of %d arms in %.1f s", len(self.arms), seconds)
        return compiled

    def _resume_clock(self) -> None:
        for arm in self.training:
            arm.recorder.resume()

    def _take(self, output: StepOutput) -> None:
        """Hands the output of a step that is done to its arms."""
        losses = []
        for arm, own_output in zip(self.arms, self.pack.outputs(output), strict=True):
            if arm.error is not None:
                continue
            arm.last = arm.recorder.add_finished(own_output)
            losses.append(float(own_output.scalars["loss/lm"]))
            if arm.last.step % self.config.log_every == 0:
                arm.recorder.end_interval()
        step = self.training[0].last.step
        rate = sum(arm.recorder.rate for arm in self.training)
        self.progress.update(step, sum(losses) / len(losses), rate)

    def _give_up_nonfinite(self, state: TrainState) -> None:
        """Ends the arms of which too many steps in a row were not finite."""
        for arm in self.training:
            if arm.last.skipped_in_row >= self.config.max_nonfinite_steps:
                self._give_up(arm, state)
                self._resume_clock()

    def _give_up(self, arm: PackedArm, state: TrainState) -> None:
        """Ends an arm whose steps are not finite.

        The error says in which place. The caller says in which arm.
        """
        self.watchdog.other_work("the search for values that are not finite")
        arm.recorder.flush()
        arm.step = arm.last.step
        num_steps = arm.last.skipped_in_row
        first = arm.last.step - num_steps + 1
        with jax.set_mesh(arm.setup.mesh):
            (own_state,) = self.pack.split(state, [self.arms.index(arm)])
            batches = self.batches[arm.config.train.seed]
            batch = put_batch(batches[first - 1], arm.setup)
            knobs = Knobs.from_config(arm.config)
            error = nonfinite_error(arm.setup, own_state, batch, knobs, first, num_steps)
        self._end(arm, error)

    def _end_part(self, state: TrainState, step: int, arms: Sequence[PackedArm]) -> None:
        """Evaluates what is due, and saves these arms; those that an alarm stops end."""
        for arm in arms:
            arm.recorder.flush()
            arm.evaluation = None
        stopped = [arm for arm in arms if arm.recorder.stopping]
        going_on = [arm for arm in arms if arm not in stopped]
        if self.config.is_evaluated(step) and going_on and not self.stop:
            self._evaluate(state, step, going_on, going_on)
        self.watchdog.other_work(f"saving step {step}")
        own_states = self.pack.split(state, [self.arms.index(arm) for arm in arms])
        for arm, own_state in zip(arms, own_states, strict=True):
            arm.save(own_state)
        for arm in stopped:
            arm.checkpoints.wait()
            self._end(arm, AlarmError(stop_message(step, arm.recorder.stopping)))

    def _end(self, arm: PackedArm, error: AlarmError | NonFiniteError) -> None:
        """Ends an arm before the others."""
        arm.error = error
        log.warning("%s: %s", arm.workdir, error)
        if self.on_end is not None:
            result = ArmResult(arm.step, None, None, error)
            self.on_end(self.arms.index(arm), result)

    def _evaluate(
        self, state: TrainState, step: int, arms: Sequence[PackedArm], noted: Sequence[PackedArm]
    ) -> None:
        """Evaluates the validation split; does nothing if a signal comes meanwhile.

        Args:
          state: of all arms.
          step: steps done.
          arms: that get the result.
          noted: those of them that write it, too.
        """
        self.watchdog.other_work(f"the evaluation of step {step}")
        sums = self._sum_evaluation(state)
        if sums is None:
            return
        num_bytes = self.corpus.num_bytes["validation"]
        losses = []
        for arm in arms:
            arm.evaluation = sums.result(num_bytes, arm=self.arms.index(arm))
            losses.append(f"{arm.evaluation.loss:.4f}")
            if arm in noted:
                arm.files.note(step, arm.evaluation)
        log.info("step %d: validation losses %s", step, " ".join(losses))

    def _sum_evaluation(self, state: TrainState) -> EvaluationSums | None:
        """Runs all arms on every batch of the validation split; None if a signal comes."""
        sums = EvaluationSums(self.domains)
        microbatch = self.config.batch_size // self.config.accumulation
        with closing(eval_batches(self.corpus, microbatch)) as batches:
            for batch in batches:
                if self.stop:
                    return None
                inputs = [self.pack.put_batch(x) for x in eval_inputs(batch, self.domains)]
                sums.add(self.eval_step(state.params, state.router_state, *inputs))
        return sums
