"""One training step and one evaluation step: sums first, losses of the sums, then optax.

The forward pass returns sums over tokens (`Sums`). Every loss is a pure function of the sums of the whole global batch,
so that it is the same for any mesh and any gradient accumulation.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config import Config, Knobs
from moejax.data.batches import Batch
from moejax.moe.balance import balance_loss, routing_metrics, z_loss
from moejax.moe.stats import RoutingStats
from moejax.sharding import batch_sharding, replicated
from moejax.training.optimizer import make_schedule
from moejax.training.state import Trainable, TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over the real targets of a batch; they add up over microbatches.

    Attributes:
      nats: cross-entropy of the language model, float32.
      num_targets: predicted tokens, float32.
      routing: `RoutingStats` stacked by layer; None for a dense model.
    """

    nats: jax.Array
    num_targets: jax.Array
    routing: RoutingStats | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step reports: scalars, and the routing sums of the global batch."""

    scalars: dict[str, jax.Array]
    routing: RoutingStats | None


TrainStep = Callable[[TrainState, Batch, Knobs], tuple[TrainState, StepOutput]]
"""A compiled train step."""


def forward_sums(model, batch: Batch, capacity_factor: jax.Array | None = None) -> Sums:
    """Runs the model on packed rows and sums up its losses and routing.

    Args:
      model: a `Decoder`.
      batch: packed rows `[B, L]`.
      capacity_factor: limit of capacity dispatch; None (evaluation) is dropless.
    """
    logits_BLV, routing = model(batch.tokens_BL, batch.segments_BL, batch.positions_BL, capacity_factor=capacity_factor)
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch.targets_BL)
    return Sums(
        nats=jnp.sum(jnp.where(batch.loss_mask_BL, nats_BL, 0.0)),
        num_targets=count_targets(batch),
        routing=routing,
    )


def count_targets(batch: Batch) -> jax.Array:
    """Predicted tokens of a batch, float32."""
    return batch.loss_mask_BL.sum(dtype=jnp.float32)


def losses(sums: Sums, knobs: Knobs, config: Config) -> dict[str, jax.Array]:
    """The language-model loss, the auxiliary losses and their total.

    Returns:
      `loss/lm` is the mean cross-entropy in nats. `loss/balance` and `loss/z` are means over MoE layers, unweighted;
      `loss/balance_weighted` and `loss/z_weighted` their contributions to `loss/total`: weight times the sum over
      layers, as in the published systems, where each layer adds its own term.

    Raises:
      ValueError: while tracing, if the sums are not those of as many layers as the configuration has MoE layers: a
        layer's losses would be silently absent.
    """
    reported = 0 if sums.routing is None else sums.routing.num_tokens.size
    if reported != config.num_moe_layers:
        raise ValueError(f"{reported} layers reported routing, and the model has {config.num_moe_layers} MoE layers")
    lm = sums.nats / jnp.maximum(sums.num_targets, 1.0)
    if sums.routing is None:
        return {"loss/lm": lm, "loss/total": lm}
    balance_N, z_N = balance_loss(sums.routing, config.moe.top_k), z_loss(sums.routing)
    balance_weighted = knobs.balance_weight * balance_N.sum()
    z_weighted = knobs.z_weight * z_N.sum()
    return {
        "loss/lm": lm,
        "loss/balance": balance_N.mean(),
        "loss/balance_weighted": balance_weighted,
        "loss/z": z_N.mean(),
        "loss/z_weighted": z_weighted,
        "loss/total": lm + balance_weighted + z_weighted,
    }


def loss_and_gradients(
    trainable: Trainable, params: nnx.State, router_state: nnx.State, batch: Batch, knobs: Knobs
) -> tuple[nnx.State, Sums]:
    """Gradients of the total loss of the global batch, and its sums.

    With accumulation, microbatch i holds every a-th row. The balance loss is a product of means over the global batch,
    so its gradient in one microbatch depends on the sums of all: a first pass, forward only, collects them; the second
    differentiates each microbatch with the sums of the others held constant. A dense model needs no first pass.
    """
    config = trainable.config

    def sums_of(params, batch):
        model = nnx.merge(trainable.graphdef, params, router_state)
        return forward_sums(model, batch, knobs.capacity_factor)

    def total_of(sums):
        return losses(sums, knobs, config)["loss/total"]

    if config.train.accumulation == 1:

        def loss(params):
            sums = sums_of(params, batch)
            return total_of(sums), sums

        return jax.grad(loss, has_aux=True)(params)

    microbatches = _split(batch, config.train.accumulation)
    if config.num_moe_layers:
        total = _sum_over(lambda microbatch: sums_of(params, microbatch), microbatches)
    else:
        # Cross-entropy is linear in its sum: only the number of targets matters to the gradient.
        total = Sums(jnp.float32(0), count_targets(batch), None)

    def gradients_of(microbatch):
        def loss(params):
            sums = sums_of(params, microbatch)
            return total_of(jax.tree.map(lambda t, s: t + (s - jax.lax.stop_gradient(s)), total, sums)), sums

        return jax.grad(loss, has_aux=True)(params)

    return _sum_over(gradients_of, microbatches)


def make_train_step(trainable: Trainable) -> jax.stages.Wrapped:
    """Compiles, on first call, `(state, batch, knobs) -> (state, StepOutput)`; the old state's buffers are reused."""
    schedule = make_schedule(trainable.config.optimizer, trainable.config.train.num_steps)

    def train_step(state: TrainState, batch: Batch, knobs: Knobs) -> tuple[TrainState, StepOutput]:
        grads, sums = loss_and_gradients(trainable, state.params, state.router_state, batch, knobs)
        scalars = losses(sums, knobs, trainable.config)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(scalars["loss/total"]) & jnp.isfinite(grad_norm)
        learning_rate = schedule(state.step) * knobs.learning_rate_scale
        updates, opt_state = trainable.optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            router_state=state.router_state,
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + ~is_finite,
            skipped_in_row=jnp.where(is_finite, 0, state.skipped_in_row + 1),
        )
        if sums.routing is not None:
            per_layer = routing_metrics(sums.routing, trainable.config.moe.top_k)
            scalars |= {f"moe/{name}": values_N.mean() for name, values_N in per_layer.items()}
        scalars |= {
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "num_targets": sums.num_targets,
            "skipped_steps": state.skipped,
            "skipped_in_row": state.skipped_in_row,
        }
        return state, StepOutput(scalars, sums.routing)

    return jax.jit(train_step, donate_argnums=0, out_shardings=(trainable.shardings, replicated(trainable.mesh)))


def make_eval_step(trainable: Trainable) -> Callable[[nnx.State, nnx.State, Batch], Sums]:
    """Compiles, on first call, `(params, router_state, batch) -> Sums`, dropless and without noise."""

    def eval_step(params: nnx.State, router_state: nnx.State, batch: Batch) -> Sums:
        return forward_sums(nnx.merge(trainable.graphdef, params, router_state), batch)

    return jax.jit(eval_step, out_shardings=replicated(trainable.mesh))


def put_batch(batch: Batch, trainable: Trainable) -> Batch:
    """This process's rows as global arrays, split over the batch axes of the mesh."""
    sharding = batch_sharding(trainable.mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _split(batch: Batch, parts: int) -> Batch:
    """`[parts, B / parts, ...]`; every device's rows are spread over all parts, so that nothing moves."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def _sum_over(function, microbatches):
    """Sum of `function(microbatch)` over the leading axis, one at a time."""
    first = jax.tree.map(lambda x: x[0], microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))

    def body(total, microbatch):
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    return jax.lax.scan(body, zeros, microbatches)[0]
