"""Finding where a value first stopped being finite, once a run has given up."""

import dataclasses
import functools
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
from moejax.training.optimizer import make_schedule
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
    """What to raise after `num_steps` such steps in a row; `batch` is that of the first of them."""
    router_state = state.router_state
    if setup.config.num_moe_layers:
        router_state = schedule_router_state(router_state, setup.config, first_step - 1)
    then = dataclasses.replace(state, step=jnp.int32(first_step - 1), router_state=router_state)
    place = locate(setup, then, batch, knobs)
    return NonFiniteError(
        f"loss, gradients or updates were not finite in {num_steps} steps in a row, from step {first_step} on; "
        f"the first such value is in {place}; none of these steps changed the parameters; lower "
        "optimizer.learning_rate, or raise train.max_nonfinite_steps"
    )


def locate(setup: TrainSetup, state: TrainState, batch: Batch, knobs: Knobs) -> str:
    """Names the first place, in the order of computation, that is not finite: a parameter, a layer, or a gradient.

    Runs layer by layer, so it is slow; it is meant for a run that has already failed.
    """
    for name, value in _named(state.params):
        if not _is_finite(value):
            return f"parameter {name}"
    model = nnx.merge(setup.graphdef, state.params, state.router_state)
    keys_B = row_keys(setup.config, knobs, state.step, batch.tokens_BL.shape[0])
    knobs = scheduled(knobs, setup.config, state.step)
    context = Context(
        positions_BL=batch.positions_BL,
        segments_BL=batch.segments_BL,
        info=TokenInfo(batch.segments_BL > 0, batch.tokens_BL, batch.positions_BL, knobs, keys_B),
    )
    run_block = jax.jit(
        lambda graphdef, block, x, own: nnx.merge(graphdef, block)(x, own)[0], static_argnums=0
    )
    x_BLD = model.embed(batch.tokens_BL)
    for layer, (block, own) in enumerate(model.walk(context)):
        x_BLD = run_block(*nnx.split(block), x_BLD, own)
        if not _is_finite(x_BLD):
            return f"layer {layer} (output)"
    if not _is_finite(model.unembed(x_BLD)):
        return "the logits"
    # Arguments, not closed over: what several processes hold must not become a constant.
    grads, _ = jax.jit(functools.partial(loss_and_gradients, setup))(
        state.params, state.router_state, batch, knobs, keys_B
    )
    place = _last_bad_gradient(nnx.merge(setup.graphdef, grads, state.router_state))
    if place:
        return f"the gradient of {place}"
    if not _is_finite(optax.tree.norm(grads)):
        return "the global gradient norm (it overflows)"
    return _bad_update(setup, state, grads, knobs)


def _bad_update(setup: TrainSetup, state: TrainState, grads: nnx.State, knobs: Knobs) -> str:
    """The first value that is not finite after finite gradients: of the optimizer, or of the parameters it gives."""
    schedule = make_schedule(setup.config.optimizer, setup.config.train.num_steps)
    learning_rate = schedule(state.step) * knobs.learning_rate
    params, opt_state = jax.jit(functools.partial(apply_gradients, setup))(
        state, grads, learning_rate
    )
    for name, value in _named(opt_state):
        if not _is_finite(value):
            return f"the optimizer's {name}"
    for name, value in _named(params):
        if not _is_finite(value):
            return f"the update of {name}"
    return "the state of a router"


def _last_bad_gradient(grads: Decoder) -> str | None:
    """The first gradient that is not finite in the order of their computation: from the logits down to the embedding.

    Args:
      grads: the model with its gradients in the place of its parameters.
    """
    below = {"embedding", "stacks"}
    for name, value in _named(
        {k: v for k, v in nnx.state(grads, nnx.Param).items() if k not in below}
    ):
        if not _is_finite(value):
            return name
    for layer, (block, _) in reversed([*enumerate(grads.walk())]):
        # Names come in alphabetical order: attention before ffn or moe, as in the forward pass.
        for name, value in reversed(_named(nnx.state(block, nnx.Param))):
            if not _is_finite(value):
                return f"{name} in layer {layer}"
    return None if _is_finite(grads.embedding[...]) else "embedding"


def _named(tree: Any) -> list[tuple[str, jax.Array]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"), value)
        for path, value in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _is_finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())
