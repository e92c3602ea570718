"""An arm of a pack: its run directory, whether it still trains, and how it ended."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from moejax.training.checkpoints.checkpoint import CheckpointError, Checkpoints
from moejax.training.evaluation import Evaluation
from moejax.training.health.alarms import AlarmError
from moejax.training.health.nonfinite import NonFiniteError
from moejax.training.health.progress import StepProgress
from moejax.training.run_directory.files import RunFiles
from moejax.training.run_directory.metrics import FinishedStep, Recorder
from moejax.training.state import TrainSetup, TrainState


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


class PackedArm:
    """One arm: its files, and whether it still trains."""

    files: RunFiles  # once the first state is known

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
        """Takes the outputs of its steps."""
        return self.files.recorder

    def restore(self, step: int) -> TrainState:
        """Returns the state of a step, on the devices of the first arm."""
        with jax.set_mesh(self.setup.mesh):
            state = self.checkpoints.restore(step) if step else None
            if state is None:
                state = self.setup.init(self.config.train.seed)
            return state

    def open(self, start_step: int) -> RunFiles:
        """Opens its files, and drops what they and the checkpoints hold of later steps."""
        self.checkpoints.drop_after(start_step)
        self.step = start_step
        # The progress of the pack is shown, not that of each arm.
        silent = StepProgress(self.config.train.num_steps, start_step, is_shown=False)
        self.files = RunFiles(
            self.workdir,
            self.config,
            self.checkpoints,
            start_step,
            silent,
            name=f"arm {self.workdir.name}",
            num_arms=self.num_arms,
        )
        return self.files

    def save(self, state: TrainState) -> None:
        """Starts to save the state, with its evaluation if it has one."""
        self.step = int(state.step)
        self.files.save(state, self.evaluation)


def common_start(arms: Sequence[PackedArm]) -> int:
    """Returns the step from which all arms continue; 0 if none has a checkpoint."""
    for arm in arms:
        arm.checkpoints.check_listing()
    steps = [arm.checkpoints.steps() for arm in arms]
    common = common_step(steps)
    if not common and any(steps):
        known = zip(arms, steps, strict=True)
        listed = "; ".join(f"{arm.workdir}: {own or 'none'}" for arm, own in known)
        raise CheckpointError(
            f"arms of a pack have checkpoints of no common step ({listed}); train them apart"
        )
    return common


def common_step(steps: Sequence[Sequence[int]]) -> int:
    """Returns the newest step that all arms have saved; 0 if there is none."""
    common = set(steps[0]).intersection(*steps[1:])
    return max(common, default=0)
