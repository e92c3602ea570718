"""Finding where a value first stopped being finite, once a run has given up."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import Knobs
from moejax.data.batches import Batch
from moejax.models.stack import Context
from moejax.nn.attention import row_mask
from moejax.training.state import Trainable, TrainState
from moejax.training.step import loss_and_gradients


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def locate(trainable: Trainable, state: TrainState, batch: Batch, knobs: Knobs) -> str:
    """Names the first place, in the order of computation, that is not finite: a parameter, a layer, or a gradient.

    Runs layer by layer, so it is slow; it is meant for a run that has already failed.
    """
    for name, value in _named(state.params):
        if not _is_finite(value):
            return f"parameter {name}"
    model = nnx.merge(trainable.graphdef, state.params, state.router_state)
    context = Context(
        positions_BL=batch.positions_BL,
        mask_BLS=row_mask(batch.segments_BL),
        is_token_BL=batch.segments_BL > 0,
        capacity_factor=knobs.capacity_factor,
    )
    run_block = jax.jit(lambda graphdef, block, x: nnx.merge(graphdef, block)(x, context, None)[0], static_argnums=0)
    x_BLD = model.embed(batch.tokens_BL)
    blocks = [block for stack in model.stacks for block in stack.blocks()]
    for layer, block in enumerate(blocks):
        x_BLD = run_block(*nnx.split(block), x_BLD)
        if not _is_finite(x_BLD):
            return f"layer {layer} (output)"
    if not _is_finite(model.unembed(x_BLD)):
        return "the logits"
    grads, _ = jax.jit(lambda p: loss_and_gradients(trainable, p, state.router_state, batch, knobs))(state.params)
    bad = [_place_of_gradient(path, grad) for path, grad in nnx.to_flat_state(grads) if not _is_finite(grad[...])]
    # Gradients are computed from the last layer to the first.
    return f"the gradient of {max(bad)[1]}" if bad else "the global gradient norm (it overflows)"


def _place_of_gradient(path: tuple, grad: nnx.Variable) -> tuple[int, str]:
    """The last layer of a stack whose gradient is not finite, and its description; -1 outside stacks."""
    name = "/".join(str(part) for part in path)
    if grad.axes[0] != "layers":
        return -1, name
    is_bad_N = ~jnp.isfinite(grad[...]).reshape(grad.shape[0], -1).all(axis=1)
    layer = int(jnp.flatnonzero(is_bad_N)[-1])
    return layer, f"{name}, layer {layer} of its stack"


def _named(tree: Any) -> list[tuple[str, jax.Array]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"), value)
        for path, value in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _is_finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())
