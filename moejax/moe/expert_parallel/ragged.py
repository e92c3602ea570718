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
    receivers,
    send_in_chunks,
)
from moejax.moe.expert_parallel.strategy import EXCHANGED, DeviceInputs, RunExperts, Strategy
from moejax.moe.experts.experts import ExpertWeights
from moejax.sharding import EXPERT_AXES


def run_ragged(strategy: Strategy, inputs: DeviceInputs) -> tuple[jax.Array, jax.Array]:
    """Sends each choice's token to its expert's device, in rows sorted by device.

    A strategy, see `exchange.STRATEGIES`.
    """
    num_devices = jax.lax.axis_size(EXPERT_AXES)
    top_k = inputs.assignment.experts_BLK.shape[-1]

    def make_round_trip(num_tokens: int) -> RoundTrip:
        num_choices = num_tokens * top_k
        most = num_devices * num_choices
        room = room_for(num_choices, strategy.buffer_factor, most)
        return functools.partial(_send_ragged, room, inputs.run_experts)

    return send_in_chunks(make_round_trip, strategy.chunks, inputs)


def _send_ragged(
    room: int,
    run_experts: RunExperts,
    x_1TD: jax.Array,
    choice: TokenChoice,
    weights: ExpertWeights,
) -> Returned:
    """Sends rows sorted by receiver, of which each device takes `room` at most; a round trip."""
    scope = expert_scope(EXPERT_AXES, weights)
    receiver_TK = receivers(choice, scope)
    plan = plan_dropless(receiver_TK, scope.num_devices)
    sizes_nn = jax.lax.all_gather(plan.group_sizes_E, EXPERT_AXES, axis=0)
    me = jax.lax.axis_index(EXPERT_AXES)
    offsets = RaggedOffsets.from_sizes(sizes_nn, me, room)
    packed = offsets.pack(plan, receiver_TK)

    def send_and_name(a_RX: jax.Array) -> jax.Array:
        return checkpoint_name(_send_rows(a_RX, offsets, room), EXCHANGED)

    no_expert = scope.num_devices * scope.num_experts
    sent = packed.load(x_1TD[0], choice, no_expert)
    num_sent = sent[0].shape[0]
    x_RD, choice_R = jax.tree.map(send_and_name, sent)
    # Empty rows are of no expert of this device.
    is_row_R1 = offsets.is_row(room)
    experts_R1 = jnp.where(is_row_R1, choice_R.experts_BLK, scope.first - 1)
    choice_R = dataclasses.replace(choice_R, experts_BLK=experts_R1)
    choice_1R = jax.tree.map(lambda a: a[None], choice_R)
    local = choice_1R.for_experts(scope.first, scope.num_experts)
    y_1RD = run_experts(x_RD[None], local, weights)
    y_RD = _send_rows(y_1RD[0], offsets.back(), num_sent)
    y_TD = add_up(y_RD, packed.plan)
    return Returned(y_TD[None], packed.is_overflow_TK, jnp.float32(0))


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
    shape = (num_rows, *a_RX.shape[1:])
    return jax.lax.ragged_all_to_all(
        a_RX,
        zeros_varying_like(a_RX, shape, a_RX.dtype),
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
    a_nRX, input_offsets_nn, send_sizes_nn, output_offsets_nn = map(
        _all_gather,
        (a_RX, offsets.input_offsets_n, offsets.send_sizes_n, offsets.output_offsets_n),
    )
    # What each sender sends to this device, and where that begins here.
    input_offset_n1 = _column(input_offsets_nn, me)
    send_size_n1 = _column(send_sizes_nn, me)
    output_offset_n1 = _column(output_offsets_nn, me)
    row_S = jnp.arange(num_rows)
    row_1S = row_S[None]
    is_after_start_nS = output_offset_n1 <= row_1S
    end_n1 = output_offset_n1 + send_size_n1
    is_before_end_nS = row_1S < end_n1
    is_from_nS = is_after_start_nS & is_before_end_nS
    sender_S = jnp.argmax(is_from_nS, axis=0)
    place_nS = row_1S - output_offset_n1
    source_nS = place_nS + input_offset_n1
    source_1S = jnp.take_along_axis(source_nS, sender_S[None], axis=0)
    source_S = source_1S[0]
    rows_SX = a_nRX.at[sender_S, source_S].get(mode="clip")
    is_row_S = is_from_nS.any(axis=0)
    num_other_axes = a_RX.ndim - 1
    is_row_SX = is_row_S.reshape(-1, *[1] * num_other_axes)
    return jnp.where(is_row_SX, rows_SX, 0)


def _all_gather(a_X: jax.Array) -> jax.Array:
    """Returns the array of every device."""
    return jax.lax.all_gather(a_X, EXPERT_AXES, axis=0)


def _column(table_nn: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one column of a table, as `[n, 1]`."""
    column_n = table_nn[:, index]
    return column_n[:, None]
