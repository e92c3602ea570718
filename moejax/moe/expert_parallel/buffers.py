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
from moejax.moe.dispatch.plan import (
    Plan,
    dispatch,
    dispatch_weights,
    experts_of_equal_groups,
    plan_capacity,
)


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
        self,
        x_TD: Float[Array, "T D"],
        choice: TokenChoice,
        no_expert: int,
    ) -> tuple[jax.Array, TokenChoice]:
        """Returns the rows to send, and the choices of each row, `[R, 1]` or `[R, K]`.

        Args:
          x_TD: tokens.
          choice: their experts, with a leading axis of one.
          no_expert: the expert id of an empty row.
        """
        experts_RK = self._expert_ids(choice.experts_BLK[0], no_expert)
        weights_RK = self._weights(choice.weights_BLK[0])
        input_weights_RK = None
        if choice.input_weights_BLK is not None:
            input_weights_RK = self._weights(choice.input_weights_BLK[0])
        rows = TokenChoice(experts_RK, weights_RK, input_weights_RK)
        x_RD = dispatch(x_TD, self.plan)
        return x_RD, rows

    def _expert_ids(self, experts_TK: jax.Array, no_expert: int) -> jax.Array:
        """Returns the experts of each row."""
        choice_R = self.plan.choice_R
        if self.by_choice:
            experts_S1 = experts_TK.reshape(-1, 1)
            return experts_S1.at[choice_R].get(mode="fill", fill_value=no_expert)
        top_k = experts_TK.shape[1]
        token_R = choice_R // top_k
        return experts_TK.at[token_R].get(mode="fill", fill_value=no_expert)

    def _weights(self, weights_TK: jax.Array) -> jax.Array:
        """Returns the weights of each row's choices."""
        if self.by_choice:
            weights_R = dispatch_weights(weights_TK, self.plan)
            return weights_R[:, None]
        return dispatch(weights_TK, self.plan)


def room_for(mean: float, factor: float, most: int) -> int:
    """Returns rows for what takes `mean` rows on average and at most `most`.

    They are a factor times the mean, rounded up to a multiple of 8.
    """
    num_eights = math.ceil(factor * mean / 8)
    return min(most, num_eights * 8)


def mean_receivers(num_experts: int, top_k: int, num_receivers: int) -> float:
    """Returns how many receivers a token's K different experts have on average.

    All experts are taken to be equally likely. A receiver has E / n of the experts: none of K is
    among them with probability C(E - E/n, K) / C(E, K).
    """
    # Choices of experts without weights, which need no receiver, are in addition to the E experts.
    top_k = min(top_k, num_experts)
    num_others = num_experts - num_experts // num_receivers
    num_misses = math.comb(num_others, top_k)
    miss_probability = num_misses / math.comb(num_experts, top_k)
    return num_receivers * (1 - miss_probability)


def pack_choices(
    receiver_TK: Int[Array, "T K"],
    num_receivers: int,
    slots: int,
) -> SendBuffers:
    """Gives each choice a row.

    Args:
      receiver_TK: which device has the expert; n where there is none.
      num_receivers: n.
      slots: rows for each.
    """
    receiver_1TK = receiver_TK[None]
    plan = plan_capacity(receiver_1TK, num_receivers, slots)
    num_rows = num_receivers * slots
    has_no_row_TK = plan.row_TK == num_rows
    has_receiver_TK = receiver_TK < num_receivers
    is_overflow_TK = has_receiver_TK & has_no_row_TK
    return SendBuffers(plan, is_overflow_TK, by_choice=True)


def pack_tokens(
    receiver_TK: Int[Array, "T K"],
    num_receivers: int,
    slots: int,
    max_choices: int,
) -> SendBuffers:
    """Gives each receiver of a token a row, however many of the token's choices it has.

    Args:
      receiver_TK: which device has the expert; n where there is none.
      num_receivers: n.
      slots: rows for each.
      max_choices: upper bound on the choices that the rows for one receiver stand for.
    """
    num_rows = num_receivers * slots
    num_choices = receiver_TK.size
    row_Tn = _rows_by_receiver(receiver_TK, num_receivers, slots, max_choices)
    # A column more, for choices without a receiver.
    row_Tm = jnp.pad(row_Tn, ((0, 0), (0, 1)), constant_values=num_rows)
    row_TK = jnp.take_along_axis(row_Tm, receiver_TK, axis=1)
    has_receiver_TK = receiver_TK < num_receivers
    has_no_row_TK = row_TK == num_rows
    is_overflow_TK = has_receiver_TK & has_no_row_TK
    # One choice stands for all of a token's choices with the same receiver.
    is_first_TK = _is_first_of_its_kind(receiver_TK)
    row_TK = jnp.where(is_first_TK, row_TK, num_rows)
    row_TK = row_TK.astype(jnp.int32)
    choices_S = jnp.arange(num_choices, dtype=jnp.int32)
    empty_R = jnp.full(num_rows, num_choices, jnp.int32)
    row_S = row_TK.reshape(-1)
    plan = Plan(
        row_TK=row_TK,
        choice_R=empty_R.at[row_S].set(choices_S, mode="drop"),
        group_sizes_E=jnp.full(num_receivers, slots, jnp.int32),
        expert_R=experts_of_equal_groups(num_receivers, slots),
    )
    return SendBuffers(plan, is_overflow_TK, by_choice=False)


