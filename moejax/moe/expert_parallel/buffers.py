"""What a device sends to which other one: plans of buffers, and the offsets of a ragged exchange.

A plan says which choice fills a row, and in which row a choice lies. What finds no room is left
over, for its sender to see: nothing is dropped. Nothing here communicates.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.moe.dispatch.on_device import TokenChoice
from moejax.moe.dispatch.plan import Plan, dispatch, dispatch_weights, plan_capacity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SendBuffers:
    """What is sent, and what is not.

    Attributes:
      plan: rows for one receiver after another; `plan.row_TK` sums each token up from the rows
        that come back.
      is_left_TK: choices that found no room.
      by_choice: whether a row is of one choice, or else of all of a token's choices that its
        receiver has.
    """

    plan: Plan
    is_left_TK: Bool[Array, "T K"]
    by_choice: bool = dataclasses.field(metadata={"static": True})

    def load(
        self, x_TD: Float[Array, "T D"], chosen: TokenChoice, none: int
    ) -> tuple[jax.Array, TokenChoice]:
        """The rows that are sent, and the choices of each, `[R, 1]` or `[R, K]`; an empty row's expert is `none`."""
        top_k, plan = self.plan.row_TK.shape[1], self.plan
        experts_TK, weights_TK = chosen.experts_BLK[0], chosen.weights_BLK[0]
        index_R = plan.choice_R if self.by_choice else plan.choice_R // top_k
        experts_UK = experts_TK.reshape(-1, 1) if self.by_choice else experts_TK

        def of_rows(weights_TK):
            return (
                dispatch_weights(weights_TK, plan)[:, None]
                if self.by_choice
                else dispatch(weights_TK, plan)
            )

        inputs_BLK = chosen.input_weights_BLK
        rows = TokenChoice(
            experts_UK.at[index_R].get(mode="fill", fill_value=none),
            of_rows(weights_TK),
            None if inputs_BLK is None else of_rows(inputs_BLK[0]),
        )
        return dispatch(x_TD, plan), rows


def room_for(mean: float, factor: float, most: int) -> int:
    """Rows for what takes `mean` rows on average and at most `most`: `factor` times the mean, a multiple of 8."""
    return min(most, math.ceil(factor * mean / 8) * 8)


def mean_receivers(num_experts: int, top_k: int, num_receivers: int) -> float:
    """How many receivers a token's K different experts have on average, if all are equally likely.

    Those of a receiver are E / n of the experts: none of K is among them with probability C(E -
    E/n, K) / C(E, K).
    """
    top_k = min(
        top_k, num_experts
    )  # choices of experts without weights, which need no receiver, come on top
    others = num_experts - num_experts // num_receivers
    return num_receivers * (1 - math.comb(others, top_k) / math.comb(num_experts, top_k))


def pack_choices(receiver_TK: Int[Array, "T K"], num_receivers: int, slots: int) -> SendBuffers:
    """A row for each choice.

    Args:
      receiver_TK: who has the expert; n where there is none.
      num_receivers: n.
      slots: rows for each.
    """
    plan = plan_capacity(receiver_TK[None], num_receivers, slots)
    has_none_TK = plan.row_TK == plan.choice_R.shape[0]
    return SendBuffers(plan, (receiver_TK < num_receivers) & has_none_TK, by_choice=True)


