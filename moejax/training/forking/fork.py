"""The first state of a run that begins with the weights of another."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Config, ConfigError, read_names
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.checkpoints.meta import MODEL_FIELDS, manifest, split_items
from moejax.training.forking.fit import OF_EXPERTS, Array, Fit, fit_arrays
from moejax.training.forking.source import find_source
from moejax.training.forking.upcycle import Upcycling, check_upcycling, upcycle
from moejax.training.run_directory.changes import changes_of_weights
from moejax.training.run_directory.layout import recorded_lineage
from moejax.training.state import TrainSetup, TrainState

UPCYCLING = 0x5EED
"""Folded into the key of the initial weights, for what upcycling draws."""

log = logging.getLogger("moejax")


@dataclasses.dataclass(frozen=True)
class Beginning:
    """How far a run is when it begins.

    Attributes:
      step: steps done.
      num_tokens: targets trained on.
    """

    step: int = 0
    num_tokens: int = 0


def beginning_of(config: Config, workdir: Path) -> Beginning:
    """Returns how far a run is when it begins: as far as a source whose whole state it takes."""
    if not config.init.source or config.init.state != "all":
        return Beginning()
    source = find_source(config.init, workdir)
    return Beginning(source.step, source.num_tokens)


def lineage_of(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Returns the runs whose weights a run begins with, the nearest first; none without a source.

    What the run directory records already stays: the source may be gone.
    """
    if not config.init.source:
        return []
    return recorded_lineage(workdir) or find_source(config.init, workdir).lineage()


def fork_state(setup: TrainSetup, seed: int, workdir: Path) -> TrainState:
    """Returns the first state of a run that `init.source` gives its weights.

    Args:
      setup: of the run.
      seed: of what is initialised.
      workdir: of the run.

    Raises:
      ConfigError: the source does not fit.
      CheckpointError: the source is damaged.
    """
    config = setup.config
    source = find_source(config.init, workdir)
    _check_copies(config, source.config)
    source_setup = source.setup(setup.mesh, config)
    with source.checkpoints(source_setup) as checkpoints:
        if config.init.state == "weights":
            _, *trees = checkpoints.restore_model(source.step)
            if config.init.upcycle == "none":
                state = _with_weights(setup, seed, source_setup, trees)
            else:
                state = _upcycled(setup, seed, source.config, trees[0])
        else:
            state = _with_optimizer(setup, source_setup, checkpoints, source.step)
    for change in changes_of_weights(source.config, config):
        log.info("init: %s=%s here, %s in the source", change.key, change.wanted, change.saved)
    return state


def _check_copies(config: Config, source: Config) -> None:
    """Raises `ConfigError` for more experts beside some that have no weights."""
    is_larger = config.moe.num_experts != source.moe.num_experts
    has_others = config.moe.num_choices != config.moe.num_experts
    is_taken = "router" not in read_names("init.exclude", config.init.exclude)
    if config.init.resize == "copy" and is_larger and has_others and is_taken:
        raise ConfigError(
            f"init.resize=copy copies the router's columns by expert, and moe.num_experts="
            f"{config.moe.num_experts} are not its only ones; use init.exclude=router, or no zero, "
            "identity or constant experts"
        )


def _upcycled(setup: TrainSetup, seed: int, source: Config, params: nnx.State) -> TrainState:
    """Returns a state at step 0 whose experts are made of the networks of a dense model."""
    check_upcycling(setup.config, source)
    arrays = {_text("", path): variable[...] for path, variable in nnx.to_flat_state(params)}
    initial = setup.init(seed)
    key = jax.random.fold_in(jax.random.key(seed), UPCYCLING)

    def fill(initial: nnx.State, arrays: dict[str, jax.Array]) -> nnx.State:
        flat = nnx.to_flat_state(initial)
        own = {_text("", path): variable[...] for path, variable in flat}
        filled = upcycle(own, arrays, Upcycling(setup.config, source, key))
        variables = [(path, each.replace(filled[_text("", path)])) for path, each in flat]
        return nnx.from_flat_state(variables)

    with jax.set_mesh(setup.mesh):
        made = jax.jit(fill, out_shardings=setup.shardings.params)(initial.params, arrays)
    return setup.begin(made, initial.router_state)


