"""Times train steps against those of the dense twin, compilation, and the import of moejax."""

import dataclasses
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from moejax.benchmarks.timing import interleave, rounded
from moejax.config import Config, Knobs, ScheduleConfig
from moejax.data import Batch
from moejax.models.parameters import count_parameters
from moejax.moe.experts.experts import Network
from moejax.sharding import make_mesh
from moejax.training.state import make_train_setup
from moejax.training.step import make_train_step, put_batch

WITHOUT_NORMS = np.bool_(False)
"""Of gradients, updates and weights: as in all steps but one of each logging interval."""

IMPORTS = ("import jax, flax.nnx", "import moejax.models, moejax.moe.layer, moejax.config")


def dense_twin(config: Config) -> Config:
    """Returns the dense model with the same active parameters per token.

    Its feed-forward networks are SwiGLU of width `d_ff`.
    """
    moe = config.moe
    d_model = config.model.d_model
    network = Network(moe.activation)
    num_matrices = network.num_projections + 1
    inner = moe.d_latent or d_model
    active_experts = min(moe.top_k, moe.num_experts)
    routed = active_experts * num_matrices * inner * moe.d_expert
    latent = 2 * d_model * moe.d_latent
    shared = num_matrices * d_model * moe.shared_width
    active = routed + latent + shared
    width = round(active / (3 * d_model))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, d_ff=width),
        moe=dataclasses.replace(config.moe, num_experts=0, per_layer=""),
        schedule=ScheduleConfig(),
    )


def bench_step(config: Config, repetitions: int) -> dict[str, Any]:
    """Times train steps, on random tokens, of a MoE config and its dense twin."""
    twin = dense_twin(config)
    times = interleave({"moe": Step(config), "dense": Step(twin)}, repetitions)
    moe, dense = times["moe"], times["dense"]
    tokens = config.train.batch_size * config.data.seq_len
    return {
        "ratio": round(moe.median_ms / dense.median_ms, 3),
        "moe_ms": round(moe.median_ms, 2),
        "dense_ms": round(dense.median_ms, 2),
        "moe_quartiles_ms": rounded(moe.quartiles_ms, 2),
        "dense_quartiles_ms": rounded(dense.quartiles_ms, 2),
        "moe_tokens_per_s": round(1e3 * tokens / moe.median_ms),
        "moe_active_parameters": count_parameters(config).active,
        "dense_parameters": count_parameters(twin).active,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


def bench_compile(config: Config, repetitions: int) -> dict[str, Any]:
    """Times lowering and compiling the train step, by the number of experts and of layers."""
    variants = {
        "8 experts": _with_experts(config, 8),
        "64 experts": _with_experts(config, 64),
        "2 layers": _with_layers(config, 2),
        "8 layers": _with_layers(config, 8),
    }
    repetitions = max(1, repetitions // 5)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, variant in variants.items():
            jax.clear_caches()
            times[name].append(Step.compile_seconds(variant))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    seconds = {f"seconds, {name}": round(median, 2) for name, median in medians.items()}
    return {
        "ratio_experts_64_to_8": round(medians["64 experts"] / medians["8 experts"], 3),
        "ratio_layers_8_to_2": round(medians["8 layers"] / medians["2 layers"], 3),
        **seconds,
        "repetitions": repetitions,
    }


def _with_experts(config: Config, num_experts: int) -> Config:
    """Returns the same model with another number of experts."""
    moe = dataclasses.replace(config.moe, num_experts=num_experts)
    return dataclasses.replace(config, moe=moe)


def _with_layers(config: Config, num_layers: int) -> Config:
    """Returns the same model with another number of layers."""
    model = dataclasses.replace(config.model, num_layers=num_layers)
    return dataclasses.replace(config, model=model)


def bench_import(repetitions: int) -> dict[str, Any]:
    """Times fresh interpreters that import jax and flax, or moejax's model code."""
    times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for repetition in range(repetitions + 1):
        for statement in IMPORTS:
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            if repetition:  # the first ones fill the file cache
                times[statement].append(time.perf_counter() - started)
    base, ours = [statistics.median(times[statement]) for statement in IMPORTS]
    return {
        "ratio": round(ours / base, 3),
        "moejax_s": round(ours, 3),
        "jax_and_flax_s": round(base, 3),
        "repetitions": repetitions,
    }


class Step:
    """A compiled train step with its state and a batch of random tokens; a call takes one step."""

    def __init__(self, config: Config):
        setup = make_train_setup(config, make_mesh(config))
        self.setup = setup
        self.knobs = Knobs.from_config(config)
        self.batch = put_batch(random_batch(config), setup)
        self.state = setup.init(config.train.seed)
        with jax.set_mesh(setup.mesh):
            train_step = make_train_step(setup)
            lowered = train_step.lower(self.state, self.batch, self.knobs, WITHOUT_NORMS)
            self._step = lowered.compile()

    def __call__(self) -> Any:
        """Takes one step and returns its metrics, which may not be there yet."""
        self.state, output = self._step(self.state, self.batch, self.knobs, WITHOUT_NORMS)
        return self.state.step, output

    @staticmethod
    def compile_seconds(config: Config) -> float:
        """Returns how long tracing, lowering and compiling take; nothing is run."""
        setup = make_train_setup(config, make_mesh(config))
        batch = put_batch(random_batch(config), setup)
        with jax.set_mesh(setup.mesh):
            started = time.perf_counter()
            knobs = Knobs.from_config(config)
            train_step = make_train_step(setup)
            lowered = train_step.lower(setup.abstract, batch, knobs)
            lowered.compile()
            return time.perf_counter() - started


def random_batch(config: Config) -> Batch:
    """Draws full rows of random tokens, one document each."""
    batch_size = config.train.batch_size
    length = config.data.seq_len
    shape = (batch_size, length)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, config.num_token_ids, (batch_size, length + 1))
    ids = drawn.astype(np.int32)
    position_L = np.arange(length, dtype=np.int32)
    return Batch(
        tokens_BL=ids[:, :-1],
        targets_BL=ids[:, 1:],
        segments_BL=np.ones(shape, np.int32),
        positions_BL=np.broadcast_to(position_L, shape),
        loss_mask_BL=np.ones(shape, bool),
    )
