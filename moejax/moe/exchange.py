"""Where tokens meet experts on a mesh: the only file with collectives.

The batch is split over `data`, `fsdp` and `expert`, the experts over `expert`, and the hidden width of each over
`tensor`, whose partial outputs are added up. Strategies differ in what travels along `expert`:

    gather       expert weights: every device has them all, and runs its own tokens
    ring         tokens: every device runs those of all devices through its experts; outputs are added and scattered
    all_to_all   each choice's token to its expert's device and its output back, in buffers of a fixed size; where one
                 would overflow, `ring` takes the batch

All give the same results. `fsdp` gathers weights in all of them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moejax.moe.dispatch import Plan, combine, dispatch, dispatch_weights, plan_capacity
from moejax.moe.experts import ExpertWeights
from moejax.moe.local import Chosen
from moejax.sharding import BATCH_AXES

LocalExperts = Callable[[jax.Array, Any, ExpertWeights], jax.Array]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How tokens and experts meet.

    Attributes:
      strategy: "gather", "ring", "all_to_all", or "auto"; where experts choose, or slots mix tokens, "ring" stands in
        for "all_to_all". On an `expert` axis of one device nothing travels.
      buffer_factor: all_to_all: rows of the buffer for each receiver over their mean.
    """

    strategy: str
    buffer_factor: float


@dataclasses.dataclass(frozen=True)
class Local:
    """What a device does with the tokens and experts that it has.

    Attributes:
      run: `(x_bLD, chosen, weights) -> y_bLD`, from `moe/local.py`.
      can_check_vma: whether it says truly which of its arrays differ between devices, as Pallas kernels do not;
        unchecked, gradients of weights are added up over all devices all the same.
    """

    run: LocalExperts
    can_check_vma: bool = True


def exchange(
    how: Exchange, local: Local, rows: Local | None, x_BLD: jax.Array, chosen: Any, weights: ExpertWeights
) -> jax.Array:
    """Runs dispatch, experts and combine on each device's part of the batch or of the experts.

    Args:
      how: the strategy.
      local: for `chosen` as it is.
      rows: for `Chosen` without a limit of capacity: choices that were refused are of no expert. None: if nobody chose.
      x_BLD: tokens.
      chosen: where they go: `Chosen`, `Slots` or `Mixing`, arrays with a leading axis of sequences.
      weights: of the experts.

    Returns:
      The combined outputs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local.run(x_BLD, chosen, weights)
    strategy = _choose(how.strategy, mesh.shape["expert"], can_send=rows is not None)
    used = rows if strategy == "all_to_all" and rows else local
    body: LocalExperts = {
        "gather": used.run,
        "ring": lambda *arrays: _ring(used.run, *arrays),
        "all_to_all": lambda *arrays: _all_to_all(used.run, how.buffer_factor, *arrays),
    }[strategy]

    def run(x_bLD, chosen, weights):
        return jax.lax.psum(body(x_bLD, chosen, _add_bias_once(weights)), "tensor")

    experts = None if strategy == "gather" else "expert"
    has_bias = weights.network.has_bias
    split = dataclasses.replace(
        weights,
        gate_up_EDPF=PartitionSpec(experts, None, None, "tensor"),
        down_EFD=PartitionSpec(experts, "tensor"),
        gate_up_bias_EPF=PartitionSpec(experts, None, "tensor") if has_bias else None,
        down_bias_ED=PartitionSpec(experts) if has_bias else None,
    )
    batch = PartitionSpec(BATCH_AXES)
    sharded = jax.shard_map(run, in_specs=(batch, batch, split), out_specs=batch, check_vma=used.can_check_vma)
    return sharded(x_BLD, chosen, weights)


def _choose(strategy: str, num_devices: int, *, can_send: bool) -> str:
    if num_devices == 1:
        return "gather"
    if strategy in ("auto", "all_to_all"):
        return "all_to_all" if can_send else "ring"
    return strategy


def _add_bias_once(weights: ExpertWeights) -> ExpertWeights:
    """The bias of the output on one of the devices whose partial outputs are added up, and zeros on the others."""
    if not weights.network.has_bias:
        return weights
    is_first = jax.lax.axis_index("tensor") == 0
    return dataclasses.replace(weights, down_bias_ED=jnp.where(is_first, weights.down_bias_ED, 0))


def _ring(run_local: LocalExperts, x_bLD, chosen, weights: ExpertWeights):
    """All tokens of the `expert` axis through this device's experts."""
    x_BLD, chosen = jax.tree.map(lambda a: jax.lax.all_gather(a, "expert", axis=0, tiled=True), (x_bLD, chosen))
    num_local = weights.down_EFD.shape[0]
    here = chosen.of_experts(jax.lax.axis_index("expert") * num_local, num_local)
    y_BLD = run_local(x_BLD, here, weights)
    return jax.lax.psum_scatter(y_BLD, "expert", scatter_dimension=0, tiled=True)


