"""Evaluates a saved run on whatever devices there are."""

import dataclasses
import functools
import math
from contextlib import closing
from pathlib import Path

import jax
from flax import nnx

from moejax.config import Config, MeshConfig, resolve_recorded, to_dict
from moejax.data import Corpus, eval_batches, load_tokenizer, prepare
from moejax.inference.load import load_released
from moejax.models.placement import place_experts
from moejax.moe.expert_parallel.placement import PlacementError, place
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides
from moejax.paths import resolve_path
from moejax.sharding import EXPERT_AXES, make_mesh, tree_shardings
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.evaluation import Evaluation, domains_of, evaluate
from moejax.training.program import Program
from moejax.training.run_directory.evaluation_log import newest_evaluation
from moejax.training.run_directory.layout import read_config
from moejax.training.run_directory.text import LONGEST_ROW, TextPlaces, open_run_corpus
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
      replicas: experts are placed by the load of the run's newest evaluation, with that many
        replicas on each device; None: the identity placement.
      places: where the user says that the run's text is.

    Returns:
      The run's configuration, the step and the figures.

    Raises:
      ConfigError: the model does not fit the mesh.
      PlacementError: experts cannot be placed in that way.
    """
    workdir = resolve_path(workdir)
    config = read_config(workdir)
    microbatch = config.train.batch_size // config.train.accumulation
    setup = _make_setup(config, microbatch, mesh)
    checkpoints = Checkpoints(workdir, setup, read_only=True)
    step, params, router_state = checkpoints.restore_model(step)
    overrides = AS_TRAINED
    if replicas is not None:
        setup, params, overrides = _place_by_load(workdir, setup, params, router_state, replicas)
    corpus = open_run_corpus(workdir, load_tokenizer(workdir), places)
    evaluation = _evaluate_on(corpus, setup, params, router_state, overrides)
    return config, step, evaluation


def evaluate_released(
    folder: str | Path,
    mesh: MeshConfig | None = None,
    *,
    places: TextPlaces | None = None,
    seq_len: int | None = None,
) -> tuple[Config, Evaluation]:
    """Evaluates a released model, on the speeches or on files of the user's.

    Args:
      folder: in the Hugging Face layout, with a tokenizer.
      mesh: of all devices; None splits the batch over as many as divide it, with the weights on
        each of them.
      places: of files, and of prepared rows.
      seq_len: tokens of a row; None takes the default of `data.seq_len`.

    Returns:
      The model's configuration with the text that it was evaluated on, and the figures.

    Raises:
      HfError: the folder holds something else than such a model.
      ConfigError: the model does not fit the mesh.
      DataError: there is no tokenizer, or no text.
    """
    loaded = load_released(folder)
    places = places or TextPlaces()
    data = dataclasses.replace(
        loaded.config.data,
        directory=places.directory or loaded.config.data.directory,
        files=places.files,
        source="files" if places.files else loaded.config.data.source,
        seq_len=seq_len or min(loaded.config.data.seq_len, LONGEST_ROW),
    )
    config = resolve_recorded(to_dict(dataclasses.replace(loaded.config, data=data)))
    microbatch = config.train.batch_size // config.train.accumulation
    setup = _make_setup(config, microbatch, mesh)
    corpus = prepare(data, loaded.tokenizer)
    _, params, router_state = split_model(loaded.model)
    params = jax.device_put(params, setup.shardings.params)
    router_state = jax.device_put(router_state, setup.shardings.router_state)
    return config, _evaluate_on(corpus, setup, params, router_state, AS_TRAINED)


def _evaluate_on(
    corpus: Corpus,
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    overrides: RoutingOverrides,
) -> Evaluation:
    """Evaluates a model on the validation split of rows."""
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


def _make_setup(config: Config, microbatch: int, mesh: MeshConfig | None) -> TrainSetup:
    """Returns the setup on a mesh of all devices, or on as many as divide a microbatch."""
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
