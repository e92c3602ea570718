"""One training step: sums first, losses of the sums, then optax.

The forward pass returns sums over tokens (`BatchSums`). Every loss is a pure function of the sums of the
whole global batch, so that it is the same for any mesh and any gradient accumulation.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import Config, Knobs
from moejax.data.batches import Batch
from moejax.moe.balancing.losses import LOSSES, auxiliary_losses
from moejax.moe.balancing.metrics import routing_metrics
from moejax.moe.balancing.stats import RoutingStats, add_stats, join
from moejax.sharding import batch_sharding, replicated
from moejax.training.optimizer import make_schedule
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
class BatchSums:
    """Sums over the real targets of a batch; they add up over microbatches.

    Attributes:
      nats: cross-entropy of the language model, float32.
      num_targets: predicted tokens, float32.
      routing: `RoutingStats` of each run of equal MoE layers, stacked by layer; empty for a
        dense model.
    """

    nats: jax.Array
    num_targets: jax.Array
    routing: tuple[RoutingStats, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step reports of the global batch.

    Attributes:
      scalars: losses, and means over layers of what follows.
      routing: sums by layer; None for a dense model.
      layers: `balance.routing_metrics` of each MoE layer, `[N]` each; empty for a dense model.
      state: `router_state.state_arrays` after the step, `[N, E]` each; empty for a dense model.
    """

    scalars: dict[str, jax.Array]
    routing: RoutingStats | None
    layers: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    state: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "tpu": {"xla_tpu_enable_async_all_to_all": True}
}
"""By platform: else XLA:TPU computes nothing while tokens travel."""

TrainStep = Callable[[TrainState, Batch, Knobs], tuple[TrainState, StepOutput]]
"""A train step."""


def forward_sums(
    model,
    batch: Batch,
    knobs: Knobs | None = None,
    keys_B: jax.Array | None = None,
    *,
    trace: bool = False,
) -> BatchSums:
    """Runs the model on packed rows and sums up its losses and routing.

    Args:
      model: a `Decoder`.
      batch: packed rows `[B, L]`.
      knobs: traced scalars of training; None is evaluation: dropless unless configured otherwise,
        and without noise.
      keys_B: a key per row, from which training draws.
      trace: keep token-level routing in the sums of routing.
    """
    nats_BL, routing = forward(model, batch, knobs, keys_B, trace)
    return BatchSums(nats_BL.sum(), count_targets(batch), routing)


def forward(model, batch: Batch, knobs: Knobs | None, keys_B: jax.Array | None, trace: bool):
    """Cross-entropy of each target, 0 where there is none, and the routing."""
    logits_BLV, routing = model(
        batch.tokens_BL,
        batch.segments_BL,
        batch.positions_BL,
        knobs=knobs,
        keys_B=keys_B,
        trace=trace,
    )
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
    return jnp.where(batch.loss_mask_BL, nats_BL, 0.0), routing


def add_sums(first: BatchSums, second: BatchSums) -> BatchSums:
    """The sums of two batches together."""
    routing = tuple(add_stats(*pair) for pair in zip(first.routing, second.routing, strict=True))
    return BatchSums(first.nats + second.nats, first.num_targets + second.num_targets, routing)


def row_keys(config: Config, knobs: Knobs, step: jax.Array, batch_size: int) -> jax.Array | None:
    """A key for each row of the global batch of a step, or None if nothing is drawn.

    A pure function of seed, step and row: what is drawn depends neither on the mesh nor on
    accumulation, and a resumed run draws what it would have drawn.
    """
    if not any(moe.draws for moe in config.moe_groups):
        return None
    key = jax.random.fold_in(jax.random.key(knobs.seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch_size))


def count_targets(batch: Batch) -> jax.Array:
    """Predicted tokens of a batch, float32."""
    return batch.loss_mask_BL.sum(dtype=jnp.float32)


