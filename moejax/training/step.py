"""One training step: sums first, losses of the sums, gradients, then optax."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import Config, Knobs
from moejax.data.batches import Batch
from moejax.moe.balancing.metrics import routing_metrics
from moejax.moe.balancing.stats import RoutingStats, join
from moejax.sharding import batch_sharding, replicated
from moejax.training.accumulation import loss_and_gradients
from moejax.training.health.norms import norms_if
from moejax.training.learning_rate import learning_rate_at
from moejax.training.losses import BatchSums, losses
from moejax.training.optimizers.frozen import join_params, split_frozen
from moejax.training.router_state import (
    schedule_router_state,
    state_arrays,
    state_metrics,
    update_router_state,
)
from moejax.training.schedules import factor, scheduled, scheduled_leaves
from moejax.training.state import TrainSetup, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step reports of the global batch.

    Attributes:
      scalars: losses, and means over layers of what follows, also of the routers of attention,
        whose statistics are in nothing else.
      routing: sums by layer; None for a dense model.
      layers: `balance.routing_metrics` of each MoE layer, `[N]` each; empty for a dense model.
      state: `router_state.state_arrays` after the step and the norms of experts, `[N, E]` each;
        empty for a dense model.
    """

    scalars: dict[str, jax.Array]
    routing: RoutingStats | None
    layers: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    state: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "tpu": {"xla_tpu_enable_async_all_to_all": True}
}
"""By platform: without it XLA:TPU computes nothing while tokens are sent."""

TrainStep = Callable[[TrainState, Batch, Knobs], tuple[TrainState, StepOutput]]
"""A train step."""


def row_keys(config: Config, knobs: Knobs, step: jax.Array, batch_size: int) -> jax.Array | None:
    """Returns a key for each row of the global batch of a step, or None if nothing is drawn.

    A pure function of seed, step and row: what is drawn depends neither on the mesh nor on
    accumulation, and a resumed run draws what it would have drawn.
    """
    if not any(moe.draws for moe in config.moe_groups):
        return None
    run_key = jax.random.key(knobs.seed)
    step_key = jax.random.fold_in(run_key, step)

    def key_of_row(row):
        return jax.random.fold_in(step_key, row)

    rows_B = jnp.arange(batch_size)
    return jax.vmap(key_of_row)(rows_B)


def make_train_step(setup: TrainSetup) -> jax.stages.Wrapped:
    """Compiles, on first call, `(state, batch, knobs, has_norms=True) -> (state, StepOutput)`.

    Without norms of gradients, updates and weights, NaN is in their place. The buffers of the old
    state are reused.
    """
    return jax.jit(
        train_step_of(setup),
        donate_argnums=0,
        out_shardings=(setup.shardings, replicated(setup.mesh)),
        compiler_options=compiler_options(setup.mesh),
    )


def compiler_options(mesh: Mesh) -> dict[str, bool | str] | None:
    """Returns the compiler options of train steps for the mesh's platform."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)


def train_step_of(setup: TrainSetup) -> TrainStep:
    """Returns the function that `make_train_step` compiles."""
    config = setup.config

    def train_step(
        state: TrainState, batch: Batch, knobs: Knobs, has_norms: jax.Array | bool = True
    ) -> tuple[TrainState, StepOutput]:
        num_rows = len(batch.tokens_BL)
        keys_B = row_keys(config, knobs, state.step, num_rows)
        knobs = scheduled(knobs, config, state.step)
        grads, sums = loss_and_gradients(
            setup, state.params, state.router_state, batch, knobs, keys_B
        )
        scalars = losses(sums, knobs, config)
        grad_norm = optax.tree.norm(grads)
        learning_rate = learning_rate_at(config, knobs, state.step)
        updated, updates = _updated(setup, state, grads, learning_rate, sums, knobs)
        trees = {"gradient": grads, "update": updates, "weight": state.params}
        is_finite = _is_finite(updated, scalars["loss/total"], grad_norm)
        new_state = _applied_if(is_finite, updated, state, config)
        scalars |= {
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_targets": sums.num_targets,
            "skipped_steps": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        norms = norms_if(has_norms, trees, config.moe.num_choices)
        scalars |= norms.by_kind
        output = _output_of(state.step, sums, new_state, scalars, config)
        return new_state, dataclasses.replace(output, state=output.state | norms.by_expert)

    return train_step


def _updated(
    setup: TrainSetup,
    state: TrainState,
    grads: nnx.State,
    learning_rate: jax.Array,
    sums: BatchSums,
    knobs: Knobs,
) -> tuple[TrainState, nnx.State]:
    """Returns the state after a step that is applied, apart from its counters, and the updates."""
    params, opt_state, updates = apply_gradients(setup, state, grads, learning_rate)
    router_state = state.router_state
    if sums.routing:
        router_state = update_router_state(router_state, sums.routing, setup.config, knobs)
    updated = dataclasses.replace(
        state,
        params=params,
        opt_state=opt_state,
        router_state=router_state,
        average=averaged(state, params, setup.config.train.average_decay),
    )
    return updated, updates


def averaged(state: TrainState, params: nnx.State, decay: float) -> nnx.State | None:
    """Returns the moving average of the parameters after a step; None where none is kept.

    The first steps decay faster, (1 + t) / (10 + t) after t steps, so that the average does not
    remember the initial weights for long.
    """
    if state.average is None:
        return None
    steps = state.step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + steps) / (10 + steps))

    def mix(average: jax.Array, new: jax.Array) -> jax.Array:
        return average + (1 - kept) * (new - average)

    return jax.tree.map(mix, state.average, params)


def apply_gradients(
    setup: TrainSetup, state: TrainState, grads: nnx.State, learning_rate: jax.Array
) -> tuple[nnx.State, optax.OptState, nnx.State]:
    """Returns parameters and the optimizer's state after a step, and what was added.

    Args:
      setup: the run's fixed part.
      state: before the step.
      grads: of the parameters that are trained.
      learning_rate: of the step.
    """
    trained, frozen = split_frozen(setup.config.optimizer, state.params)
    updates, opt_state = setup.optimizer.update(
        grads, state.opt_state, trained, learning_rate=learning_rate
    )
    trained = optax.apply_updates(trained, updates)
    return join_params(trained, frozen), opt_state, updates


def _is_finite(updated: TrainState, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Returns whether a step may be applied.

    An update may overflow although loss and gradient are finite: the new state is looked at, too.
    """
    arrays = (updated.params, updated.opt_state, updated.router_state)
    is_loss_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    return is_loss_finite & all_finite(arrays)


