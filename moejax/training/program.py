"""The compiled functions of runs that train together.

The loop (`training.loop`) trains whatever one program computes: a single run, as here, or the arms
of a pack (`packed.arms`), whose arrays have a leading axis.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import Knobs
from moejax.data import Batch
from moejax.training.eval_step import EvalOutput, make_eval_step
from moejax.training.state import TrainSetup, TrainState
from moejax.training.step import make_train_step, put_batch

WITH_NORMS = np.bool_(True)
"""An argument of train steps, which are compiled for both of its values."""


class Program:
    """The program of a single run.

    Args:
      setup: the run's fixed part.

    Attributes:
      mesh: all devices of the program.
      setups: the fixed part of each run.
      knobs: of all runs, as the train step takes them.
      runs_of_device: how many runs a device trains side by side.
    """

    def __init__(self, setup: TrainSetup):
        self._alone = setup
        self.mesh = setup.mesh
        self.setups = [setup]
        self.knobs = Knobs.from_config(setup.config)
        self.runs_of_device = 1

    def compile_step(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """Compiles `(state, batch, knobs, has_norms) -> (state, StepOutput)`.

        The old state is overwritten.
        """
        return make_train_step(self._alone).lower(state, batch, self.knobs, WITH_NORMS).compile()

    def make_eval_step(self, num_domains: int) -> Callable[..., EvalOutput]:
        """Makes `(params, router_state, batch, ...) -> EvalOutput`."""
        return make_eval_step(self._alone, num_domains)

    def put_batches(self, batches: Sequence[Batch]) -> Batch:
        """Puts the batch of each run, NumPy arrays `[B, L]`, on its devices."""
        (batch,) = batches
        return self.put_batch(batch)

    def put_batch(self, batch: Any) -> Any:
        """Puts one batch for all runs on the devices."""
        return put_batch(batch, self._alone)

    def join(self, states: Iterable[TrainState]) -> TrainState:
        """Returns the states of the runs as one."""
        (state,) = states
        return state

    def split(self, state: TrainState, runs: Iterable[int]) -> Iterator[TrainState]:
        """Yields the states of these runs as they would be alone."""
        for _ in runs:
            yield state

    def outputs(self, output: Any) -> list[Any]:
        """Returns what each run has of an output; that of a single run stays on the devices."""
        return [output]