def losses(sums: BatchSums, knobs: Knobs, config: Config) -> dict[str, jax.Array]:
    """The language-model loss, the auxiliary losses and their total.

    Returns:
      `loss/lm` is the mean cross-entropy in nats. `loss/balance`, `loss/z` and others are means
      over the MoE layers that have them, unweighted; `loss/balance_weighted` and so on their
      contributions to `loss/total`: weight times the sum over layers, as in the published systems,
      where each layer adds its own term.

    Raises:
      ValueError: while tracing, if the sums are not those of as many layers as the configuration
        has MoE layers: a layer's losses would be silently absent.
    """
    reported = sum(stats.num_tokens.size for stats in sums.routing)
    if reported != config.num_moe_layers:
        raise ValueError(
            f"{reported} layers reported routing, and the model has {config.num_moe_layers} MoE layers"
        )
    found = {"loss/lm": sums.nats / jnp.maximum(sums.num_targets, 1.0)}
    total = found["loss/lm"]
    by_run = [
        auxiliary_losses(stats, moe)
        for stats, moe in zip(sums.routing, config.moe_groups, strict=True)
    ]
    for name in LOSSES:
        parts = [run[name] for run in by_run if name in run]
        if parts:
            weighted = getattr(knobs, f"{name}_weight") * sum(part.term_N.sum() for part in parts)
            value_N = jnp.concatenate([part.value_N for part in parts])
            found |= {f"loss/{name}": value_N.mean(), f"loss/{name}_weighted": weighted}
            total += weighted
    return found | {"loss/total": total}


def loss_and_gradients(
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    batch: Batch,
    knobs: Knobs,
    keys_B: jax.Array | None = None,
) -> tuple[nnx.State, BatchSums]:
    """Gradients of the total loss of the global batch, and its sums.

    With accumulation, microbatch i holds every a-th row. The balance loss is a product of means
    over the global batch, so its gradient in one microbatch depends on the sums of all: a first
    pass, forward only, collects them; the second differentiates each microbatch with the sums of
    the others held constant. A dense model needs no first pass.

    Args:
      setup: the run's fixed part.
      params: trained arrays.
      router_state: what routers carry besides.
      batch: the global batch.
      knobs: traced scalars.
      keys_B: from `row_keys`.
    """
    config = setup.config

    def sums_of(params, part):
        batch, keys_B = part
        model = nnx.merge(setup.graphdef, params, router_state)
        return forward_sums(model, batch, knobs, keys_B)

    def total_of(sums):
        return losses(sums, knobs, config)["loss/total"]

    if config.train.accumulation == 1:

        def loss(params):
            sums = sums_of(params, (batch, keys_B))
            return total_of(sums), sums

        return jax.grad(loss, has_aux=True)(params)

    parts = _split((batch, keys_B), config.train.accumulation)
    if config.num_moe_layers:
        total, quantile_margins = _sum_over(
            lambda part: _without_quantile_margins(sums_of(params, part)), add_sums, parts
        )
    else:
        # Cross-entropy is linear in its sum: only the number of targets matters to the gradient.
        total, quantile_margins = BatchSums(jnp.float32(0), count_targets(batch), ()), ()

    def gradients_of(part):
        def loss(params):
            sums, _ = _without_quantile_margins(sums_of(params, part))
            return total_of(
                jax.tree.map(lambda t, s: t + (s - jax.lax.stop_gradient(s)), total, sums)
            ), sums

        return jax.grad(loss, has_aux=True)(params), None

    def add(first, second):
        return jax.tree.map(jnp.add, first[0], second[0]), add_sums(first[1], second[1])

    (grads, sums), _ = _sum_over(gradients_of, add, parts)
    return grads, _with_quantile_margins(sums, quantile_margins)


def make_train_step(setup: TrainSetup) -> jax.stages.Wrapped:
    """Compiles, on first call, `(state, batch, knobs) -> (state, StepOutput)`; the old state's buffers are reused."""
    return jax.jit(
        train_step_of(setup),
        donate_argnums=0,
        out_shardings=(setup.shardings, replicated(setup.mesh)),
        compiler_options=compiler_options(setup.mesh),
    )


