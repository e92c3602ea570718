"""Rows into batches. Batch `step` is a pure function of (seed, step, process): the input's state is the step number.

The global order of rows does not depend on the number of processes. Process p of P takes the p-th of P equal,
contiguous slices of each global batch, so a run may continue on another number of processes and see the same data.
"""

import dataclasses
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from moejax.config import ConfigError
from moejax.data.packing import FEATURES, Row

if TYPE_CHECKING:
    from moejax.data.rows import Corpus

READ_THREADS = 2
BATCHES_AHEAD = 8  # prepared in the background


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step trains or evaluates on; B rows of L predictions.

    Attributes:
      tokens_BL: int32, inputs.
      targets_BL: int32, the token after each input.
      segments_BL: int32, the piece each input belongs to: 1, 2, ... within a row, 0 for padding. Attention must not
        look from one into another.
      positions_BL: int32, position of each input in its piece, from 0.
      loss_mask_BL: bool, whether the target is a real token of the same piece as the input. False at the last token of
        a piece, though its segment is not 0.
    """

    tokens_BL: Any
    targets_BL: Any
    segments_BL: Any
    positions_BL: Any
    loss_mask_BL: Any


def to_batch(rows: Row) -> Batch:
    """Splits stacked rows, arrays [B, L + 1], into inputs and targets."""
    tokens, segments, positions = (rows[name] for name in FEATURES)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(
        tokens_BL=tokens[:, :-1],
        targets_BL=tokens[:, 1:],
        segments_BL=segments[:, :-1],
        positions_BL=positions[:, :-1],
        loss_mask_BL=inside,
    )


class TrainBatches:
    """Endless training batches: every epoch shows each row once, in an order of its own."""

    def __init__(self, corpus: "Corpus", batch_size: int, seed: int, process_index: int = 0, process_count: int = 1):
        """Opens the training rows.

        Args:
          corpus: from `prepare`.
          batch_size: rows of the global batch.
          seed: of the order; equal on all processes.
          process_index: this process, of `process_count`.
          process_count: how many processes share a batch.

        Raises:
          ConfigError: the batch cannot be shared evenly.
          DataError: the rows are damaged.
        """
        import grain

        rows_here = _rows_per_process(batch_size, process_index, process_count)
        # Grain adds the epoch to the shuffle's seed: spread the seeds, or seed 0 would begin where seed 1 continues.
        shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        rows = grain.MapDataset.source(corpus.rows("train")).shuffle(seed=shuffle_seed).repeat()
        slices = rows.batch(rows_here, drop_remainder=True)  # P of them in a row make a global batch
        self._batches = slices[process_index::process_count].map(to_batch)

    def __getitem__(self, step: int) -> Batch:
        """This process's slice of global batch `step`: NumPy arrays [batch_size / process_count, L]."""
        return self._batches[_checked_step(step)]

    def iterate(self, start_step: int = 0) -> Generator[Batch]:
        """Yields batches `start_step`, `start_step + 1`, ... and reads ahead in the background.

        Close the generator, or let it go out of scope, to stop the reading.
        """
        return _read_ahead(self._batches[_checked_step(start_step) : sys.maxsize])


def eval_batches(
    corpus: "Corpus", batch_size: int, split: str = "validation", process_index: int = 0, process_count: int = 1
) -> Generator[Batch]:
    """Yields this process's slices of batches that cover every row of a split exactly once, in order.

    The last batch is filled up with rows of padding, so all batches have the same shapes and all processes the same
    number of them. Summed over processes, `loss_mask_BL` counts `corpus.num_tokens[split]`.

    Raises:
      ConfigError: the batch cannot be shared evenly.
      DataError: the rows are damaged.
    """
    import grain

    rows_here = _rows_per_process(batch_size, process_index, process_count)
    rows = corpus.rows(split)
    padding = {name: np.zeros(corpus.seq_len + 1, np.int32) for name in FEATURES}

    def read(step: int) -> Batch:
        start = step * batch_size + process_index * rows_here
        members = [rows[i] if i < len(rows) else padding for i in range(start, start + rows_here)]
        return to_batch({name: np.stack([row[name] for row in members]) for name in FEATURES})

    return _read_ahead(grain.MapDataset.range(-(-len(rows) // batch_size)).map(read))


def _read_ahead(batches: Any) -> Generator[Batch]:
    """Iterates over a grain `MapDataset` in background threads, which end with the generator."""
    import grain

    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def _checked_step(step: int) -> int:
    if step < 0:
        raise IndexError(f"step={step} must be at least 0")
    return int(step)


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(
            f"train.batch_size={batch_size} must be a positive multiple of the number of processes={process_count}; "
            f"use {max(1, round(batch_size / process_count)) * process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index={process_index} must be between 0 and process_count={process_count} less one")
    return batch_size // process_count
