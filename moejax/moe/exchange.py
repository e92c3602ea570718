"""Where tokens meet experts on a mesh: the only file with collectives.

The batch is split over `data`, `fsdp` and `expert`. So far there is one strategy, `gather`: expert weights are
all-gathered over `fsdp` and `expert` where they are used, and each device sends its own tokens through all experts. The
hidden width of the experts is split over `tensor`, whose partial outputs are added up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moejax.moe.experts import ExpertWeights
from moejax.sharding import BATCH_AXES

LocalExperts = Callable[[jax.Array, Any, ExpertWeights], jax.Array]


def exchange(
    run_local: LocalExperts, x_BLD: jax.Array, chosen: Any, weights: ExpertWeights, *, check_vma: bool = True
) -> jax.Array:
    """Runs dispatch, experts and combine on each device's part of the batch.

    Args:
      run_local: `(x_bLD, chosen, weights) -> y_bLD` on one device, from `moe/local.py`.
      x_BLD: tokens.
      chosen: where they go: arrays with a leading axis of sequences.
      weights: of the experts.
      check_vma: whether `run_local` says truly which of its arrays differ between devices, as kernels of others do not;
        without it, gradients of weights are added up over all devices all the same.

    Returns:
      The combined outputs.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run_local(x_BLD, chosen, weights)

    def run(x_bLD, chosen, weights):
        return jax.lax.psum(run_local(x_bLD, chosen, _add_bias_once(weights)), "tensor")

    has_bias = weights.network.has_bias
    split = dataclasses.replace(
        weights,
        gate_up_EDPF=PartitionSpec(None, None, None, "tensor"),
        down_EFD=PartitionSpec(None, "tensor"),
        gate_up_bias_EPF=PartitionSpec(None, None, "tensor") if has_bias else None,
        down_bias_ED=PartitionSpec() if has_bias else None,
    )
    batch = PartitionSpec(BATCH_AXES)
    sharded = jax.shard_map(run, in_specs=(batch, batch, split), out_specs=batch, check_vma=check_vma)
    return sharded(x_BLD, chosen, weights)


def _add_bias_once(weights: ExpertWeights) -> ExpertWeights:
    """The bias of the output on one of the devices whose partial outputs are added up, and zeros on the others."""
    if not weights.network.has_bias:
        return weights
    is_first = jax.lax.axis_index("tensor") == 0
    return dataclasses.replace(weights, down_bias_ED=jnp.where(is_first, weights.down_bias_ED, 0))