def compiler_options(mesh: Mesh) -> dict[str, bool | str] | None:
    """Of train steps, for the mesh's platform."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)


def train_step_of(setup: TrainSetup) -> TrainStep:
    """The function that `make_train_step` compiles."""
    config = setup.config
    schedule = make_schedule(config.optimizer, config.train.num_steps)

    def train_step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, StepOutput]:
        keys_B = row_keys(config, knobs, state.step, batch.tokens_BL.shape[0])
        knobs = scheduled(knobs, config, state.step)
        grads, sums = loss_and_gradients(
            setup, state.params, state.router_state, batch, knobs, keys_B
        )
        scalars = losses(sums, knobs, config)
        grad_norm = optax.tree.norm(grads)
        learning_rate = schedule(state.step) * knobs.learning_rate
        params, opt_state = apply_gradients(setup, state, grads, learning_rate)
        router_state, routing = state.router_state, join(sums.routing)
        if routing is not None:
            router_state = update_router_state(router_state, sums.routing, config, knobs)
        # An update may overflow although loss and gradient are finite: the new state is
        # looked at, too.
        is_finite = (
            jnp.isfinite(scalars["loss/total"])
            & jnp.isfinite(grad_norm)
            & all_finite((params, opt_state, router_state))
        )

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

        by_layer, by_expert = {}, {}
        if routing is not None:
            # What a schedule sets is a function of the step, whether or not the step was applied.
            router_state = schedule_router_state(
                keep(router_state, state.router_state), config, state.step + 1
            )
            by_layer, by_expert = routing_metrics(routing), state_arrays(router_state)
            scalars |= {f"moe/{name}": values_N.mean() for name, values_N in by_layer.items()}
            scalars |= state_metrics(by_expert)
            scalars |= {
                f"schedule/{name}": factor(config, name, state.step)
                for name in scheduled_leaves(config)
            }
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            router_state=router_state,
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + ~is_finite,
            skipped_in_row=jnp.where(is_finite, 0, state.skipped_in_row + 1),
        )
        scalars |= {
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_targets": sums.num_targets,
            "skipped_steps": state.skipped,
            "skipped_in_row": state.skipped_in_row,
        }
        return state, StepOutput(scalars, routing, by_layer, by_expert)

    return train_step


def apply_gradients(
    setup: TrainSetup, state: TrainState, grads: nnx.State, learning_rate: jax.Array
) -> tuple[nnx.State, optax.OptState]:
    """The parameters and the state of the optimizer after a step."""
    updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
    return jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates), opt_state


def all_finite(tree) -> jax.Array:
    """Whether all floating-point arrays of a tree are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def rows_of_process(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a global batch that this process's devices hold, increasing: all of them if it is alone."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in held if part for row in range(*part[0].indices(batch_size))})


def put_batch(batch, setup: TrainSetup):
    """Arrays of the rows of this process, see `rows_of_process`, as global ones, split over the mesh's batch axes."""
    sharding = batch_sharding(setup.mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _split(tree, parts: int):
    """`[parts, B / parts, ...]`; every device's rows are spread over all parts, so that nothing moves."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def _sum_over(function, add, parts):
    """Over the leading axis of `parts`, one at a time: the sum of `function`'s first result, and all its second ones.

    What is summed starts at 0, which `add` must leave alone.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first)[0])

    def body(total, part):
        summed, each = function(part)
        return add(total, summed), each

    return jax.lax.scan(body, zeros, parts)


def _without_quantile_margins(sums: BatchSums) -> tuple[BatchSums, tuple[jax.Array | None, ...]]:
    """The sums apart from the arrays that do not add up."""
    routing = tuple(dataclasses.replace(stats, quantile_margins_TE=None) for stats in sums.routing)
    return dataclasses.replace(sums, routing=routing), tuple(
        stats.quantile_margins_TE for stats in sums.routing
    )


def _with_quantile_margins(
    sums: BatchSums, quantile_margins: tuple[jax.Array | None, ...]
) -> BatchSums:
    """The sums with the offers of all tokens, from those of each microbatch, `[P, N, T, E]`."""

    def whole(margins_PNTE):
        if margins_PNTE is None:
            return None
        parts, layers, tokens, experts = margins_PNTE.shape
        return margins_PNTE.swapaxes(0, 1).reshape(layers, parts * tokens, experts)

    routing = tuple(
        dataclasses.replace(stats, quantile_margins_TE=whole(o))
        for stats, o in zip(sums.routing, quantile_margins, strict=True)
    )
    return dataclasses.replace(sums, routing=routing)
