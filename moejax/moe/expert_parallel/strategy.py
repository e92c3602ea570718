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


def choose_strategy(
    strategy: Strategy, num_groups: int, group_size: int, num_experts: int, top_k: int
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
    if num_devices == 1:
        return "gather"
    if top_k == 0 and strategy.name != "gather":
        return "ring"
    if strategy.name == "two_level" and min(num_groups, group_size) == 1:
        return "dedup"
    if strategy.name != "auto":
        return strategy.name
    if min(num_groups, group_size) > 1:
        return "two_level"
    # Where tokens have more choices than there are devices, "ring" sends no more rows; but it has
    # room for all choices of all devices, n times as many as a device's share.
    saves_rows = mean_receivers(num_experts, top_k, num_devices) < 0.95 * top_k
    return "dedup" if saves_rows else "all_to_all"