def _applied_if(
    is_finite: jax.Array, new: TrainState, old: TrainState, config: Config
) -> TrainState:
    """Returns the new arrays if they are finite, or else the old ones, with counters."""

    def choose(new_array, old_array):
        return jnp.where(is_finite, new_array, old_array)

    def keep(new_arrays, old_arrays):
        return jax.tree.map(choose, new_arrays, old_arrays)

    router_state = old.router_state
    if config.num_moe_layers:
        # What a schedule sets is a function of the step, whether or not the step was applied.
        kept = keep(new.router_state, old.router_state)
        router_state = schedule_router_state(kept, config, old.step + 1)
    return TrainState(
        step=old.step + 1,
        params=keep(new.params, old.params),
        router_state=router_state,
        opt_state=keep(new.opt_state, old.opt_state),
        skipped=old.skipped + ~is_finite,
        skipped_in_row=jnp.where(is_finite, 0, old.skipped_in_row + 1),
        average=keep(new.average, old.average),
    )


def _output_of(
    step: jax.Array,
    sums: BatchSums,
    new_state: TrainState,
    scalars: dict[str, jax.Array],
    config: Config,
) -> StepOutput:
    """Returns what a step reports, with the routing of its MoE layers if it has any."""
    routing = join(sums.routing)
    if routing is None:
        return StepOutput(scalars, routing)
    if routing.attention is not None:
        metrics = routing_metrics(routing.attention)
        scalars = scalars | {f"attention/{name}": each.mean() for name, each in metrics.items()}
        routing = dataclasses.replace(routing, attention=None)
    by_layer = routing_metrics(routing)
    by_expert = state_arrays(new_state.router_state)
    scalars = scalars | _routing_scalars(by_layer, by_expert, config, step)
    return StepOutput(scalars, routing, by_layer, by_expert)


def _routing_scalars(
    by_layer: dict[str, jax.Array],
    by_expert: dict[str, jax.Array],
    config: Config,
    step: jax.Array,
) -> dict[str, jax.Array]:
    """Returns means over layers of routing metrics, and the factors that schedules set."""
    scalars = {f"moe/{name}": values_N.mean() for name, values_N in by_layer.items()}
    scalars |= state_metrics(by_expert)
    for name in scheduled_leaves(config):
        scalars[f"schedule/{name}"] = factor(config, name, step)
    return scalars


def all_finite(tree) -> jax.Array:
    """Returns whether all floating-point arrays of a tree are finite."""
    arrays = jax.tree.leaves(tree)
    floats = [array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
    is_finite_A = jnp.stack([jnp.isfinite(array).all() for array in floats])
    return is_finite_A.all()


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that this process's devices hold, in rising order."""
    sharding = batch_sharding(mesh)
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows: set[int] = set()
    for part in parts:
        if part:
            held = range(batch_size)[part[0]]
            rows.update(held)
    return sorted(rows)


def put_batch(batch, setup: TrainSetup):
    """Makes global arrays of the rows of this process, split over the mesh's batch axes.

    See `rows_of_process`.
    """
    sharding = batch_sharding(setup.mesh)

    def put(array):
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(put, batch)
