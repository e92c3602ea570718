"""Measures what telemetry costs: train steps with all that is logged, against their loss alone."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.benchmarks.step import WITHOUT_NORMS, random_batch
from moejax.benchmarks.timing import Times, interleave, rounded
from moejax.config import Config, Knobs
from moejax.data import Batch
from moejax.sharding import make_mesh
from moejax.training.health.alarms import AlarmLog
from moejax.training.health.telemetry import LAYER_METRICS
from moejax.training.run_directory.metrics import MetricsFile, Recorder
from moejax.training.run_directory.routing_log import RoutingLog
from moejax.training.state import TrainSetup, make_train_setup
from moejax.training.step import compiler_options, make_train_step, put_batch, train_step_of

READ_EVERY_STEP = ("loss/lm", "num_targets", "skipped_in_row")
"""Scalars that any training loop reads, for its progress and to notice non-finite steps."""


def bench_telemetry(config: Config, repetitions: int) -> dict[str, Any]:
    """Times logging intervals of a MoE config with and without telemetry, on random tokens."""
    with tempfile.TemporaryDirectory() as workdir:
        watched = Watched(config, Path(workdir))
        times = interleave({"watched": watched, "bare": Bare(config)}, repetitions)
        watched.close()
    steps = config.train.log_every
    watched_ms = times["watched"].median_ms
    bare_ms = times["bare"].median_ms
    timed_writes = watched.write_seconds[-repetitions:]
    write_ms = 1e3 * statistics.median(timed_writes)
    return {
        "ratio": round(watched_ms / bare_ms, 4),
        "write_share": round(write_ms / bare_ms, 4),
        "watched_step_ms": round(watched_ms / steps, 2),
        "bare_step_ms": round(bare_ms / steps, 2),
        "watched_quartiles_ms": _of_step(times["watched"], steps),
        "bare_quartiles_ms": _of_step(times["bare"], steps),
        "write_ms": round(write_ms, 2),
        "log_every": steps,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


def _of_step(times: Times, steps: int) -> list[float]:
    """Returns the quartiles of an interval of steps, for one of them."""
    return rounded([ms / steps for ms in times.quartiles_ms], 2)


def _inputs(config: Config, setup: TrainSetup) -> tuple[Batch, Knobs]:
    """Returns what a step takes next to the state: random tokens, and the knobs."""
    batch = put_batch(random_batch(config), setup)
    return batch, Knobs.from_config(config)


class Bare:
    """A logging interval of steps that return only what every loop reads; XLA drops the rest."""

    def __init__(self, config: Config):
        setup = make_train_setup(config, make_mesh(config))
        self.setup = setup
        self._inputs = _inputs(config, setup)
        self.state = setup.init(config.train.seed)
        self._steps = config.train.log_every
        train_step = train_step_of(setup)

        def step(state, batch, knobs):
            state, output = train_step(state, batch, knobs)
            scalars = {key: output.scalars[key] for key in READ_EVERY_STEP}
            return state, scalars

        options = compiler_options(setup.mesh)
        with jax.set_mesh(setup.mesh):
            program = jax.jit(step, donate_argnums=0, compiler_options=options)
            lowered = program.lower(self.state, *self._inputs)
            self._step = lowered.compile()

    def __call__(self) -> Any:
        """Takes the steps of an interval, waiting for each while the next one runs."""
        running = None
        for _ in range(self._steps):
            self.state, scalars = self._step(self.state, *self._inputs)
            jax.device_get(running)
            running = scalars
        return self.state.step


class Watched:
    """The same interval as in training: every output is kept, summed up and written, with alarms.

    Attributes:
      write_seconds: how long the fetching and writing of each interval took, with nothing
        else under way.
    """

    def __init__(self, config: Config, workdir: Path):
        setup = make_train_setup(config, make_mesh(config))
        self.setup = setup
        self._inputs = _inputs(config, setup)
        self.state = setup.init(config.train.seed)
        self._steps = config.train.log_every
        self._metrics = MetricsFile(workdir, 0)
        routing = RoutingLog(workdir, config.moe_layers, config.moe.num_choices, LAYER_METRICS)
        alarms = AlarmLog(workdir, 0, config)
        self._recorder = Recorder(self._metrics, routing, 0, alarms)
        self.write_seconds: list[float] = []
        train_step = make_train_step(setup)
        with jax.set_mesh(setup.mesh):
            lowered = train_step.lower(self.state, *self._inputs, WITHOUT_NORMS)
            self._step = lowered.compile()

    def __call__(self) -> Any:
        """Takes the steps of an interval, of which the last has norms, and writes it."""
        self.state, running = self._step(self.state, *self._inputs, np.bool_(self._steps == 1))
        for number in range(2, self._steps + 1):
            has_norms = np.bool_(number == self._steps)
            self.state, output = self._step(self.state, *self._inputs, has_norms)
            self._recorder.add(running)  # which waits for it while the next one runs
            running = output
        self._recorder.add(running)
        jax.block_until_ready(self.state)
        started = time.perf_counter()
        self._recorder.flush()
        self.write_seconds.append(time.perf_counter() - started)
        return self.state.step

    def close(self) -> None:
        """Closes the files."""
        self._metrics.close()
