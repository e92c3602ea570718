"""What a device sends to which other one: rows of buffers, and the offsets of a ragged exchange.

A plan says which choice fills a row, and in which row a choice is. Choices that find no room are
marked for their sender: nothing is dropped. Nothing here communicates.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.plan import Plan, dispatch, dispatch_weights, plan_capacity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SendBuffers:
    """Which choices are sent, and in which rows.

    Attributes:
      plan: rows for one receiver after another; `plan.row_TK` adds up each token from the rows
        that come back.
      is_overflow_TK: choices that found no room.
      by_choice: whether a row stands for one choice, or else for all of a token's choices that its
        receiver has.
    """

    plan: Plan
    is_overflow_TK: Bool[Array, "T K"]
    by_choice: bool = dataclasses.field(metadata={"static": True})

    def load(
        self, x_TD: Float[Array, "T D"], choice: TokenChoice, no_expert: int
    ) -> tuple[jax.Array, TokenChoice]:
        """Returns the rows to send, and the choices of each row, `[R, 1]` or `[R, K]`.

        Args:
          x_TD: tokens.
          choice: their experts, with a leading axis of one.
          no_expert: the expert id of an empty row.
        """
        input_weights_BLK = choice.input_weights_BLK
        rows = TokenChoice(
            self._expert_ids(choice.experts_BLK[0], no_expert),
            self._weights(choice.weights_BLK[0]),
            None if input_weights_BLK is None else self._weights(input_weights_BLK[0]),
        )
        return dispatch(x_TD, self.plan), rows

    def _expert_ids(self, experts_TK, no_expert: int) -> jax.Array:
        choice_R = self.plan.choice_R
        if self.by_choice:
            flat_S1 = experts_TK.reshape(-1, 1)
            return flat_S1.at[choice_R].get(mode="fill", fill_value=no_expert)
        token_R = choice_R // experts_TK.shape[1]
        return experts_TK.at[token_R].get(mode="fill", fill_value=no_expert)

    def _weights(self, weights_TK) -> jax.Array:
        if self.by_choice:
            return dispatch_weights(weights_TK, self.plan)[:, None]
        return dispatch(weights_TK, self.plan)


def room_for(mean: float, factor: float, most: int) -> int:
    """Returns rows for what takes `mean` rows on average and at most `most`.

    They are a factor times the mean, rounded up to a multiple of 8.
    """
    return min(most, math.ceil(factor * mean / 8) * 8)


def mean_receivers(num_experts: int, top_k: int, num_receivers: int) -> float:
    """Returns how many receivers a token's K different experts have on average.

    All experts are taken to be equally likely. A receiver has E / n of the experts: none of K is
    among them with probability C(E - E/n, K) / C(E, K).
    """
    # Choices of experts without weights, which need no receiver, are in addition to the E experts.
    top_k = min(top_k, num_experts)
    num_others = num_experts - num_experts // num_receivers
    miss_probability = math.comb(num_others, top_k) / math.comb(num_experts, top_k)
    return num_receivers * (1 - miss_probability)


def pack_choices(receiver_TK: Int[Array, "T K"], num_receivers: int, slots: int) -> SendBuffers:
    """Gives each choice a row.

    Args:
      receiver_TK: which device has the expert; n where there is none.
      num_receivers: n.
      slots: rows for each.
    """
    plan = plan_capacity(receiver_TK[None], num_receivers, slots)
    has_no_row_TK = plan.row_TK == plan.choice_R.shape[0]
    is_overflow_TK = (receiver_TK < num_receivers) & has_no_row_TK
    return SendBuffers(plan, is_overflow_TK, by_choice=True)


def pack_tokens(
    receiver_TK: Int[Array, "T K"], num_receivers: int, slots: int, max_choices: int
) -> SendBuffers:
    """Gives each receiver of a token a row, however many of the token's choices it has.

    Args:
      receiver_TK: which device has the expert; n where there is none.
      num_receivers: n.
      slots: rows for each.
      max_choices: upper bound on the choices that the rows for one receiver stand for.
    """
    num_tokens, top_k = receiver_TK.shape
    num_rows = num_receivers * slots
    row_Tn = _rows_by_receiver(receiver_TK, num_receivers, slots, max_choices)
    # A column more, for choices without a receiver.
    row_Tm = jnp.pad(row_Tn, ((0, 0), (0, 1)), constant_values=num_rows)
    row_TK = jnp.take_along_axis(row_Tm, receiver_TK, axis=1)
    is_overflow_TK = (receiver_TK < num_receivers) & (row_TK == num_rows)
    # The first of a token's choices with the same receiver stands for all of them.
    is_same_TKK = receiver_TK[:, :, None] == receiver_TK[:, None, :]
    is_earlier_KK = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    is_first_TK = ~(is_same_TKK & is_earlier_KK[None]).any(axis=2)
    row_TK = jnp.where(is_first_TK, row_TK, num_rows).astype(jnp.int32)
    choices_S = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
    empty_R = jnp.full(num_rows, num_tokens * top_k, jnp.int32)
    plan = Plan(
        row_TK=row_TK,
        choice_R=empty_R.at[row_TK.reshape(-1)].set(choices_S, mode="drop"),
        group_sizes_E=jnp.full(num_receivers, slots, jnp.int32),
        expert_R=jnp.repeat(jnp.arange(num_receivers, dtype=jnp.int32), slots),
    )
    return SendBuffers(plan, is_overflow_TK, by_choice=False)


def _rows_by_receiver(receiver_TK, num_receivers: int, slots: int, max_choices: int) -> jax.Array:
    """Returns the row of each token for each receiver, `[T, n]`; n * slots where it has none."""
    num_choices_Tn = jax.nn.one_hot(receiver_TK, num_receivers, dtype=jnp.int32).sum(axis=1)
    is_wanted_Tn = num_choices_Tn > 0
    wanted_Tn = is_wanted_Tn.astype(jnp.int32)
    slot_Tn = jnp.cumsum(wanted_Tn, axis=0) - wanted_Tn
    num_choices_so_far_Tn = jnp.cumsum(num_choices_Tn, axis=0)
    has_room_Tn = (slot_Tn < slots) & (num_choices_so_far_Tn <= max_choices)
    first_row_1n = jnp.arange(num_receivers)[None] * slots
    return jnp.where(is_wanted_Tn & has_room_Tn, first_row_1n + slot_Tn, num_receivers * slots)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedOffsets:
    """Where the rows of this device's array go, and where those of others arrive.

    The first four are the arguments of `jax.lax.ragged_all_to_all`; arrays are indexed by device.

    Attributes:
      input_offsets_n: the first row for each receiver, in this device's array.
      send_sizes_n: rows for each receiver.
      output_offsets_n: where they begin in the array of each receiver.
      recv_sizes_n: rows from each sender.
      recv_offsets_n: where those begin in this device's array of what arrives: one sender's rows
        after another's.
      sender_offsets_n: where they are in their senders' arrays.
    """

    input_offsets_n: jax.Array
    send_sizes_n: jax.Array
    output_offsets_n: jax.Array
    recv_sizes_n: jax.Array
    recv_offsets_n: jax.Array
    sender_offsets_n: jax.Array

    @classmethod
    def from_sizes(
        cls, sizes_nn: Int[Array, "n n"], me: jax.Array | int, room: int
    ) -> "RaggedOffsets":
        """Computes offsets from the rows of each sender for each receiver.

        Each receiver takes `room` rows, those of the first senders.

        Args:
          sizes_nn: rows by sender and receiver.
          me: this device's place among them.
          room: rows of every receiver's array of arrivals.
        """
        output_offsets_nn = jnp.minimum(jnp.cumsum(sizes_nn, axis=0) - sizes_nn, room)
        send_sizes_nn = jnp.minimum(sizes_nn, room - output_offsets_nn)
        input_offsets_nn = jnp.cumsum(sizes_nn, axis=1) - sizes_nn
        return cls(
            input_offsets_n=input_offsets_nn[me],
            send_sizes_n=send_sizes_nn[me],
            output_offsets_n=output_offsets_nn[me],
            recv_sizes_n=send_sizes_nn[:, me],
            recv_offsets_n=output_offsets_nn[:, me],
            sender_offsets_n=input_offsets_nn[:, me],
        )

    def back(self) -> "RaggedOffsets":
        """Returns the offsets that send the same rows back to where they were."""
        return RaggedOffsets(
            input_offsets_n=self.recv_offsets_n,
            send_sizes_n=self.recv_sizes_n,
            output_offsets_n=self.sender_offsets_n,
            recv_sizes_n=self.send_sizes_n,
            recv_offsets_n=self.input_offsets_n,
            sender_offsets_n=self.output_offsets_n,
        )

    def is_row(self, num_rows: int) -> Bool[Array, "R 1"]:
        """Returns which rows of the array of arrivals are filled."""
        return (jnp.arange(num_rows) < self.recv_sizes_n.sum())[:, None]

    def pack(self, plan: Plan, receiver_TK: Int[Array, "T K"]) -> SendBuffers:
        """Returns the rows to send, of those that `plan` sorts by receiver."""
        # One receiver more, for choices without one.
        offset_m = jnp.append(self.input_offsets_n, 0)
        size_m = jnp.append(self.send_sizes_n, 0)
        is_past_TK = plan.row_TK - offset_m[receiver_TK] >= size_m[receiver_TK]
        is_overflow_TK = is_past_TK & (receiver_TK < self.send_sizes_n.shape[0])
        row_TK = jnp.where(is_overflow_TK, plan.choice_R.shape[0], plan.row_TK)
        plan = dataclasses.replace(plan, row_TK=row_TK)
        return SendBuffers(plan, is_overflow_TK, by_choice=True)
