"""Gradients of the total loss of a global batch, whole or in microbatches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config import Knobs
from moejax.data.batches import Batch
from moejax.training.losses import BatchSums, add_sums, count_targets, forward_sums, losses
from moejax.training.optimizers.frozen import join_params, split_frozen
from moejax.training.state import TrainSetup

Microbatch = tuple[Batch, jax.Array | None]
"""Rows of a batch, and a key for each."""


def loss_and_gradients(
    setup: TrainSetup,
    params: nnx.State,
    router_state: nnx.State,
    batch: Batch,
    knobs: Knobs,
    keys_B: jax.Array | None = None,
) -> tuple[nnx.State, BatchSums]:
    """Returns the gradients of the total loss of the global batch, and its sums.

    Frozen parameters have no gradient, and none is computed.

    With accumulation, microbatch i has every a-th row. The balance loss is a product of means over
    the global batch, so its gradient in one microbatch depends on the sums of all: a first pass,
    forward only, collects them; the second differentiates each microbatch with the sums of the
    others held constant. A dense model needs no first pass.

    Args:
      setup: the run's fixed part.
      params: trained arrays.
      router_state: what routers carry besides.
      batch: the global batch.
      knobs: traced scalars.
      keys_B: from `row_keys`.
    """
    config = setup.config
    trained, frozen = split_frozen(config.optimizer, params)

    def sums_of(trained: nnx.State, microbatch: Microbatch) -> BatchSums:
        rows, keys_b = microbatch
        params = join_params(trained, frozen)
        model = nnx.merge(setup.graphdef, params, router_state)
        return forward_sums(model, rows, knobs, keys_b)

    def total_loss(sums: BatchSums) -> jax.Array:
        return losses(sums, knobs, config)["loss/total"]

    if config.train.accumulation == 1:

        def loss(trained):
            sums = sums_of(trained, (batch, keys_B))
            return total_loss(sums), sums

        return jax.grad(loss, has_aux=True)(trained)

    microbatches = _split((batch, keys_B), config.train.accumulation)
    if config.num_moe_layers:

        def sums_without_margins(microbatch):
            return _split_off_margins(sums_of(trained, microbatch))

        whole, margins = _sum_over(sums_without_margins, add_sums, microbatches)
    else:
        # These losses are linear in their sums: only the number of targets matters to the gradient.
        nothing = jnp.float32(0)
        whole, margins = BatchSums(nothing, nothing, count_targets(batch), ()), ()

    def gradients_of(microbatch):
        def loss(trained):
            sums, _ = _split_off_margins(sums_of(trained, microbatch))
            return total_loss(_with_gradient_of(sums, whole)), sums

        gradients_and_sums = jax.grad(loss, has_aux=True)(trained)
        return gradients_and_sums, None

    (grads, sums), _ = _sum_over(gradients_of, _add_gradients_and_sums, microbatches)
    return grads, _with_margins(sums, margins)


def _with_gradient_of(part: BatchSums, whole: BatchSums) -> BatchSums:
    """Returns sums with the value of the whole batch, and the gradient of one part of it."""

    def join_values(of_whole, of_part):
        zero = of_part - jax.lax.stop_gradient(of_part)
        return of_whole + zero

    return jax.tree.map(join_values, whole, part)


def _add_gradients_and_sums(
    first: tuple[nnx.State, BatchSums], second: tuple[nnx.State, BatchSums]
) -> tuple[nnx.State, BatchSums]:
    """Returns the gradients and the sums of two microbatches together."""
    first_grads, first_sums = first
    second_grads, second_sums = second
    grads = jax.tree.map(jnp.add, first_grads, second_grads)
    return grads, add_sums(first_sums, second_sums)


def _split(tree: Any, num_parts: int) -> Any:
    """Returns `[parts, B / parts, ...]`.

    Each device's rows are spread over all parts, so that no row moves to another device.
    """

    def split_rows(x_BX):
        shape = (-1, num_parts, *x_BX.shape[1:])
        return x_BX.reshape(shape).swapaxes(0, 1)

    return jax.tree.map(split_rows, tree)


def _sum_over(function: Callable, add: Callable, parts: Any) -> tuple[Any, Any]:
    """Runs a function over the leading axis of `parts`, one at a time.

    Returns:
      The sum of the function's first result, and all its second ones. The sum starts at zeros,
      which `add` must leave alone.
    """
    first_part = jax.tree.map(lambda x: x[0], parts)
    shapes, _ = jax.eval_shape(function, first_part)
    zeros = optax.tree.zeros_like(shapes)

    def body(total, part):
        summed, each = function(part)
        return add(total, summed), each

    return jax.lax.scan(body, zeros, parts)


def _split_off_margins(sums: BatchSums) -> tuple[BatchSums, tuple[jax.Array | None, ...]]:
    """Returns the sums, and apart from them the quantile margins, which do not add up."""
    margins = []
    routing = []
    for stats in sums.routing:
        margins.append(stats.quantile_margins_TE)
        routing.append(dataclasses.replace(stats, quantile_margins_TE=None))
    return dataclasses.replace(sums, routing=tuple(routing)), tuple(margins)


def _with_margins(sums: BatchSums, margins: tuple[jax.Array | None, ...]) -> BatchSums:
    """Returns the sums with the quantile margins of all tokens.

    Args:
      sums: without them.
      margins: those of each part, `[P, N, t, E]`.
    """

    def join_parts(margins_PNtE):
        if margins_PNtE is None:
            return None
        num_parts, num_layers, num_tokens, num_experts = margins_PNtE.shape
        by_layer_NPtE = margins_PNtE.swapaxes(0, 1)
        return by_layer_NPtE.reshape(num_layers, num_parts * num_tokens, num_experts)

    routing = []
    for stats, margins_PNtE in zip(sums.routing, margins, strict=True):
        margins_NTE = join_parts(margins_PNtE)
        routing.append(dataclasses.replace(stats, quantile_margins_TE=margins_NTE))
    return dataclasses.replace(sums, routing=tuple(routing))