def pack_tokens(
    receiver_TK: Int[Array, "T K"], num_receivers: int, slots: int, max_choices: int
) -> SendBuffers:
    """A row for each receiver of a token, however many of its choices are there.

    Args:
      receiver_TK: who has the expert; n where there is none.
      num_receivers: n.
      slots: rows for each.
      max_choices: of the tokens in the rows for one receiver, those choices that it has.
    """
    num_tokens, top_k = receiver_TK.shape
    choices_Tn = jax.nn.one_hot(receiver_TK, num_receivers, dtype=jnp.int32).sum(axis=1)
    is_sent_Tn = choices_Tn > 0
    place_Tn, before_Tn = (
        jnp.cumsum(a, axis=0) - a for a in (is_sent_Tn.astype(jnp.int32), choices_Tn)
    )
    is_in_Tn = is_sent_Tn & (place_Tn < slots) & (before_Tn + choices_Tn <= max_choices)
    num_rows = num_receivers * slots
    row_Tn = jnp.where(is_in_Tn, jnp.arange(num_receivers)[None] * slots + place_Tn, num_rows)
    row_Tm = jnp.pad(row_Tn, ((0, 0), (0, 1)), constant_values=num_rows)  # m: or none
    row_TK = jnp.take_along_axis(row_Tm, receiver_TK, axis=1)
    is_left_TK = (receiver_TK < num_receivers) & (row_TK == num_rows)
    is_same_TKK = receiver_TK[:, :, None] == receiver_TK[:, None, :]
    is_first_TK = ~(is_same_TKK & jnp.tril(jnp.ones((top_k, top_k), bool), -1)[None]).any(axis=2)
    row_TK = jnp.where(is_first_TK, row_TK, num_rows).astype(jnp.int32)
    choice_R = jnp.full(num_rows, num_tokens * top_k, jnp.int32)
    choices = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
    plan = Plan(
        row_TK=row_TK,
        choice_R=choice_R.at[row_TK.reshape(-1)].set(choices, mode="drop"),
        group_sizes_E=jnp.full(num_receivers, slots, jnp.int32),
        expert_R=jnp.repeat(jnp.arange(num_receivers, dtype=jnp.int32), slots),
    )
    return SendBuffers(plan, is_left_TK, by_choice=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedOffsets:
    """Where the rows of this device's array go, and where those of others arrive: what a ragged exchange asks for.

    Attributes:
      starts_n: the first row for each receiver, in the sender's array.
      sent_n: rows for each receiver.
      places_n: where they begin in the array of each receiver.
      arriving_n: rows from each sender.
      arrivals_n: where those begin in this device's array of what arrives: one sender's rows
        after another's.
      returns_n: where they lie in their senders' arrays.
    """

    input_offsets_n: jax.Array
    send_sizes_n: jax.Array
    output_offsets_n: jax.Array
    recv_sizes_n: jax.Array
    arrivals_n: jax.Array
    returns_n: jax.Array

    @classmethod
    def from_sizes(
        cls, sizes_nn: Int[Array, "n n"], me: jax.Array | int, room: int
    ) -> "RaggedOffsets":
        """From the rows of each sender for each receiver, which takes `room` rows, those of the first senders.

        Args:
          sizes_nn: rows by sender and receiver.
          me: this device's place among them.
          room: rows of every receiver's array of arrivals.
        """
        places_nn = jnp.minimum(jnp.cumsum(sizes_nn, axis=0) - sizes_nn, room)
        sent_nn = jnp.minimum(sizes_nn, room - places_nn)
        starts_nn = jnp.cumsum(sizes_nn, axis=1) - sizes_nn
        return cls(
            starts_nn[me],
            sent_nn[me],
            places_nn[me],
            sent_nn[:, me],
            places_nn[:, me],
            starts_nn[:, me],
        )

    def back(self) -> "RaggedOffsets":
        """The same rows on their way back, to where they were."""
        return RaggedOffsets(
            self.arrivals_n,
            self.recv_sizes_n,
            self.returns_n,
            self.send_sizes_n,
            self.input_offsets_n,
            self.output_offsets_n,
        )

    def is_row(self, num_rows: int) -> Bool[Array, "R 1"]:
        """Which rows of the array of arrivals are filled."""
        return (jnp.arange(num_rows) < self.recv_sizes_n.sum())[:, None]

    def pack(self, plan: Plan, receiver_TK: Int[Array, "T K"]) -> SendBuffers:
        """The rows that are sent, of those sorted by receiver."""
        start_m, sent_m = (
            jnp.append(a_n, 0) for a_n in (self.input_offsets_n, self.send_sizes_n)
        )  # m: or none
        is_past_TK = plan.row_TK - start_m[receiver_TK] >= sent_m[receiver_TK]
        is_left_TK = is_past_TK & (receiver_TK < self.send_sizes_n.shape[0])
        row_TK = jnp.where(is_left_TK, plan.choice_R.shape[0], plan.row_TK)
        return SendBuffers(dataclasses.replace(plan, row_TK=row_TK), is_left_TK, by_choice=True)
