"""Expert parallelism: where tokens meet experts on a mesh.

The batch is split over `data`, `fsdp`, `dcn_expert` and `expert`, sequences over `context`, the
experts over `dcn_expert` (whose groups have slow links between them) and `expert`, and the hidden
width of each over `tensor`, whose partial outputs are summed. Weights are gathered over `fsdp`, and
their gradients reduce-scattered. Strategies differ in what is sent along the axes of experts:

    gather       expert weights: every device has them all, and runs its own tokens
    ring         tokens: every device runs those of all devices through its experts; outputs are
                 summed and scattered
    all_to_all   each choice's token to its expert's device and its output back, in buffers of a
                 fixed size
    ragged       the same rows without a buffer's empty ones (`jax.lax.ragged_all_to_all`)
    dedup        a token once to each device that has any of its experts; one row comes back, their
                 weighted sum
    two_level    a token once to each group, and there once to each device that has any of its
                 experts

All give the same results. Where a buffer of the last four has no room, the choices that it cannot
take are served by a slower fallback (`overflow.py`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moejax.moe.dispatch.assignment import Assignment, TokenChoice
from moejax.moe.expert_parallel.buffered import run_all_to_all, run_dedup, run_two_level
from moejax.moe.expert_parallel.fsdp import add_bias_once, gather_over_fsdp
from moejax.moe.expert_parallel.ragged import run_ragged
from moejax.moe.expert_parallel.ring import run_gather, run_ring
from moejax.moe.expert_parallel.strategy import (
    DeviceInputs,
    LocalExperts,
    Strategy,
    choose_strategy,
)
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES, MESH_AXES, TOKENS

Run = Callable[[Strategy, DeviceInputs], tuple[jax.Array, jax.Array]]

STRATEGIES: dict[str, Run] = {
    "gather": run_gather,
    "ring": run_ring,
    "all_to_all": run_all_to_all,
    "ragged": run_ragged,
    "dedup": run_dedup,
    "two_level": run_two_level,
}
"""The strategies by name; each is a function

    (strategy, inputs) -> (y_bLD, num_overflow)

of the settings and of what this device has, within `shard_map`; it returns outputs, partial sums
over `tensor`, and how many choices of all devices a buffer had no room for. The last four take
`TokenChoice` only."""


def exchange(
    strategy: Strategy,
    local: LocalExperts,
    dropless: LocalExperts | None,
    x_BLD: jax.Array,
    assignment: Assignment,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Runs dispatch, experts and combine on each device's part of the batch or of the experts.

    Args:
      strategy: what is sent.
      local: what a device does with `assignment` as it is.
      dropless: what it does with `TokenChoice` without a limit of capacity, where choices that
        found no slot are of no expert; None where tokens do not choose.
      x_BLD: tokens.
      assignment: where they go; arrays have a leading axis of sequences.
      weights: of the experts.

    Returns:
      The combined outputs, and how many choices a buffer had no room for, a float32 scalar.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # XLA:CPU copies what is summed over one device.
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in MESH_AXES):
        y_BLD = local.run(x_BLD, assignment, weights)
        return y_BLD, jnp.float32(0)
    num_experts = weights.down_EFD.shape[0]
    name = _strategy_on(mesh, strategy, assignment, num_experts)
    run_strategy = STRATEGIES[name]
    keeps_sequences = name in ("gather", "ring")
    used = local if keeps_sequences or dropless is None else dropless

    def run(x_bLD, assignment, weights):
        weights = gather_over_fsdp(weights)
        weights = add_bias_once(weights)
        inputs = DeviceInputs(used.run, x_bLD, assignment, weights)
        y_bLD, num_overflow = run_strategy(strategy, inputs)
        y_bLD = jax.lax.psum(y_bLD, "tensor")
        return y_bLD, num_overflow

    sharded = jax.shard_map(
        run,
        in_specs=(TOKENS, TOKENS, _weight_specs(weights)),
        out_specs=(TOKENS, PartitionSpec()),
        check_vma=used.can_check_vma,
    )
    return sharded(x_BLD, assignment, weights)


def _strategy_on(
    mesh: jax.sharding.AbstractMesh,
    strategy: Strategy,
    assignment: Assignment,
    num_experts: int,
) -> str:
    """Returns the name of the strategy to run on this mesh."""
    top_k = 0
    if isinstance(assignment, TokenChoice):
        top_k = assignment.experts_BLK.shape[-1]
    num_groups, group_size = (mesh.shape[axis] for axis in EXPERT_AXES)
    return choose_strategy(strategy, num_groups, group_size, num_experts, top_k)


def _weight_specs(weights: ExpertWeights) -> ExpertWeights:
    """Returns how the mesh splits each array of the weights."""
    has_bias = weights.network.has_bias
    return dataclasses.replace(
        weights,
        gate_up_EDPF=PartitionSpec(EXPERT_AXES, "fsdp", None, "tensor"),
        down_EFD=PartitionSpec(EXPERT_AXES, "tensor", "fsdp"),
        gate_up_bias_EPF=PartitionSpec(EXPERT_AXES, None, "tensor") if has_bias else None,
        down_bias_ED=PartitionSpec(EXPERT_AXES, "fsdp") if has_bias else None,
    )