def _with_optimizer(
    setup: TrainSetup, source_setup: TrainSetup, checkpoints: Checkpoints, step: int
) -> TrainState:
    """Returns the whole state of a source, at its step or at step 0."""
    init = setup.config.init
    _check_optimizer(setup, source_setup)
    num_steps = setup.config.train.num_steps
    if init.state == "all" and step >= num_steps:
        raise ConfigError(
            f"train.num_steps={num_steps} must be above {step}, the step at which "
            f"init.source={init.source} begins with init.state=all"
        )
    restored = checkpoints.restore(step)
    if restored is None:
        raise ConfigError(f"init.source={init.source} holds no step {step}; name another")
    state: TrainState = jax.device_put(restored, setup.shardings)
    if init.state == "all":
        return state
    return dataclasses.replace(state, step=jnp.zeros_like(state.step))


def _with_weights(
    setup: TrainSetup, seed: int, source_setup: TrainSetup, trees: list[Any]
) -> TrainState:
    """Returns a state at step 0 with weights of the source, and otherwise initial values."""
    fit = fit_arrays(_arrays_of(source_setup), _arrays_of(setup), setup.config.init)
    _log_fit(fit)
    found = {}
    for field, tree in zip(MODEL_FIELDS, trees, strict=True):
        for path, variable in nnx.to_flat_state(tree):
            found[_text(field, path)] = variable[...]
    initial = setup.init(seed)
    arrays = {here: found[source] for here, source in fit.taken.items()}

    def fill(initial: TrainState, arrays: dict[str, jax.Array]) -> tuple[nnx.State, nnx.State]:
        params = _filled("params", initial.params, arrays)
        return params, _filled("router_state", initial.router_state, arrays)

    shardings = (setup.shardings.params, setup.shardings.router_state)
    with jax.set_mesh(setup.mesh):
        params, router_state = jax.jit(fill, out_shardings=shardings)(initial, arrays)
    return setup.begin(params, router_state)


def _filled(field: str, tree: nnx.State, arrays: dict[str, jax.Array]) -> nnx.State:
    """Returns a tree with those of its arrays that are given."""
    filled = []
    for path, variable in nnx.to_flat_state(tree):
        given = arrays.get(_text(field, path))
        if given is not None:
            variable = variable.replace(_with_copies(given, variable))
        filled.append((path, variable))
    return nnx.from_flat_state(filled)


def _with_copies(given: jax.Array, variable: nnx.Variable) -> jax.Array:
    """Returns an array with as many experts as a variable: expert e is e modulo those given."""
    shape = variable[...].shape
    for axis, name in enumerate(variable.axes):
        if name in OF_EXPERTS and given.shape[axis] != shape[axis]:
            copied = jnp.arange(shape[axis]) % given.shape[axis]
            given = jnp.take(given, copied, axis=axis)
    return given


def _arrays_of(setup: TrainSetup) -> dict[str, Array]:
    """Returns shapes and axes of the arrays of a model, by path."""
    found = {}
    for field in MODEL_FIELDS:
        for path, variable in nnx.to_flat_state(getattr(setup.abstract, field)):
            found[_text(field, path)] = Array(variable.get_raw_value().shape, tuple(variable.axes))
    return found


def _text(field: str, path: tuple[Any, ...]) -> str:
    own = "/".join(map(str, path))
    return f"{field}/{own}" if field else own


def _check_optimizer(setup: TrainSetup, source: TrainSetup) -> None:
    """Raises `ConfigError` unless a fork has the arrays of its source, moments included."""
    wanted = manifest(setup.abstract)
    saved = manifest(source.abstract)
    if wanted == saved:
        return
    differing = [name for name in (*wanted, *saved) if wanted.get(name) != saved.get(name)]
    model, _ = split_items(dict.fromkeys(differing))
    what = "weights" if model else "moments"
    init = setup.config.init
    raise ConfigError(
        f"init.state={init.state} takes the optimizer of init.source={init.source}, whose {what} "
        f"differ from those here ({differing[0]}); use init.state=weights, or the source's "
        "optimizer and model"
    )


def _log_fit(fit: Fit) -> None:
    log.info("init: %d arrays are those of the source", len(fit.taken))
    if fit.initialised:
        own = [path.partition("/")[2] for path in fit.initialised]
        log.info("init: initialised here are %s", ", ".join(own))
