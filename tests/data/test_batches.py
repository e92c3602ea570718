"""Batches are a pure function of (seed, step, rows), also when resumed, prefetched or shared."""

import dataclasses
import itertools
import threading

import jax
import numpy as np
import pytest

from moejax.config import ConfigError, DataConfig
from moejax.data import Batch, DataError, TrainBatches, eval_batches, prepare

BATCH = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    return prepare(
        DataConfig(source="synthetic", tokenizer="bytes", seq_len=128, directory=str(directory))
    )


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def concatenated(batches):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def keys(batch):
    """Returns one hashable value per row, to recognise it by."""
    rows = zip(batch.tokens_BL, batch.targets_BL, strict=True)
    return [tokens.tobytes() + targets.tobytes() for tokens, targets in rows]


def rows_of(corpus, split="train"):
    rows = corpus.rows(split)
    return [rows[i]["tokens"] for i in range(len(rows))]


def test_a_batch_has_the_documented_shapes_and_types(corpus):
    batch = TrainBatches(corpus, BATCH, seed=0)[0]
    assert isinstance(batch, Batch)
    for name in ("tokens_BL", "targets_BL", "segments_BL", "positions_BL"):
        assert getattr(batch, name).shape == (BATCH, 128)
        assert getattr(batch, name).dtype == np.int32
    assert batch.loss_mask_BL.dtype == bool
    assert len(jax.tree.leaves(batch)) == 5


def test_a_batch_passes_through_jit(corpus):
    batch = TrainBatches(corpus, BATCH, seed=0)[0]
    counted = jax.jit(lambda b: b.loss_mask_BL.sum())(batch)
    assert int(counted) == batch.loss_mask_BL.sum() > 0


def test_the_same_seed_and_step_give_the_same_batch_and_others_do_not(corpus):
    batches = TrainBatches(corpus, BATCH, seed=3)
    for step in (0, 7, 1000):
        assert_equal(batches[step], TrainBatches(corpus, BATCH, seed=3)[step])
    assert keys(batches[0]) != keys(batches[1])
    assert keys(batches[0]) != keys(TrainBatches(corpus, BATCH, seed=4)[0])


def test_reading_steps_in_any_order_changes_nothing(corpus):
    batches = TrainBatches(corpus, BATCH, seed=0)
    backwards = [batches[step] for step in reversed(range(6))][::-1]
    for step, batch in enumerate(backwards):
        assert_equal(batch, TrainBatches(corpus, BATCH, seed=0)[step])


def only(batch, rows):
    return jax.tree.map(lambda array: array[rows], batch)


@pytest.mark.parametrize("rows", [[0], [4, 5, 6, 7], [0, 1, 4, 5], [*range(BATCH)]])
def test_rows_of_a_batch_are_those_of_the_global_batch(corpus, rows):
    complete = TrainBatches(corpus, BATCH, seed=0)
    part = TrainBatches(corpus, BATCH, seed=0, rows=rows)
    for step in (0, 5, 400):
        assert_equal(part[step], only(complete[step], rows))
        assert part[step].tokens_BL.shape == (len(rows), 128)


@pytest.mark.parametrize("start", [0, 3, 250])
def test_iterating_from_a_step_equals_indexing(corpus, start):
    batches = TrainBatches(corpus, BATCH, 0, rows=[4, 5, 6, 7])
    for step, batch in zip(range(start, start + 20), batches.iterate(start), strict=False):
        assert_equal(batch, batches[step])


def test_resuming_equals_going_straight_on(corpus):
    straight = list(itertools.islice(TrainBatches(corpus, BATCH, seed=1).iterate(0), 30))
    resumed = list(itertools.islice(TrainBatches(corpus, BATCH, seed=1).iterate(17), 13))
    for first, second in zip(straight[17:], resumed, strict=True):
        assert_equal(first, second)


