"""Which strategy of expert parallelism is asked for, and which one that comes to on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moejax.moe.expert_parallel.buffers import mean_receivers
from moejax.moe.experts.experts import ExpertWeights

RunExperts = Callable[[jax.Array, Any, ExpertWeights], jax.Array]
"""`(x_BLD, assignment, weights) -> y_BLD`: a function of `moe/dispatch/on_device.py`."""

EXCHANGED = "exchanged"
"""The name of what arrived from other devices, for remat to save."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How tokens and experts meet.

    Attributes:
      name: a key of `exchange.STRATEGIES`, or "auto". Where experts choose, or slots mix tokens,
        "ring" stands in for those that send choices; where one device has all experts, nothing is
        sent.
      buffer_factor: rows of a buffer over their mean number.
      chunks: parts of the tokens that are sent separately, so that one can be on its way while
        another is computed; the largest common divisor with the number of tokens.
    """

    name: str
    buffer_factor: float = 1.5
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """What a device does with the tokens and experts that it has.

    Attributes:
      run: the function.
      can_check_vma: whether it states correctly which of its arrays differ between devices, which
        Pallas kernels do not. Gradients of weights are summed over all devices in either case.
    """

    run: RunExperts
    can_check_vma: bool = True


@dataclasses.dataclass(frozen=True)
class DeviceInputs:
    """What a strategy runs on a device, within `shard_map`.

    Attributes:
      run_experts: what a device does with the tokens that it gets.
      x_bLD: the tokens of this device.
      assignment: where they go.
      weights: of this device's experts, whole over `fsdp`.
    """

    run_experts: RunExperts
    x_bLD: jax.Array
    assignment: Any
    weights: ExpertWeights

    def as_one_sequence(self) -> "DeviceInputs":
        """Returns the same with all tokens in one sequence, `[1, T, D]`."""

        def flatten(a_bLX: jax.Array) -> jax.Array:
            width = a_bLX.shape[-1]
            return a_bLX.reshape(1, -1, width)

        return dataclasses.replace(
            self,
            x_bLD=flatten(self.x_bLD),
            assignment=jax.tree.map(flatten, self.assignment),
        )


def choose_strategy(
    strategy: Strategy,
    num_groups: int,
    group_size: int,
    num_experts: int,
    top_k: int,
) -> str:
    """Returns the name of the strategy to run.

    Args:
      strategy: what was asked for.
      num_groups: groups of devices with slow links between them, over which experts are split.
      group_size: devices of a group.
      num_experts: E.
      top_k: K; 0 where tokens do not choose.
    """
    num_devices = num_groups * group_size
    has_two_levels = min(num_groups, group_size) > 1
    if num_devices == 1:
        return "gather"
    if top_k == 0 and strategy.name != "gather":
        return "ring"
    if strategy.name == "two_level" and not has_two_levels:
        return "dedup"
    if strategy.name != "auto":
        return strategy.name
    if has_two_levels:
        return "two_level"
    # Where tokens have more choices than there are devices, "ring" sends no more rows; but it has
    # room for all choices of all devices, n times as many as a device's share.
    num_receivers = mean_receivers(num_experts, top_k, num_devices)
    saves_rows = num_receivers < 0.95 * top_k
    return "dedup" if saves_rows else "all_to_all"
