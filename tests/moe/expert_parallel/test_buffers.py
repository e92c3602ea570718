"""What is sent to whom: against loops over tokens."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.dispatch.assignment import TokenChoice
from moejax.moe.dispatch.plan import plan_dropless
from moejax.moe.expert_parallel.buffers import (
    RaggedOffsets,
    mean_receivers,
    pack_choices,
    pack_tokens,
    room_for,
)

T, K, N, NONE = 40, 3, 4, 99


def receivers(seed, top_k=K, is_skewed=False):
    rng = np.random.default_rng(seed)
    receiver_TK = rng.integers(0, 1 if is_skewed else N, (T, top_k)).astype(np.int32)
    receiver_TK[rng.random(T) < 0.2] = N  # padding
    receiver_TK[rng.random((T, top_k)) < 0.1] = N  # refused by capacity
    return receiver_TK


def test_the_mean_number_of_receivers_is_that_of_all_ways_to_choose():
    for num_experts, top_k, num_receivers in [
        (8, 2, 4),
        (8, 3, 2),
        (6, 6, 3),
        (4, 1, 4),
        (9, 4, 3),
    ]:
        per = num_experts // num_receivers
        ways = [
            len({e // per for e in way})
            for way in itertools.combinations(range(num_experts), top_k)
        ]
        assert mean_receivers(num_experts, top_k, num_receivers) == pytest.approx(np.mean(ways))
    assert mean_receivers(64, 8, 8) == pytest.approx(5.4326, abs=1e-4)
    assert mean_receivers(2, 3, 2) == 2  # some choices are of experts without weights


def test_room_is_the_mean_times_the_factor_in_eights_and_no_more_than_can_come():
    assert [
        room_for(*case) for case in [(10, 1.5, 99), (16, 1.5, 99), (10, 1.5, 12), (3.2, 1.0, 40)]
    ] == [
        16,
        24,
        12,
        8,
    ]


def packed(buffers, receiver_TK, slots):
    """Rows as `{receiver: [(token, choices there)]}`, and what is left, by walking through the
    arrays.
    """
    rows, num_rows = {n: [] for n in range(N)}, N * slots
    choice_R, row_TK = np.asarray(buffers.plan.choice_R), np.asarray(buffers.plan.row_TK)
    top_k = receiver_TK.shape[1]
    assert choice_R.shape == (num_rows,)
    for row, choice in enumerate(choice_R):
        if choice < receiver_TK.size:
            token, k = divmod(int(choice), top_k)
            assert receiver_TK[token, k] == row // slots and row_TK[token, k] == row
            rows[row // slots].append((token, k))
    assert (row_TK < num_rows).sum() == sum(map(len, rows.values()))
    left = [(int(t), int(k)) for t, k in np.argwhere(np.asarray(buffers.is_overflow_TK))]
    return rows, left


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize("slots", [3, 8, 40])
def test_each_choice_has_a_row_while_there_is_room_and_the_rest_is_left_over(slots, is_skewed):
    receiver_TK = receivers(0, is_skewed=is_skewed)
    rows, left = packed(pack_choices(jnp.asarray(receiver_TK), N, slots), receiver_TK, slots)
    for n in range(N):
        wanted = [(t, k) for t in range(T) for k in range(K) if receiver_TK[t, k] == n]
        assert rows[n] == wanted[:slots]
        assert set(wanted[slots:]) == {(t, k) for t, k in left if receiver_TK[t, k] == n}
    assert all(receiver_TK[t, k] < N for t, k in left)


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize(("slots", "max_choices"), [(3, 999), (8, 6), (40, 999), (40, 7)])
def test_each_token_has_a_row_for_a_receiver_while_there_is_room_for_it_and_its_choices(
    slots, max_choices, is_skewed
):
    receiver_TK = receivers(1, is_skewed=is_skewed)
    buffers = pack_tokens(jnp.asarray(receiver_TK), N, slots, max_choices)
    rows, left = packed(buffers, receiver_TK, slots)
    for n in range(N):
        expected, place, before = [], 0, 0
        for t in range(T):
            there = [k for k in range(K) if receiver_TK[t, k] == n]
            if there and place < slots and before + len(there) <= max_choices:
                expected.append((t, there[0]))
            elif there:
                assert {(t, k) for k in there} <= set(left)
            place, before = place + bool(there), before + len(there)
        assert rows[n] == expected
        kept = {t for t, _ in expected}
        assert sum(int((receiver_TK[t] == n).sum()) for t in kept) <= max_choices
        assert not {(t, k) for t, k in left if receiver_TK[t, k] == n and t in kept}
    assert (left == []) == (slots == 40 and max_choices == 999)


@pytest.mark.parametrize("by_choice", [True, False])
def test_rows_carry_their_tokens_with_their_choices_and_empty_rows_nothing(by_choice):
    receiver_TK, rng = receivers(2), np.random.default_rng(0)
    pack = (
        pack_choices(jnp.asarray(receiver_TK), N, 8)
        if by_choice
        else pack_tokens(jnp.asarray(receiver_TK), N, 8, 99)
    )
    x_TD, weights_TK, inputs_TK = (
        jnp.asarray(rng.normal(size=(T, size)), jnp.float32) for size in (5, K, K)
    )
    experts_TK = jnp.asarray(
        np.where(receiver_TK < N, receiver_TK * 2 + rng.integers(0, 2, (T, K)), NONE), jnp.int32
    )
    x_RD, there = pack.load(
        x_TD, TokenChoice(experts_TK[None], weights_TK[None], inputs_TK[None]), NONE
    )
    for row, choice in enumerate(np.asarray(pack.plan.choice_R)):
        if choice == T * K:
            assert (
                not x_RD[row].any()
                and not there.weights_BLK[row].any()
                and (there.experts_BLK[row] == NONE).all()
            )
            continue
        token, k = divmod(int(choice), K)
        np.testing.assert_array_equal(x_RD[row], x_TD[token])
        of_row = slice(k, k + 1) if by_choice else slice(None)
        for sent, own in [
            (there.experts_BLK, experts_TK),
            (there.weights_BLK, weights_TK),
            (there.input_weights_BLK, inputs_TK),
        ]:  # fmt: skip
            np.testing.assert_array_equal(sent[row], own[token, of_row])


@pytest.mark.parametrize("room", [7, 60, 4 * T * K])
def test_a_ragged_exchange_with_these_offsets_moves_every_row_that_has_room_there_and_back(room):
    """Simulated as `jax.lax.ragged_all_to_all` is specified: each sender copies its slices into the
    receivers'.
    """
    plans = [
        plan_dropless(jnp.asarray(receivers(seed, is_skewed=seed == 3)), N) for seed in range(N)
    ]
    sizes_nn = jnp.stack([plan.group_sizes_E for plan in plans])
    offsets = [RaggedOffsets.from_sizes(sizes_nn, me, room) for me in range(N)]
    arrays = [1000 * me + np.arange(T * K) for me in range(N)]

    def exchange(offsets, arrays, num_rows):
        outputs = [np.full(num_rows, -1) for _ in range(N)]
        for me, (offset, array) in enumerate(zip(offsets, arrays, strict=True)):
            for to in range(N):
                start, count, place = (
                    int(a[to])
                    for a in (offset.input_offsets_n, offset.send_sizes_n, offset.output_offsets_n)
                )
                assert count == int(offsets[to].recv_sizes_n[me]) and place + count <= num_rows
                assert (outputs[to][place : place + count] == -1).all(), "a row is written twice"
                outputs[to][place : place + count] = array[start : start + count]
        return outputs

    arrived = exchange(offsets, arrays, room)
    for me, offset in enumerate(offsets):
        is_row_R = np.asarray(offset.is_row(room))[:, 0]
        assert (arrived[me][is_row_R] >= 0).all() and (arrived[me][~is_row_R] == -1).all()
        assert is_row_R.sum() == min(room, int(sizes_nn[:, me].sum()))
    returned = exchange([offset.back() for offset in offsets], arrived, T * K)
    for me, plan in enumerate(plans):
        receiver_TK = receivers(me, is_skewed=me == 3)
        buffers = offsets[me].pack(plan, jnp.asarray(receiver_TK))
        row_TK = np.asarray(buffers.plan.row_TK)
        for t, k in itertools.product(range(T), range(K)):
            is_sent = row_TK[t, k] < T * K
            assert is_sent == (receiver_TK[t, k] < N and not buffers.is_overflow_TK[t, k])
            assert not is_sent or returned[me][row_TK[t, k]] == arrays[me][row_TK[t, k]]
        assert room < 4 * T * K or not buffers.is_overflow_TK.any()
