"""Whole training steps: their time beside the dense twin's, the time to compile them, and the time to import moejax."""

import dataclasses
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from moejax.benchmarks.timing import interleave
from moejax.config import Config, Knobs, ScheduleConfig
from moejax.data import Batch
from moejax.models.parameters import count_parameters
from moejax.moe.experts.experts import Network
from moejax.sharding import make_mesh
from moejax.training.state import make_train_setup
from moejax.training.step import make_train_step, put_batch

IMPORTS = ("import jax, flax.nnx", "import moejax.models, moejax.moe.layer, moejax.config")


def dense_twin(config: Config) -> Config:
    """The dense model with the same active parameters per token in its SwiGLU networks of width d_ff."""
    moe, d_model = config.moe, config.model.d_model
    projections = Network(moe.activation).num_projections + 1
    inner = moe.d_latent or d_model
    routed = (
        min(moe.top_k, moe.num_experts) * projections * inner * moe.d_expert
        + 2 * d_model * moe.d_latent
    )
    shared = moe.num_shared_experts * projections * d_model * moe.d_expert
    width = round((routed + shared) / (3 * d_model))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, d_ff=width),
        moe=dataclasses.replace(config.moe, num_experts=0, per_layer=""),
        schedule=ScheduleConfig(),
    )


def bench_step(config: Config, repetitions: int) -> dict[str, Any]:
    """Times whole training steps, on tokens drawn at random, of a MoE config and its dense twin."""
    times = interleave({"moe": Step(config), "dense": Step(dense_twin(config))}, repetitions)
    moe, dense = times["moe"], times["dense"]
    tokens = config.train.batch_size * config.data.seq_len
    return {
        "ratio": round(moe.median_ms / dense.median_ms, 3),
        "moe_ms": round(moe.median_ms, 2),
        "dense_ms": round(dense.median_ms, 2),
        "moe_quartiles_ms": [round(ms, 2) for ms in moe.quartiles_ms],
        "dense_quartiles_ms": [round(ms, 2) for ms in dense.quartiles_ms],
        "moe_tokens_per_s": round(1e3 * tokens / moe.median_ms),
        "moe_active_parameters": count_parameters(config).active,
        "dense_parameters": count_parameters(dense_twin(config)).active,
        "repetitions": repetitions,
        "device": jax.devices()[0].device_kind,
    }


def bench_compile(config: Config, repetitions: int) -> dict[str, Any]:
    """Times lowering and compiling the train step of models that differ in experts, and in layers."""
    moe, model = config.moe, config.model
    variants = {
        "8 experts": dataclasses.replace(config, moe=dataclasses.replace(moe, num_experts=8)),
        "64 experts": dataclasses.replace(config, moe=dataclasses.replace(moe, num_experts=64)),
        "2 layers": dataclasses.replace(config, model=dataclasses.replace(model, num_layers=2)),
        "8 layers": dataclasses.replace(config, model=dataclasses.replace(model, num_layers=8)),
    }
    repetitions = max(1, repetitions // 5)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, variant in variants.items():
            jax.clear_caches()
            times[name].append(Step.compile_seconds(variant))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {
        "ratio_experts_64_to_8": round(medians["64 experts"] / medians["8 experts"], 3),
        "ratio_layers_8_to_2": round(medians["8 layers"] / medians["2 layers"], 3),
        **{f"seconds, {name}": round(seconds, 2) for name, seconds in medians.items()},
        "repetitions": repetitions,
    }


def bench_import(repetitions: int) -> dict[str, Any]:
    """Times fresh interpreters that import jax and flax, or moejax's model code."""
    times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for repetition in range(repetitions + 1):
        for statement in IMPORTS:
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            if repetition:  # the first ones fill the file cache
                times[statement].append(time.perf_counter() - started)
    base, ours = (statistics.median(times[statement]) for statement in IMPORTS)
    return {
        "ratio": round(ours / base, 3),
        "moejax_s": round(ours, 3),
        "jax_and_flax_s": round(base, 3),
        "repetitions": repetitions,
    }


class Step:
    """A compiled train step with its state and a batch of random tokens; a call takes one step."""

    def __init__(self, config: Config):
        self.setup = make_train_setup(config, make_mesh(config))
        self.knobs = Knobs.from_config(config)
        self.batch = put_batch(random_batch(config), self.setup)
        self.state = self.setup.init(config.train.seed)
        with jax.set_mesh(self.setup.mesh):
            self._step = (
                make_train_step(self.setup).lower(self.state, self.batch, self.knobs).compile()
            )

    def __call__(self) -> Any:
        """Takes one step and returns its metrics, which may not be there yet."""
        self.state, output = self._step(self.state, self.batch, self.knobs)
        return self.state.step, output

    @staticmethod
    def compile_seconds(config: Config) -> float:
        """How long tracing, lowering and compiling take, without running anything."""
        setup = make_train_setup(config, make_mesh(config))
        batch = put_batch(random_batch(config), setup)
        with jax.set_mesh(setup.mesh):
            started = time.perf_counter()
            make_train_step(setup).lower(setup.abstract, batch, Knobs.from_config(config)).compile()
            return time.perf_counter() - started


def random_batch(config: Config) -> Batch:
    """Full rows of random tokens, one document each."""
    shape = (config.train.batch_size, config.data.seq_len)
    tokens_BL = (
        np.random.default_rng(0)
        .integers(0, config.num_token_ids, (shape[0], shape[1] + 1))
        .astype(np.int32)
    )
    return Batch(
        tokens_BL=tokens_BL[:, :-1],
        targets_BL=tokens_BL[:, 1:],
        segments_BL=np.ones(shape, np.int32),
        positions_BL=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        loss_mask_BL=np.ones(shape, bool),
    )
