"""Evaluating a saved run on whatever devices there are."""

import dataclasses
from contextlib import closing
from pathlib import Path

import jax

from moejax.config import Config, MeshConfig
from moejax.data import eval_batches, load_tokenizer, prepare
from moejax.sharding import make_mesh
from moejax.training.checkpoint import Checkpoints
from moejax.training.evaluation import Evaluation, evaluate
from moejax.training.run_directory import read_config
from moejax.training.state import make_trainable
from moejax.training.step import make_eval_step


def evaluate_run(workdir: str | Path, step: int | None = None) -> tuple[Config, int, Evaluation]:
    """Evaluates a checkpoint on the validation split, with the run's own tokenizer.

    The batch is split over as many devices as divide it; the weights are on each of them.

    Args:
      workdir: the run directory.
      step: a saved step; None takes the newest.

    Returns:
      The run's configuration, the step and the figures.
    """
    config = read_config(workdir)
    microbatch = config.train.batch_size // config.train.accumulation
    num_devices = max(n for n in range(1, jax.device_count() + 1) if microbatch % n == 0)
    here = dataclasses.replace(config, mesh=MeshConfig(data=num_devices))
    trainable = make_trainable(here, make_mesh(here, jax.devices()[:num_devices]))
    step, params, router_state = Checkpoints(workdir, trainable, read_only=True).restore_model(step)
    corpus = prepare(config.data, load_tokenizer(workdir))
    with jax.set_mesh(trainable.mesh), closing(eval_batches(corpus, microbatch)) as batches:
        evaluation = evaluate(
            make_eval_step(trainable), trainable, params, router_state, batches, corpus.num_bytes["validation"]
        )
    if evaluation is None:
        raise RuntimeError("the evaluation was given up though nothing asked for it")
    return config, step, evaluation
