"""Strategies that send tokens in buffers of a fixed size: "all_to_all", "dedup" and "two_level".

A buffer for each receiver has room for a factor times the mean number of rows. What finds no room
takes the fallback of `overflow.py`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.plan import add_up
from moejax.moe.expert_parallel.buffers import (
    SendBuffers,
    mean_receivers,
    pack_choices,
    pack_tokens,
    room_for,
)
from moejax.moe.expert_parallel.overflow import (
    Returned,
    RoundTrip,
    expert_scope,
    run_overflow,
    send_in_chunks,
)
from moejax.moe.expert_parallel.strategy import EXCHANGED, RunExperts, Strategy
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES

RunReceived = Callable[[jax.Array, TokenChoice, ExpertWeights], tuple[jax.Array, jax.Array]]
"""As `RunExperts`, with the number of choices of all devices that found no room meanwhile."""


@dataclasses.dataclass(frozen=True)
class Buffers:
    """How tokens are put into buffers.

    Attributes:
      axes: mesh axes along which buffers are exchanged.
      pack: from the receiver of each choice, `[T, K]`, to the buffers for all receivers.
      max_choices: upper bound on the choices that a device receives; None where every slot of
        the buffers may hold one.
    """

    axes: tuple[str, ...]
    pack: Callable[[jax.Array], SendBuffers]
    max_choices: int | None = None


def run_all_to_all(
    strategy: Strategy,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Sends each choice's token to its expert's device; a strategy, see `exchange.STRATEGIES`."""
    num_devices = jax.lax.axis_size(EXPERT_AXES)
    top_k = choice.experts_BLK.shape[-1]

    def make_round_trip(num_tokens: int) -> RoundTrip:
        num_choices = num_tokens * top_k
        slots = room_for(num_choices / num_devices, strategy.buffer_factor, num_choices)
        pack = functools.partial(pack_choices, num_receivers=num_devices, slots=slots)
        return functools.partial(
            send_buffers, Buffers(EXPERT_AXES, pack), without_overflow(run_experts)
        )

    return send_in_chunks(make_round_trip, strategy.chunks, run_experts, x_bLD, choice, weights)


def run_dedup(
    strategy: Strategy,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Sends a token once to each device that has any of its experts.

    One row comes back from each, the weighted sum of its experts' outputs. A strategy, see
    `exchange.STRATEGIES`.
    """
    factor = strategy.buffer_factor
    num_devices = jax.lax.axis_size(EXPERT_AXES)
    num_experts = weights.down_EFD.shape[0] * num_devices
    top_k = choice.experts_BLK.shape[-1]

    def make_round_trip(num_tokens: int) -> RoundTrip:
        num_choices = num_tokens * top_k
        num_rows = num_tokens * mean_receivers(num_experts, top_k, num_devices)
        slots = room_for(num_rows / num_devices, factor, num_tokens)
        max_choices = room_for(num_choices / num_devices, factor, num_choices)
        pack = functools.partial(
            pack_tokens, num_receivers=num_devices, slots=slots, max_choices=max_choices
        )
        buffers = Buffers(EXPERT_AXES, pack, num_devices * max_choices)
        return functools.partial(send_buffers, buffers, without_overflow(run_experts))

    return send_in_chunks(make_round_trip, strategy.chunks, run_experts, x_bLD, choice, weights)


def run_two_level(
    strategy: Strategy,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Sends a token once to each group, and there once to each device that has any of its experts.

    Between groups it goes to the device with this one's place in its group. A strategy, see
    `exchange.STRATEGIES`.
    """
    factor = strategy.buffer_factor
    num_groups, group_size = (jax.lax.axis_size(axis) for axis in EXPERT_AXES)
    num_devices = num_groups * group_size
    num_experts = weights.down_EFD.shape[0] * num_devices
    top_k = choice.experts_BLK.shape[-1]

    def make_round_trip(num_tokens: int) -> RoundTrip:
        num_choices = num_tokens * top_k
        num_group_rows = num_tokens * mean_receivers(num_experts, top_k, num_groups)
        group_slots = room_for(num_group_rows / num_groups, factor, num_tokens)
        num_arriving = num_groups * group_slots
        num_rows = num_tokens * mean_receivers(num_experts, top_k, num_devices)
        slots = room_for(num_rows / group_size, factor, num_arriving)
        max_choices = room_for(num_choices / group_size, factor, num_arriving * top_k)
        pack_within = functools.partial(
            pack_tokens, num_receivers=group_size, slots=slots, max_choices=max_choices
        )
        within = Buffers(("expert",), pack_within, group_size * max_choices)
        pack_between = functools.partial(
            pack_tokens, num_receivers=num_groups, slots=group_slots, max_choices=num_choices
        )
        between = Buffers(("dcn_expert",), pack_between)
        run_group = functools.partial(_run_within_group, within, run_experts)
        return functools.partial(send_buffers, between, run_group)

    return send_in_chunks(make_round_trip, strategy.chunks, run_experts, x_bLD, choice, weights)


def _run_within_group(
    within: Buffers,
    run_experts: RunExperts,
    x_1TD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Runs the tokens that arrived from other groups on the devices of this one."""
    y_1TD, is_overflow_TK, _ = send_buffers(
        within, without_overflow(run_experts), x_1TD, choice, weights
    )
    overflow_1TD, num_overflow = run_overflow(
        ("expert",), run_experts, x_1TD, choice, is_overflow_TK, weights, like_1TD=y_1TD
    )
    return y_1TD + overflow_1TD, num_overflow


def without_overflow(run_experts: RunExperts) -> RunReceived:
    """Returns `run_experts` with a count of zero, since nothing more is sent."""

    def run(x_1RD, choice, weights):
        return run_experts(x_1RD, choice, weights), jnp.float32(0)

    return run


def send_buffers(
    buffers: Buffers,
    run_received: RunReceived,
    x_1TD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> Returned:
    """Sends tokens in buffers of a fixed size, and their outputs back; a round trip."""
    scope = expert_scope(buffers.axes, weights)
    receiver_TK = jnp.minimum(choice.experts_BLK[0] // scope.num_experts, scope.num_devices)
    packed = buffers.pack(receiver_TK)

    def exchange_buffers(a_RX):
        """Sends each device its buffer, and returns those of all devices for this one."""
        a_nCX = a_RX.reshape(scope.num_devices, -1, *a_RX.shape[1:])
        received = jax.lax.all_to_all(a_nCX, buffers.axes, split_axis=0, concat_axis=0)
        return received.reshape(a_RX.shape)

    sent = packed.load(x_1TD[0], choice, no_expert=scope.num_devices * scope.num_experts)
    x_RD, choice_R = jax.tree.map(lambda a: checkpoint_name(exchange_buffers(a), EXCHANGED), sent)
    choice_1R = jax.tree.map(lambda a: a[None], choice_R)
    received = dataclasses.replace(
        choice_1R.for_experts(scope.first, scope.num_experts), max_choices=buffers.max_choices
    )
    y_1RD, num_overflow = run_received(x_RD[None], received, weights)
    y_TD = add_up(exchange_buffers(y_1RD[0]), packed.plan)
    return Returned(y_TD[None], packed.is_overflow_TK, num_overflow)
