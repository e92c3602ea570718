"""Packing loses and repeats nothing, checked against a slow and obvious reading of the rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.data import packing
from moejax.data.batches import to_batch
from moejax.data.packing import cut, first_fit_decreasing, pack

SEQ_LEN = 5


def numbered(lengths):
    """Streams whose ids are all different, so a token says where it came from."""
    start = 1
    streams = []
    for length in lengths:
        streams.append(list(range(start, start + length)))
        start += length
    return streams


def pieces_of(row):
    """Returns the pieces of a row, read slot by slot: lists of (token, position)."""
    pieces = []
    last = 0
    columns = [row[name].tolist() for name in packing.FEATURES]
    for token, segment, position, document in zip(*columns, strict=True):
        if segment == 0:
            assert (token, position, document) == (0, 0, -1)
        elif segment == last:
            pieces[-1].append((token, position))
        else:
            assert segment == last + 1  # numbered 1, 2, ... and padding only at the end
            pieces.append([(token, position)])
        last = segment if segment else 10**9
    return pieces


lengths = st.lists(st.integers(2, 23), max_size=12)


@given(lengths)
def test_every_token_but_bos_is_a_target_once_after_its_predecessor(lengths):
    streams = numbered(lengths)
    pairs = []
    for row in pack(streams, SEQ_LEN):
        for piece in pieces_of(row):
            tokens = [token for token, _ in piece]
            pairs += itertools.pairwise(tokens)
    # Within a document only: a pair across two documents would not be in this list.
    expected = []
    for stream in streams:
        expected += itertools.pairwise(stream)
    assert sorted(pairs) == sorted(expected)


@given(lengths)
def test_positions_restart_at_every_piece_and_rows_are_int32_of_one_size(lengths):
    for row in pack(numbered(lengths), SEQ_LEN):
        assert set(row) == set(packing.FEATURES)
        assert all(array.shape == (SEQ_LEN + 1,) for array in row.values())
        assert all(array.dtype == np.int32 for array in row.values())
        for piece in pieces_of(row):
            assert [position for _, position in piece] == list(range(len(piece)))
            assert len(piece) >= 2  # at least one prediction


@given(lengths)
def test_every_token_keeps_the_number_of_its_document(lengths):
    document_of = {}
    for document, stream in enumerate(numbered(lengths)):
        document_of |= dict.fromkeys(stream, document)
    for row in pack(numbered(lengths), SEQ_LEN):
        columns = (row["tokens"], row["segments"], row["documents"])
        for token, segment, document in zip(*columns, strict=True):
            assert document == (document_of[int(token)] if segment else -1)


@given(lengths)
def test_the_loss_mask_of_a_batch_counts_every_target_once(lengths):
    rows = list(pack(numbered(lengths), SEQ_LEN))
    if not rows:
        return
    batch = to_batch({name: np.stack([row[name] for row in rows]) for name in packing.FEATURES})
    targets = batch.targets_BL[batch.loss_mask_BL]
    assert sorted(targets) == sorted(token for stream in numbered(lengths) for token in stream[1:])
    # The numbered streams count up.
    is_next_BL = batch.targets_BL == batch.tokens_BL + 1
    assert is_next_BL[batch.loss_mask_BL].all()


def test_a_hand_worked_row():
    # L = 5. [1 2 3] and [4 5] share the 6 slots; [6 .. 12] has 6 predictions: a full piece 6..11
    # and the piece [11 12], which opens a row of its own: 3 + 2 slots are taken and only 1 is left.
    rows = list(pack([[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12]], 5))
    assert [row["tokens"].tolist() for row in rows] == [
        [6, 7, 8, 9, 10, 11],
        [1, 2, 3, 4, 5, 0],
        [11, 12, 0, 0, 0, 0],
    ]
    assert rows[1]["segments"].tolist() == [1, 1, 1, 2, 2, 0]
    assert rows[1]["positions"].tolist() == [0, 1, 2, 0, 1, 0]
    assert [row["documents"].tolist() for row in rows] == [
        [2] * 6,
        [0, 0, 0, 1, 1, -1],
        [2, 2, -1, -1, -1, -1],
    ]
    batch = to_batch({name: rows[1][name][None] for name in packing.FEATURES})
    assert batch.loss_mask_BL.tolist() == [[True, True, False, True, False]]
    assert batch.segments_BL.tolist() == [[1, 1, 1, 2, 2]]


def test_a_document_of_full_pieces_leaves_no_remainder():
    assert [len(piece) for piece in cut(range(11), 5)] == [6, 6]
    assert [len(piece) for piece in cut(range(12), 5)] == [6, 6, 2]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), max_size=40))
def test_first_fit_decreasing_equals_the_definition(lengths):
    bins = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for members in bins:
            if sum(lengths[m] for m in members) + lengths[item] <= 9:
                members.append(item)
                break
        else:
            bins.append([item])
    assert first_fit_decreasing(lengths, 9) == bins


def test_windows_bound_the_waiting_pieces_and_lose_none(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_SLOTS", 4)
    seen = []

    def streams():
        for i in range(4):
            seen.append(i)
            yield [3 * i + 1, 3 * i + 2, 3 * i + 3]

    rows = pack(streams(), 5)
    assert next(rows)["tokens"].tolist() == [1, 2, 3, 4, 5, 6]
    assert seen == [0, 1]  # the first window was packed before the third document was read
    assert [row["tokens"].tolist() for row in rows] == [[7, 8, 9, 10, 11, 12]]


def test_packing_fills_nearly_every_slot_of_realistic_lengths():
    lengths = np.random.default_rng(0).integers(2, 600, size=400)
    rows = list(pack(numbered(lengths), 256))
    num_filled = sum(int((row["segments"] > 0).sum()) for row in rows)
    assert num_filled / (257 * len(rows)) > 0.97


@pytest.mark.parametrize("seq_len", [1, 2, 1000])
def test_any_sequence_length_works(seq_len):
    rows = list(pack(numbered([2, 3, 9]), seq_len))
    num_predictions = 0
    for row in rows:
        num_predictions += sum(len(piece) - 1 for piece in pieces_of(row))
    assert num_predictions == 1 + 2 + 8
