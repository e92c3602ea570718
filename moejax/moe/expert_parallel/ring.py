"""Strategy "ring": every device runs the tokens of all devices through its own experts.

Strategy "gather", its opposite, is here too: every device has all experts and runs its own tokens.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.moe.expert_parallel.fsdp import gather_over_experts
from moejax.moe.expert_parallel.strategy import EXCHANGED, DeviceInputs, Strategy
from moejax.sharding import EXPERT_AXES


def run_gather(strategy: Strategy, inputs: DeviceInputs) -> tuple[jax.Array, jax.Array]:
    """Gathers the weights of all experts on every device; a strategy, see `exchange.STRATEGIES`."""
    weights = gather_over_experts(inputs.weights)
    y_bLD = inputs.run_experts(inputs.x_bLD, inputs.assignment, weights)
    return y_bLD, jnp.float32(0)


def run_ring(strategy: Strategy, inputs: DeviceInputs) -> tuple[jax.Array, jax.Array]:
    """Gathers all tokens, and sums and scatters the outputs.

    A strategy, see `exchange.STRATEGIES`.
    """
    x_BLD = _gather_tokens(inputs.x_bLD)
    assignment = jax.tree.map(_all_gather, inputs.assignment)
    x_BLD, assignment = jax.tree.map(_name_exchanged, (x_BLD, assignment))
    num_local = inputs.weights.down_EFD.shape[0]
    me = jax.lax.axis_index(EXPERT_AXES)
    first_local = me * num_local
    local = assignment.for_experts(first_local, num_local)
    y_BLD = inputs.run_experts(x_BLD, local, inputs.weights)
    y_bLD = _sum_and_scatter(y_BLD)
    return y_bLD, jnp.float32(0)


def _name_exchanged(a_BX: jax.Array) -> jax.Array:
    """Names what arrived, for remat to save."""
    return checkpoint_name(a_BX, EXCHANGED)


def _all_gather(a_bX: jax.Array) -> jax.Array:
    return jax.lax.all_gather(a_bX, EXPERT_AXES, axis=0, tiled=True)


@jax.custom_vjp
def _gather_tokens(x_bLD):
    """Returns the tokens of all devices along the axes of experts.

    Gradients are summed as outputs are.
    """
    return _all_gather(x_bLD)


@jax.custom_vjp
def _sum_and_scatter(y_BLD):
    """Sums, in float32, what devices made of all tokens, and scatters the sums."""
    sum_bLD = jax.lax.psum_scatter(
        y_BLD.astype(jnp.float32),
        EXPERT_AXES,
        scatter_dimension=0,
        tiled=True,
    )
    return sum_bLD.astype(y_BLD.dtype)


# Each is the other's transpose.


def _gather_forward(x_bLD):
    return _gather_tokens(x_bLD), None


def _gather_backward(_, dx_BLD):
    return (_sum_and_scatter(dx_BLD),)


def _scatter_forward(y_BLD):
    return _sum_and_scatter(y_BLD), None


def _scatter_backward(_, dy_bLD):
    return (_gather_tokens(dy_bLD),)


_gather_tokens.defvjp(_gather_forward, _gather_backward)
_sum_and_scatter.defvjp(_scatter_forward, _scatter_backward)
