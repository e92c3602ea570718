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
    receivers,
    run_overflow,
    send_in_chunks,
)
from moejax.moe.expert_parallel.strategy import EXCHANGED, DeviceInputs, RunExperts, Strategy
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


@dataclasses.dataclass(frozen=True)
class _Traffic:
    """What a device sends in one chunk.

    Attributes:
      num_tokens: of the chunk.
      top_k: choices of a token.
      num_experts: of all devices.
      factor: rows of a buffer over their mean number.
    """

    num_tokens: int
    top_k: int
    num_experts: int
    factor: float

    @property
    def num_choices(self) -> int:
        """Returns the choices of all its tokens."""
        return self.num_tokens * self.top_k

    def num_rows(self, num_receivers: int) -> float:
        """Returns the mean number of rows, one for each receiver that a token has."""
        return self.num_tokens * mean_receivers(self.num_experts, self.top_k, num_receivers)

    def buffers_by_choice(self, num_devices: int) -> Buffers:
        """Returns buffers with a row for each choice."""
        mean = self.num_choices / num_devices
        slots = room_for(mean, self.factor, self.num_choices)
        pack = functools.partial(pack_choices, num_receivers=num_devices, slots=slots)
        return Buffers(EXPERT_AXES, pack)

    def buffers_by_device(self, num_devices: int) -> Buffers:
        """Returns buffers with a row for each device that has any of a token's experts."""
        mean_rows = self.num_rows(num_devices) / num_devices
        mean_choices = self.num_choices / num_devices
        max_choices = room_for(mean_choices, self.factor, self.num_choices)
        pack = functools.partial(
            pack_tokens,
            num_receivers=num_devices,
            slots=room_for(mean_rows, self.factor, self.num_tokens),
            max_choices=max_choices,
        )
        return Buffers(EXPERT_AXES, pack, num_devices * max_choices)

    def slots_between(self, num_groups: int) -> int:
        """Returns the rows for each group of devices."""
        mean_rows = self.num_rows(num_groups) / num_groups
        return room_for(mean_rows, self.factor, self.num_tokens)

    def buffers_between(self, num_groups: int) -> Buffers:
        """Returns buffers with a row for each group that has any of a token's experts."""
        pack = functools.partial(
            pack_tokens,
            num_receivers=num_groups,
            slots=self.slots_between(num_groups),
            max_choices=self.num_choices,
        )
        return Buffers(("dcn_expert",), pack)

    def buffers_within(self, num_groups: int, group_size: int) -> Buffers:
        """Returns buffers for what arrives from all groups, with a row for each device."""
        num_arriving = num_groups * self.slots_between(num_groups)
        mean_rows = self.num_rows(num_groups * group_size) / group_size
        mean_choices = self.num_choices / group_size
        max_choices = room_for(mean_choices, self.factor, num_arriving * self.top_k)
        pack = functools.partial(
            pack_tokens,
            num_receivers=group_size,
            slots=room_for(mean_rows, self.factor, num_arriving),
            max_choices=max_choices,
        )
        return Buffers(("expert",), pack, group_size * max_choices)


def _traffic(num_tokens: int, strategy: Strategy, inputs: DeviceInputs) -> _Traffic:
    """Returns what a device sends of that many tokens."""
    num_devices = jax.lax.axis_size(EXPERT_AXES)
    return _Traffic(
        num_tokens=num_tokens,
        top_k=inputs.assignment.experts_BLK.shape[-1],
        num_experts=inputs.weights.down_EFD.shape[0] * num_devices,
        factor=strategy.buffer_factor,
    )


def run_all_to_all(strategy: Strategy, inputs: DeviceInputs) -> tuple[jax.Array, jax.Array]:
    """Sends each choice's token to its expert's device; a strategy, see `exchange.STRATEGIES`."""
    return _run_one_level(_Traffic.buffers_by_choice, strategy, inputs)


