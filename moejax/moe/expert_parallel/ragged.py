"""Strategy "ragged": as "all_to_all", without the empty rows of buffers.

Rows are sent by `jax.lax.ragged_all_to_all`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.kernels.device import platform
from moejax.kernels.vma import zeros_varying_like
from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.plan import add_up, plan_dropless
from moejax.moe.expert_parallel.buffers import RaggedOffsets, room_for
from moejax.moe.expert_parallel.overflow import (
    Returned,
    RoundTrip,
    expert_scope,
    send_in_chunks,
)
from moejax.moe.expert_parallel.strategy import EXCHANGED, RunExperts, Strategy
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES


def run_ragged(
    strategy: Strategy,
    run_experts: RunExperts,
    x_bLD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Sends each choice's token to its expert's device, in rows sorted by device.

    A strategy, see `exchange.STRATEGIES`.
    """
    num_devices = jax.lax.axis_size(EXPERT_AXES)
    top_k = choice.experts_BLK.shape[-1]

    def make_round_trip(num_tokens: int) -> RoundTrip:
        num_choices = num_tokens * top_k
        room = room_for(num_choices, strategy.buffer_factor, num_devices * num_choices)
        return functools.partial(_send_ragged, room, run_experts)

    return send_in_chunks(make_round_trip, strategy.chunks, run_experts, x_bLD, choice, weights)


def _send_ragged(
    room: int,
    run_experts: RunExperts,
    x_1TD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> Returned:
    """Sends rows sorted by receiver, of which each device takes `room` at most; a round trip."""
    scope = expert_scope(EXPERT_AXES, weights)
    receiver_TK = jnp.minimum(choice.experts_BLK[0] // scope.num_experts, scope.num_devices)
    plan = plan_dropless(receiver_TK, scope.num_devices)
    sizes_nn = jax.lax.all_gather(plan.group_sizes_E, EXPERT_AXES, axis=0)
    offsets = RaggedOffsets.from_sizes(sizes_nn, jax.lax.axis_index(EXPERT_AXES), room)
    packed = offsets.pack(plan, receiver_TK)
    sent = packed.load(x_1TD[0], choice, no_expert=scope.num_devices * scope.num_experts)
    x_RD, choice_R = jax.tree.map(
        lambda a: checkpoint_name(_send_rows(a, offsets, room), EXCHANGED), sent
    )
    # Empty rows are of no expert of this device.
    experts_R1 = jnp.where(offsets.is_row(room), choice_R.experts_BLK, scope.first - 1)
    choice_R = dataclasses.replace(choice_R, experts_BLK=experts_R1)
    choice_1R = jax.tree.map(lambda a: a[None], choice_R)
    received = choice_1R.for_experts(scope.first, scope.num_experts)
    y_1RD = run_experts(x_RD[None], received, weights)
    num_sent = sent[0].shape[0]
    y_RD = _send_rows(y_1RD[0], offsets.back(), num_sent)
    return Returned(add_up(y_RD, packed.plan)[None], packed.is_overflow_TK, jnp.float32(0))


def _send_rows(a_RX: jax.Array, offsets: RaggedOffsets, num_rows: int) -> jax.Array:
    """Sends rows by offsets, and returns `num_rows` rows: what arrives, and zeros."""
    if jnp.issubdtype(a_RX.dtype, jnp.integer):
        return _ragged_all_to_all(a_RX, offsets, num_rows)
    return _send_rows_with_gradient(num_rows, a_RX, offsets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_rows_with_gradient(num_rows, a_RX, offsets):
    return _ragged_all_to_all(a_RX, offsets, num_rows)


def _send_rows_forward(num_rows, a_RX, offsets):
    return _ragged_all_to_all(a_RX, offsets, num_rows), (offsets, a_RX.shape[0])


def _send_rows_backward(_, residuals, da_SX):
    offsets, num_sent = residuals
    return _send_rows_with_gradient(num_sent, da_SX, offsets.back()), None


_send_rows_with_gradient.defvjp(_send_rows_forward, _send_rows_backward)


def _ragged_all_to_all(a_RX: jax.Array, offsets: RaggedOffsets, num_rows: int) -> jax.Array:
    if platform() == "cpu":
        return _emulate_ragged_all_to_all(a_RX, offsets, num_rows)
    return jax.lax.ragged_all_to_all(
        a_RX,
        zeros_varying_like(a_RX, (num_rows, *a_RX.shape[1:]), a_RX.dtype),
        offsets.input_offsets_n,
        offsets.send_sizes_n,
        offsets.output_offsets_n,
        offsets.recv_sizes_n,
        axis_name=EXPERT_AXES,
    )


def _emulate_ragged_all_to_all(a_RX: jax.Array, offsets: RaggedOffsets, num_rows: int) -> jax.Array:
    """Does the same from the same offsets on XLA:CPU, which has no such collective.

    All rows go everywhere.
    """
    me = jax.lax.axis_index(EXPERT_AXES)
    a_nRX, input_offsets_nn, send_sizes_nn, output_offsets_nn = jax.tree.map(
        lambda a: jax.lax.all_gather(a, EXPERT_AXES, axis=0),
        (a_RX, offsets.input_offsets_n, offsets.send_sizes_n, offsets.output_offsets_n),
    )
    # What each sender sends to this device, and where that begins here.
    input_offset_n1 = input_offsets_nn[:, me][:, None]
    send_size_n1 = send_sizes_nn[:, me][:, None]
    output_offset_n1 = output_offsets_nn[:, me][:, None]
    row_1S = jnp.arange(num_rows)[None]
    is_after_start_nS = output_offset_n1 <= row_1S
    is_before_end_nS = row_1S < output_offset_n1 + send_size_n1
    is_from_nS = is_after_start_nS & is_before_end_nS
    sender_S = jnp.argmax(is_from_nS, axis=0)
    source_nS = row_1S - output_offset_n1 + input_offset_n1
    source_S = jnp.take_along_axis(source_nS, sender_S[None], axis=0)[0]
    rows_SX = a_nRX.at[sender_S, source_S].get(mode="clip")
    is_row_S = is_from_nS.any(axis=0).reshape(-1, *[1] * (a_RX.ndim - 1))
    return jnp.where(is_row_S, rows_SX, 0)