def _all_to_all(run_rows: LocalExperts, buffer_factor: float, x_bLD, chosen: Chosen, weights: ExpertWeights):
    """Each choice's token to its expert's device and back."""
    num_devices, num_local = jax.lax.axis_size("expert"), weights.down_EFD.shape[0]
    num_choices, top_k = chosen.experts_BLK.size, chosen.experts_BLK.shape[-1]
    slots = min(num_choices, math.ceil(buffer_factor * num_choices / num_devices / 8) * 8)
    experts_TK = chosen.experts_BLK.reshape(-1, top_k)
    device_TK = jnp.minimum(experts_TK // num_local, num_devices)
    plan = plan_capacity(device_TK[None], num_devices, slots)

    def fast(x_bLD, chosen, weights):
        return _by_buffers(run_rows, slots, plan, x_bLD, chosen, weights)

    if slots == num_choices:
        return fast(x_bLD, chosen, weights)
    has_no_room = (device_TK < num_devices) & (plan.row_TK == plan.choice_R.shape[0])
    overflow = jax.lax.psum(has_no_room.sum(), BATCH_AXES)  # the same on all devices, which must take the same branch
    # What `ring` keeps for the backward pass would take memory in every step: it is computed again instead.
    slow = jax.checkpoint(lambda *arrays: _ring(run_rows, *arrays))
    return jax.lax.cond(overflow == 0, fast, slow, x_bLD, chosen, weights)


def _by_buffers(run_rows: LocalExperts, slots: int, plan: Plan, x_bLD, chosen: Chosen, weights: ExpertWeights):
    num_devices, num_local = jax.lax.axis_size("expert"), weights.down_EFD.shape[0]
    choices = chosen.experts_BLK.reshape(-1, chosen.experts_BLK.shape[-1])

    def swap(a_RD):
        """The buffer for each device to it, and those for this one from all."""
        a_NCD = a_RD.reshape(num_devices, slots, *a_RD.shape[1:])
        return jax.lax.all_to_all(a_NCD, "expert", split_axis=0, concat_axis=0).reshape(a_RD.shape)

    x_RD = dispatch(x_bLD.reshape(-1, x_bLD.shape[-1]), plan)
    if chosen.input_weights_BLK is not None:
        weight_R = dispatch_weights(chosen.input_weights_BLK.reshape(choices.shape), plan)
        x_RD *= weight_R[:, None].astype(x_RD.dtype)
    # An empty row is of no expert.
    expert_R = (choices % num_local).reshape(-1).at[plan.choice_R].get(mode="fill", fill_value=num_local)
    x_RD, expert_R = swap(x_RD), swap(expert_R)
    ones_BLK = jnp.ones((1, x_RD.shape[0], 1), chosen.weights_BLK.dtype)
    y_RD = run_rows(x_RD[None], Chosen(expert_R[None, :, None], ones_BLK), weights)[0]
    return combine(swap(y_RD), chosen.weights_BLK.reshape(choices.shape), plan).reshape(x_bLD.shape)