def run_dedup(strategy: Strategy, inputs: DeviceInputs) -> tuple[jax.Array, jax.Array]:
    """Sends a token once to each device that has any of its experts.

    One row comes back from each, the weighted sum of its experts' outputs. A strategy, see
    `exchange.STRATEGIES`.
    """
    return _run_one_level(_Traffic.buffers_by_device, strategy, inputs)


def _run_one_level(
    make_buffers: Callable[[_Traffic, int], Buffers],
    strategy: Strategy,
    inputs: DeviceInputs,
) -> tuple[jax.Array, jax.Array]:
    """Sends tokens straight to the devices of their experts, in buffers that `make_buffers` makes.

    These depend on what a device sends and on the number of devices.
    """
    num_devices = jax.lax.axis_size(EXPERT_AXES)
    run_received = without_overflow(inputs.run_experts)

    def make_round_trip(num_tokens: int) -> RoundTrip:
        traffic = _traffic(num_tokens, strategy, inputs)
        buffers = make_buffers(traffic, num_devices)
        return functools.partial(send_buffers, buffers, run_received)

    return send_in_chunks(make_round_trip, strategy.chunks, inputs)


def run_two_level(strategy: Strategy, inputs: DeviceInputs) -> tuple[jax.Array, jax.Array]:
    """Sends a token once to each group, and there once to each device that has any of its experts.

    Between groups it goes to the device with this one's place in its group. A strategy, see
    `exchange.STRATEGIES`.
    """
    num_groups, group_size = (jax.lax.axis_size(axis) for axis in EXPERT_AXES)

    def make_round_trip(num_tokens: int) -> RoundTrip:
        traffic = _traffic(num_tokens, strategy, inputs)
        # What arrives from other groups goes on within this one before anything is computed.
        within = traffic.buffers_within(num_groups, group_size)
        between = traffic.buffers_between(num_groups)
        run_group = functools.partial(_run_within_group, within, inputs.run_experts)
        return functools.partial(send_buffers, between, run_group)

    return send_in_chunks(make_round_trip, strategy.chunks, inputs)


def _run_within_group(
    within: Buffers,
    run_experts: RunExperts,
    x_1TD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Runs the tokens that arrived from other groups on the devices of this one."""
    run_received = without_overflow(run_experts)
    sent = send_buffers(within, run_received, x_1TD, choice, weights)
    arrived = DeviceInputs(run_experts, x_1TD, choice, weights)
    overflow_1TD, num_overflow = run_overflow(
        ("expert",),
        arrived,
        sent.is_overflow_TK,
        like_1TD=sent.y_1TD,
    )
    return sent.y_1TD + overflow_1TD, num_overflow


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
    receiver_TK = receivers(choice, scope)
    packed = buffers.pack(receiver_TK)

    def exchange_buffers(a_RX: jax.Array) -> jax.Array:
        """Sends each device its buffer, and returns those of all devices for this one."""
        shape = a_RX.shape
        a_nCX = a_RX.reshape(scope.num_devices, -1, *shape[1:])
        received_nCX = jax.lax.all_to_all(a_nCX, buffers.axes, split_axis=0, concat_axis=0)
        return received_nCX.reshape(shape)

    def exchange_and_name(a_RX: jax.Array) -> jax.Array:
        return checkpoint_name(exchange_buffers(a_RX), EXCHANGED)

    no_expert = scope.num_devices * scope.num_experts
    sent = packed.load(x_1TD[0], choice, no_expert)
    x_RD, choice_R = jax.tree.map(exchange_and_name, sent)
    choice_1R = jax.tree.map(lambda a: a[None], choice_R)
    local = choice_1R.for_experts(scope.first, scope.num_experts)
    local = dataclasses.replace(local, max_choices=buffers.max_choices)
    y_1RD, num_overflow = run_received(x_RD[None], local, weights)
    # The exchange is its own inverse: outputs come back to the rows that were sent.
    y_RD = exchange_buffers(y_1RD[0])
    y_TD = add_up(y_RD, packed.plan)
    return Returned(y_TD[None], packed.is_overflow_TK, num_overflow)
