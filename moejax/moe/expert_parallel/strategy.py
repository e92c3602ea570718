"""How tokens and experts meet on a mesh: what was asked for, and which strategy it comes to; see `exchange.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moejax.moe.expert_parallel.buffers import mean_receivers
from moejax.moe.experts.experts import ExpertWeights

RunExperts = Callable[[jax.Array, Any, ExpertWeights], jax.Array]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How tokens and experts meet.

    Attributes:
      strategy: a name from the top of `exchange.py`, or "auto". Where experts choose, or slots mix
        tokens, "ring" stands in for those that send choices; on a mesh with one device for all
        experts nothing travels.
      buffer_factor: rows of a buffer over their mean.
      chunks: parts of the tokens that travel apart, so that one can be on its way while another is
        computed; the largest common divisor with the number of tokens.
    """

    strategy: str
    buffer_factor: float = 1.5
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class LocalExperts:
    """What a device does with the tokens and experts that it has.

    Attributes:
      run: `(x_bLD, chosen, weights) -> y_bLD`, from `moe/dispatch/on_device.py`.
      can_check_vma: whether it says truly which of its arrays differ between devices, as Pallas
        kernels do not; unchecked, gradients of weights are added up over all devices all the same.
    """

    run: RunExperts
    can_check_vma: bool = True


def choose(how: Exchange, slow: int, fast: int, num_experts: int, top_k: int) -> str:
    """The strategy to run.

    Args:
      how: what was asked for.
      slow: parts of the experts between slow links.
      fast: parts of each of those.
      num_experts: E.
      top_k: K; 0 where tokens do not choose.
    """
    num_devices = slow * fast
    if num_devices == 1:
        return "gather"
    if top_k == 0 and how.strategy != "gather":
        return "ring"
    if how.strategy == "two_level" and min(slow, fast) == 1:
        return "dedup"
    if how.strategy != "auto":
        return how.strategy
    if min(slow, fast) > 1:
        return "two_level"
    # Where tokens have more choices than there are devices, "ring" sends no more rows; but it has
    # room for all choices of all devices, n times as many as a device's share.
    return (
        "dedup" if mean_receivers(num_experts, top_k, num_devices) < 0.95 * top_k else "all_to_all"
    )
