"""Strategy "ring": every device runs the tokens of all devices through its own experts.

Strategy "gather", its opposite, is here too: every device has all experts and runs its own tokens.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.moe.dispatch.assignment import Assignment
from moejax.moe.expert_parallel.fsdp import gather_over_experts
from moejax.moe.expert_parallel.strategy import EXCHANGED, RunExperts, Strategy
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES


def run_gather(
    strategy: Strategy,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    assignment: Assignment,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Gathers the weights of all experts on every device; a strategy, see `exchange.STRATEGIES`."""
    return run_experts(x_bLD, assignment, gather_over_experts(weights)), jnp.float32(0)


def run_ring(
    strategy: Strategy,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    assignment: Assignment,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Gathers all tokens, and sums and scatters the outputs.

    A strategy, see `exchange.STRATEGIES`.
    """
    arrived = _gather_tokens(x_bLD), jax.tree.map(_all_gather, assignment)
    x_BLD, assignment = jax.tree.map(lambda a: checkpoint_name(a, EXCHANGED), arrived)
    num_local = weights.down_EFD.shape[0]
    first_local = jax.lax.axis_index(EXPERT_AXES) * num_local
    y_BLD = run_experts(x_BLD, assignment.for_experts(first_local, num_local), weights)
    return _sum_and_scatter(y_BLD), jnp.float32(0)


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
        y_BLD.astype(jnp.float32), EXPERT_AXES, scatter_dimension=0, tiled=True
    )
    return sum_bLD.astype(y_BLD.dtype)


_gather_tokens.defvjp(
    lambda x_bLD: (_gather_tokens(x_bLD), None), lambda _, dx_BLD: (_sum_and_scatter(dx_BLD),)
)
_sum_and_scatter.defvjp(
    lambda y_BLD: (_sum_and_scatter(y_BLD), None), lambda _, dy_bLD: (_gather_tokens(dy_bLD),)
)
