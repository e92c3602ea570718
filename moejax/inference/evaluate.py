"""Evaluating a saved run on whatever devices there are."""

import dataclasses
import math
from contextlib import closing
from pathlib import Path

import jax
from flax import nnx

from moejax.config import Config, MeshConfig
from moejax.data import eval_batches, load_tokenizer
from moejax.moe.expert_parallel.placement import PlacementError, place
from moejax.paths import resolve_path
from moejax.sharding import EXPERT_AXES, make_mesh, tree_shardings
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.eval_step import make_eval_step
from moejax.training.evaluation import Evaluation, domains_of, evaluate
from moejax.training.run_directory.evaluation_log import newest_evaluation
from moejax.training.run_directory.layout import read_config
from moejax.training.run_directory.text import TextPlaces, open_run_corpus
from moejax.training.state import TrainSetup, logical_axes, make_train_setup, split_model


def evaluate_run(
    workdir: str | Path,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    replicas: int | None = None,
    *,
    places: TextPlaces | None = None,
) -> tuple[Config, int, Evaluation]:
    """Evaluates a checkpoint on the validation split, with the run's own tokenizer.

    Args:
      workdir: the run directory.
      step: a saved step; None takes the newest.
      mesh: of all devices; None splits the batch over as many as divide it, with the weights on
        each of them.
      replicas: experts are placed by the load of the run's newest evaluation, with so many copies
        on each device; None: in order, without copies.
      places: where the user says that the run's text is.

    Returns:
      The run's configuration, the step and the figures.

    Raises:
      ConfigError: the model does not fit the mesh.
      PlacementError: experts cannot be placed so.
    """
    workdir = resolve_path(workdir)
    config = read_config(workdir)
    microbatch = config.train.batch_size // config.train.accumulation
    num_devices = max(n for n in range(1, jax.device_count() + 1) if microbatch % n == 0)
    here = dataclasses.replace(config, mesh=mesh or MeshConfig(data=num_devices))
    setup = make_train_setup(here, make_mesh(here, None if mesh else jax.devices()[:num_devices]))
    step, params, router_state = Checkpoints(workdir, setup, read_only=True).restore_model(step)
    if replicas is not None:
        setup, params, router_state = _placed(workdir, setup, params, router_state, replicas)
    corpus = open_run_corpus(workdir, load_tokenizer(workdir), places)
    with jax.set_mesh(setup.mesh), closing(eval_batches(corpus, microbatch)) as batches:
        domains = domains_of(corpus)
        eval_step = make_eval_step(setup, len(domains.domains) if domains else 0)
        num_bytes = corpus.num_bytes["validation"]
        evaluation = evaluate(
            eval_step, setup, params, router_state, batches, num_bytes, domains=domains
        )
    if evaluation is None:
        raise RuntimeError("the evaluation was given up though nothing asked for it")
    return config, step, evaluation


def _placed(
    workdir: str | Path,
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    replicas: int,
):
    """The same model with experts in other places, each array where the mesh wants it."""
    config, mesh = setup.config, setup.mesh
    devices = math.prod(mesh.shape[axis] for axis in EXPERT_AXES)
    if devices == 1 or config.num_moe_layers == 0:
        raise PlacementError(
            f"--replicas={replicas} places experts on several devices; "
            + (
                "say how many, as in --mesh=expert=4"
                if config.num_moe_layers
                else "this model has none"
            )
        )
    load_NE = newest_evaluation(workdir)["load"][:, : config.moe.num_experts]
    model = nnx.merge(setup.graphdef, params, router_state)
    model.place_experts(place(load_NE, devices, replicas))
    graphdef, *states = split_model(model)
    placed = [jax.device_put(state, tree_shardings(logical_axes(state), mesh)) for state in states]
    return dataclasses.replace(setup, graphdef=graphdef), *placed
