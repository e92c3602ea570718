"""Evaluates a saved run on whatever devices there are."""

import dataclasses
import functools
import math
from contextlib import closing
from pathlib import Path

import jax
from flax import nnx

from moejax.config import Config, MeshConfig
from moejax.data import Corpus, eval_batches, load_tokenizer
from moejax.models.placement import place_experts
from moejax.moe.expert_parallel.placement import PlacementError, place
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides
from moejax.paths import resolve_path
from moejax.sharding import EXPERT_AXES, make_mesh, tree_shardings
from moejax.training.checkpoints.averages import restore_weights
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.evaluation import Evaluation, domains_of, evaluate
from moejax.training.program import Program
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
    average: str = "",
) -> tuple[Config, int, Evaluation]:
    """Evaluates a checkpoint on the validation split, with the run's own tokenizer.

    Args:
      workdir: the run directory.
      step: a saved step; None takes the newest.
      mesh: of all devices; None splits the batch over as many as divide it, with the weights on
        each of them.
      replicas: experts are placed by the load of the run's newest evaluation, with that many
        replicas on each device; None: the identity placement.
      places: where the user says that the run's text is.
      average: of weights, see `training.checkpoints.averages`.

    Returns:
      The run's configuration, the step and the figures.

    Raises:
      ConfigError: the model does not fit the mesh.
      PlacementError: experts cannot be placed in that way.
    """
    workdir = resolve_path(workdir)
    config = read_config(workdir)
    setup = make_eval_setup(config, mesh)
    checkpoints = Checkpoints(workdir, setup, read_only=True)
    step, params, router_state = restore_weights(checkpoints, step, average)
    overrides = AS_TRAINED
    if replicas is not None:
        setup, params, overrides = _place_by_load(workdir, setup, params, router_state, replicas)
    corpus = open_run_corpus(workdir, load_tokenizer(workdir), places)
    evaluation = evaluate_on(corpus, setup, params, router_state, overrides)
    return config, step, evaluation


def evaluate_on(
    corpus: Corpus,
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    overrides: RoutingOverrides,
) -> Evaluation:
    """Evaluates a model on the validation split of rows.

    Args:
      corpus: the rows.
      setup: of the model, on the mesh on which its arrays are.
      params: of the model.
      router_state: what else it carries.
      overrides: how it routes otherwise than as trained.
    """
    train = setup.config.train
    microbatch = train.batch_size // train.accumulation
    with jax.set_mesh(setup.mesh), closing(eval_batches(corpus, microbatch)) as batches:
        domains = domains_of(corpus)
        num_domains = len(domains.domains) if domains else 0
        program = Program(setup)
        eval_step = program.make_eval_step(num_domains)
        (evaluation,) = evaluate(
            program,
            functools.partial(eval_step, overrides=overrides),
            params,
            router_state,
            batches,
            corpus.num_bytes["validation"],
            domains=domains,
        )
    return evaluation


def make_eval_setup(config: Config, mesh: MeshConfig | None) -> TrainSetup:
    """Returns the setup on a mesh of all devices, or on as many as divide a microbatch.

    Args:
      config: of the model; the mesh in it does not count.
      mesh: of all devices; None takes as many as divide a microbatch, each with all weights.

    Raises:
      ConfigError: the model does not fit the mesh.
    """
    microbatch = config.train.batch_size // config.train.accumulation
    if mesh:
        here = dataclasses.replace(config, mesh=mesh)
        return make_train_setup(here, make_mesh(here))
    counts = range(1, jax.device_count() + 1)
    num_devices = max(count for count in counts if microbatch % count == 0)
    devices = jax.devices()[:num_devices]
    here = dataclasses.replace(config, mesh=MeshConfig(data=num_devices))
    return make_train_setup(here, make_mesh(here, devices))


def _place_by_load(
    workdir: str | Path,
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    replicas: int,
) -> tuple[TrainSetup, nnx.State, RoutingOverrides]:
    """Returns the setup and the parameters of the same model with experts in other places.

    They are sharded as the mesh requires, and come with the overrides that say where experts are.
    """
    config, mesh = setup.config, setup.mesh
    devices = math.prod(mesh.shape[axis] for axis in EXPERT_AXES)
    refusal = f"--replicas={replicas} places experts on several devices; "
    if config.num_moe_layers == 0:
        raise PlacementError(f"{refusal}this model has none")
    if devices == 1:
        raise PlacementError(f"{refusal}say how many, as in --mesh=expert=4")
    load_NE = newest_evaluation(workdir)["load"][:, : config.moe.num_experts]
    model = nnx.merge(setup.graphdef, params, router_state)
    placed, overrides = place_experts(model, place(load_NE, devices, replicas))
    graphdef, params, _ = split_model(placed)
    params = jax.device_put(params, tree_shardings(logical_axes(params), mesh))
    return dataclasses.replace(setup, graphdef=graphdef), params, overrides