def test_every_epoch_covers_each_row_once_in_an_order_of_its_own(corpus):
    size = corpus.num_rows["train"]
    steps = -(-3 * size // BATCH)  # batches run across the ends of epochs
    stream = []
    for batch in itertools.islice(TrainBatches(corpus, BATCH, 0).iterate(), steps):
        stream += keys(batch)
    expected = sorted(row[:-1].tobytes() + row[1:].tobytes() for row in rows_of(corpus))
    epochs = [stream[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != expected
    # A seed does not begin where another continues.
    neighbour = []
    for step in range(5):
        neighbour += keys(TrainBatches(corpus, BATCH, 1)[step])
    assert neighbour != epochs[1][: len(neighbour)]


def test_a_batch_larger_than_an_epoch_repeats_rows(corpus):
    size = corpus.num_rows["train"]
    batch = TrainBatches(corpus, 2 * size, seed=0)[0]
    assert len(set(keys(batch))) == len(set(keys(batch)[:size])) <= size


def test_the_background_threads_end_with_the_generator(corpus):
    def readers():
        return [thread for thread in threading.enumerate() if "grain" in thread.name]

    iterator = TrainBatches(corpus, BATCH, seed=0).iterate()
    next(iterator)
    started = readers()
    assert started
    # Grain's iterator is kept alive here, so that only closing it ends its threads.
    inner = iterator.gi_frame.f_locals["iterator"]
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(ValueError, match="closed"):
        next(inner)


def test_the_background_threads_end_with_the_last_batch(corpus):
    iterator = eval_batches(corpus, BATCH)
    next(iterator)
    inner = iterator.gi_frame.f_locals["iterator"]
    assert len(list(iterator)) == -(-corpus.num_rows["validation"] // BATCH) - 1
    with pytest.raises(ValueError, match="closed"):
        next(inner)


def test_reading_happens_in_the_background(corpus, monkeypatch):
    from moejax.data.storage import records

    names = set()
    read = records.Rows.__getitem__

    def noting(self, index):
        names.add(threading.current_thread().name)
        return read(self, index)

    monkeypatch.setattr(records.Rows, "__getitem__", noting)
    iterator = TrainBatches(corpus, BATCH, seed=0).iterate()
    next(iterator)
    iterator.close()
    assert names
    assert threading.main_thread().name not in names


@pytest.mark.parametrize("batch_size", [1, 7, 8, 10_000])
def test_evaluation_covers_every_row_once_and_counts_every_target(corpus, batch_size):
    batches = list(eval_batches(corpus, batch_size))
    assert len({batch.tokens_BL.shape for batch in batches}) == 1
    joined = concatenated(batches)
    expected = rows_of(corpus, "validation")
    size = len(expected)
    np.testing.assert_array_equal(joined.tokens_BL[:size], [row[:-1] for row in expected])
    np.testing.assert_array_equal(joined.targets_BL[:size], [row[1:] for row in expected])
    assert len(joined.tokens_BL) - size < batch_size  # no batch is only padding
    from_zero = dataclasses.replace(joined, documents_BL=joined.documents_BL + 1)
    assert not any(array[size:].any() for array in jax.tree.leaves(from_zero))
    assert joined.loss_mask_BL.sum() == corpus.num_tokens["validation"]


def test_evaluation_can_read_the_training_split(corpus):
    counted = sum(
        int(batch.loss_mask_BL.sum()) for batch in eval_batches(corpus, 64, split="train")
    )
    assert counted == corpus.num_tokens["train"]


@pytest.mark.parametrize("rows", [[0], [4, 5, 6, 7], [2, 3, 6, 7]])
def test_rows_of_evaluation_batches_are_those_of_the_global_batches(corpus, rows):
    part = list(eval_batches(corpus, BATCH, rows=rows))
    complete = list(eval_batches(corpus, BATCH))
    for batch, complete_batch in zip(part, complete, strict=True):
        assert_equal(batch, only(complete_batch, rows))


@pytest.mark.parametrize(
    "make",
    [
        lambda c, b, rows: TrainBatches(c, b, 0, rows),
        lambda c, b, rows: eval_batches(c, b, "train", rows),
    ],
)
def test_rows_that_a_batch_does_not_have_are_refused_at_once(corpus, make):
    with pytest.raises(ConfigError, match=r"train\.batch_size=8 has rows 0 to 7, not \[6, 8\]"):
        make(corpus, 8, [6, 8])
    with pytest.raises(ConfigError, match=r"train\.batch_size=8 has rows 0 to 7, not \[\]"):
        make(corpus, 8, [])
    with pytest.raises(ConfigError, match=r"train\.batch_size=0 must be at least 1"):
        make(corpus, 0, None)


def test_a_negative_step_is_refused(corpus):
    batches = TrainBatches(corpus, BATCH, seed=0)
    with pytest.raises(IndexError, match="step=-1"):
        batches[-1]
    with pytest.raises(IndexError, match="step=-1"):
        batches.iterate(-1)


def test_damage_found_in_the_background_is_raised_unchanged(corpus, monkeypatch):
    from moejax.data.storage import records

    def damaged(self, index):
        raise DataError("row is damaged")

    monkeypatch.setattr(records.Rows, "__getitem__", damaged)
    with pytest.raises(DataError, match="row is damaged"):
        next(TrainBatches(corpus, BATCH, seed=0).iterate())
    with pytest.raises(DataError, match="row is damaged"):
        next(eval_batches(corpus, BATCH))
