"""Finds where a value first stopped being finite, once a run has given up."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moejax.config import Knobs
from moejax.data.batches import Batch
from moejax.models import Decoder
from moejax.models.blocks import Context
from moejax.moe.token_info import TokenInfo
from moejax.training.accumulation import loss_and_gradients
from moejax.training.learning_rate import learning_rate_at
from moejax.training.router_state import schedule_router_state
from moejax.training.schedules import scheduled
from moejax.training.state import TrainSetup, TrainState
from moejax.training.step import apply_gradients, row_keys


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss, a gradient or an update that is not finite."""


def nonfinite_error(
    setup: TrainSetup,
    state: TrainState,
    batch: Batch,
    knobs: Knobs,
    first_step: int,
    num_steps: int,
) -> NonFiniteError:
    """Returns the error to raise after `num_steps` steps in a row that were not finite.

    Args:
      setup: the run's fixed part.
      state: after those steps, which have not changed the parameters.
      batch: of the first of those steps.
      knobs: of the run.
      first_step: the number of the first of those steps, counted from 1.
      num_steps: how many there were.
    """
    router_state = state.router_state
    if setup.config.num_moe_layers:
        router_state = schedule_router_state(router_state, setup.config, first_step - 1)
    before = dataclasses.replace(state, step=jnp.int32(first_step - 1), router_state=router_state)
    place = locate(setup, before, batch, knobs)
    return NonFiniteError(
        f"loss, gradients or updates were not finite in {num_steps} steps in a row, from step "
        f"{first_step} on; the first such value is in {place}; none of these steps changed the "
        "parameters; lower optimizer.learning_rate, or raise train.max_nonfinite_steps"
    )


def locate(setup: TrainSetup, state: TrainState, batch: Batch, knobs: Knobs) -> str:
    """Names the first place, in the order of computation, that is not finite.

    That is a parameter, a layer, a gradient or an update. The model runs layer by layer, which is
    slow: this is meant for a run that has already failed.
    """
    parameter = _first_bad(_with_names(state.params))
    if parameter:
        return f"parameter {parameter}"
    keys_B = row_keys(setup.config, knobs, state.step, batch.tokens_BL.shape[0])
    knobs = scheduled(knobs, setup.config, state.step)
    info = TokenInfo(batch.segments_BL > 0, batch.tokens_BL, batch.positions_BL, knobs, keys_B)
    context = Context(positions_BL=batch.positions_BL, segments_BL=batch.segments_BL, info=info)
    model = nnx.merge(setup.graphdef, state.params, state.router_state)
    output = _first_bad_output(model, batch, context)
    if output:
        return output
    # Arguments, not closed over: what several processes hold must not become a constant.
    compute_gradients = jax.jit(functools.partial(loss_and_gradients, setup))
    grads, _ = compute_gradients(state.params, state.router_state, batch, knobs, keys_B)
    place = _first_bad_gradient(nnx.merge(setup.graphdef, grads, state.router_state))
    if place:
        return f"the gradient of {place}"
    if not _is_finite(optax.tree.norm(grads)):
        return "the global gradient norm (it overflows)"
    return _first_bad_update(setup, state, grads, knobs)


def _first_bad_output(model: Decoder, batch: Batch, context: Context) -> str | None:
    """Names the first layer whose output is not finite, or the logits."""

    def apply_block(graphdef, block, x_BLD, own):
        output_BLD, *_ = nnx.merge(graphdef, block)(x_BLD, own)
        return output_BLD

    compiled = jax.jit(apply_block, static_argnums=0)
    x_BLD = model.embed(batch.tokens_BL)
    for layer, (block, own) in enumerate(model.walk(context)):
        graphdef, state = nnx.split(block)
        x_BLD = compiled(graphdef, state, x_BLD, own)
        if not _is_finite(x_BLD):
            return f"layer {layer} (output)"
    return None if _is_finite(model.unembed(x_BLD)) else "the logits"


def _first_bad_update(setup: TrainSetup, state: TrainState, grads: nnx.State, knobs: Knobs) -> str:
    """Names the first value that is not finite after finite gradients.

    It is in the optimizer's state, or in the parameters that the optimizer gives.
    """
    learning_rate = learning_rate_at(setup.config, knobs, state.step)
    update = jax.jit(functools.partial(apply_gradients, setup))
    params, opt_state, _ = update(state, grads, learning_rate)
    name = _first_bad(_with_names(opt_state))
    if name:
        return f"the optimizer's {name}"
    name = _first_bad(_with_names(params))
    if name:
        return f"the update of {name}"
    return "the state of a router"


def _first_bad_gradient(grads: Decoder) -> str | None:
    """Names the first gradient that is not finite in the order of their computation.

    That order runs from the logits down to the embedding.

    Args:
      grads: the model with its gradients in the place of its parameters.
    """
    below = {"embedding", "stacks"}
    params = nnx.state(grads, nnx.Param)
    name = _first_bad(_with_names({key: x for key, x in params.items() if key not in below}))
    if name:
        return name
    blocks = [block for block, _ in grads.walk()]
    for layer, block in reversed(list(enumerate(blocks))):
        # Names come in alphabetical order: ffn before mixer, as in the backward pass.
        name = _first_bad(_with_names(nnx.state(block, nnx.Param)))
        if name:
            return f"{name} in layer {layer}"
    return None if _is_finite(grads.embedding[...]) else "embedding"


def _first_bad(arrays: Iterable[tuple[str, jax.Array]]) -> str | None:
    """Returns the name of the first array with a value that is not finite."""
    for name, array in arrays:
        if not _is_finite(array):
            return name
    return None


def _with_names(tree: Any) -> list[tuple[str, jax.Array]]:
    """Returns the arrays of a tree with their paths, in the order of its leaves."""
    named = []
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        named.append((name.removesuffix("/value"), array))
    return named


def _is_finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())