def _is_first_of_its_kind(receiver_TK: jax.Array) -> jax.Array:
    """Whether none of a token's earlier choices has the same receiver."""
    top_k = receiver_TK.shape[1]
    is_same_TKK = receiver_TK[:, :, None] == receiver_TK[:, None, :]
    ones_KK = jnp.ones((top_k, top_k), bool)
    is_earlier_KK = jnp.tril(ones_KK, -1)
    is_repeated_TKK = is_same_TKK & is_earlier_KK[None]
    is_repeated_TK = is_repeated_TKK.any(axis=2)
    return ~is_repeated_TK


def _rows_by_receiver(
    receiver_TK: jax.Array,
    num_receivers: int,
    slots: int,
    max_choices: int,
) -> jax.Array:
    """Returns the row of each token for each receiver, `[T, n]`; n * slots where it has none."""
    is_receiver_TKn = jax.nn.one_hot(receiver_TK, num_receivers, dtype=jnp.int32)
    num_choices_Tn = is_receiver_TKn.sum(axis=1)
    is_wanted_Tn = num_choices_Tn > 0
    wanted_Tn = is_wanted_Tn.astype(jnp.int32)
    slot_Tn = jnp.cumsum(wanted_Tn, axis=0) - wanted_Tn
    num_choices_so_far_Tn = jnp.cumsum(num_choices_Tn, axis=0)
    has_slot_Tn = slot_Tn < slots
    has_room_Tn = has_slot_Tn & (num_choices_so_far_Tn <= max_choices)
    receiver_n = jnp.arange(num_receivers)
    first_row_1n = receiver_n[None] * slots
    has_row_Tn = is_wanted_Tn & has_room_Tn
    row_Tn = first_row_1n + slot_Tn
    no_row = num_receivers * slots
    return jnp.where(has_row_Tn, row_Tn, no_row)


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
        cls,
        sizes_nn: Int[Array, "n n"],
        me: jax.Array | int,
        room: int,
    ) -> "RaggedOffsets":
        """Computes offsets from the rows of each sender for each receiver.

        Each receiver takes `room` rows, those of the first senders.

        Args:
          sizes_nn: rows by sender and receiver.
          me: this device's place among them.
          room: rows of every receiver's array of arrivals.
        """
        # Each sender's rows come after those of the senders before it.
        wanted_offsets_nn = jnp.cumsum(sizes_nn, axis=0) - sizes_nn
        output_offsets_nn = jnp.minimum(wanted_offsets_nn, room)
        room_left_nn = room - output_offsets_nn
        send_sizes_nn = jnp.minimum(sizes_nn, room_left_nn)
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
        row_R = jnp.arange(num_rows)
        num_filled = self.recv_sizes_n.sum()
        is_row_R = row_R < num_filled
        return is_row_R[:, None]

    def pack(self, plan: Plan, receiver_TK: Int[Array, "T K"]) -> SendBuffers:
        """Returns the rows to send, of those that `plan` sorts by receiver."""
        # One receiver more, for choices without one.
        first_row_m = jnp.append(self.input_offsets_n, 0)
        size_m = jnp.append(self.send_sizes_n, 0)
        place_TK = plan.row_TK - first_row_m[receiver_TK]
        is_past_TK = place_TK >= size_m[receiver_TK]
        num_receivers = self.send_sizes_n.shape[0]
        has_receiver_TK = receiver_TK < num_receivers
        is_overflow_TK = is_past_TK & has_receiver_TK
        no_row = plan.choice_R.shape[0]
        row_TK = jnp.where(is_overflow_TK, no_row, plan.row_TK)
        plan = dataclasses.replace(plan, row_TK=row_TK)
        return SendBuffers(plan, is_overflow_TK, by_choice=True)
