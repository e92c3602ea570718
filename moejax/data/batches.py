"""Rows into batches: batch `step` is a pure function of (seed, step, rows).

So the step number is all the state of the input. The global order of rows does not depend on the
number of processes. Each process takes those rows of a global batch that its devices hold, so a run
may continue on another number of processes and see the same data.
"""

import dataclasses
import math
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from moejax.config import ConfigError
from moejax.data.packing import FEATURES, Row, empty_row

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
      segments_BL: int32, the piece each input belongs to: 1, 2, ... within a row, 0 for padding.
        Attention must not look across segments.
      positions_BL: int32, position of each input in its piece, from 0.
      loss_mask_BL: bool, whether the target is a real token of the same piece as the input. False
        at the last token of a piece, though its segment is not 0.
      documents_BL: int32, the document of each input by its place in the split, -1 for padding;
        None in training.
    """

    tokens_BL: Any
    targets_BL: Any
    segments_BL: Any
    positions_BL: Any
    loss_mask_BL: Any
    documents_BL: Any = None


def to_batch(rows: Row, has_documents: bool = False) -> Batch:
    """Splits stacked rows, arrays [B, L + 1], into inputs and targets."""
    inputs_BL = {name: rows[name][:, :-1] for name in FEATURES}
    target_segments_BL = rows["segments"][:, 1:]
    is_same_piece_BL = target_segments_BL == inputs_BL["segments"]
    is_token_BL = target_segments_BL > 0
    return Batch(
        tokens_BL=inputs_BL["tokens"],
        targets_BL=rows["tokens"][:, 1:],
        segments_BL=inputs_BL["segments"],
        positions_BL=inputs_BL["positions"],
        loss_mask_BL=is_same_piece_BL & is_token_BL,
        documents_BL=inputs_BL["documents"] if has_documents else None,
    )


class TrainBatches:
    """Endless training batches: every epoch shows each row once, in an order of its own."""

    def __init__(
        self,
        corpus: "Corpus",
        batch_size: int,
        seed: int,
        rows: Sequence[int] | None = None,
    ):
        """Opens the training rows.

        Args:
          corpus: from `prepare`.
          batch_size: rows of the global batch.
          seed: of the order; equal on all processes.
          rows: which rows of a global batch to read, increasing; None reads all.

        Raises:
          ConfigError: there is no such batch.
          DataError: the rows are damaged.
        """
        import grain

        rows_here = _checked_rows(batch_size, rows)
        # Grain adds the epoch to the shuffle's seed: spread the seeds, or seed 0 would begin where
        # seed 1 continues.
        spread = np.random.SeedSequence(seed).generate_state(1)
        shuffle_seed = int(spread[0])
        stored = grain.MapDataset.source(corpus.rows("train"))
        ordered = stored.shuffle(seed=shuffle_seed).repeat()

        def read(step: int) -> Batch:
            first = step * batch_size
            read_rows = [ordered[first + row] for row in rows_here]
            return _stack(read_rows)

        num_batches = sys.maxsize // batch_size
        self._batches = grain.MapDataset.range(num_batches).map(read)

    def __getitem__(self, step: int) -> Batch:
        """Returns the rows of global batch `step` that are read here: NumPy arrays [rows, L]."""
        return self._batches[_checked_step(step)]

    def iterate(self, start_step: int = 0) -> Generator[Batch]:
        """Yields batches `start_step`, `start_step + 1`, ... and reads ahead in the background.

        Close the generator, or let it go out of scope, to stop the reading.
        """
        return _read_ahead(self._batches[_checked_step(start_step) :])


def eval_batches(
    corpus: "Corpus",
    batch_size: int,
    split: str = "validation",
    rows: Sequence[int] | None = None,
) -> Generator[Batch]:
    """Yields batches that cover every row of a split exactly once, in order.

    Of each batch, the given rows are read (None: all). The last batch is filled up with rows of
    padding, so all batches have the same shapes and all processes the same number of them. Summed
    over all rows, `loss_mask_BL` counts `corpus.num_tokens[split]`.

    Raises:
      ConfigError: there is no such batch.
      DataError: the rows are damaged.
    """
    import grain

    rows_here = _checked_rows(batch_size, rows)
    stored = corpus.rows(split)
    num_stored = len(stored)
    padding = empty_row(corpus.seq_len)

    def row_or_padding(index: int) -> Row:
        return stored[index] if index < num_stored else padding

    def read(step: int) -> Batch:
        first = step * batch_size
        read_rows = [row_or_padding(first + row) for row in rows_here]
        return _stack(read_rows, has_documents=True)

    num_batches = math.ceil(num_stored / batch_size)
    batches = grain.MapDataset.range(num_batches).map(read)
    return _read_ahead(batches)


def _stack(rows: Sequence[Row], has_documents: bool = False) -> Batch:
    """Returns a batch of rows."""
    stacked = {}
    for name in FEATURES:
        values_of_rows = [row[name] for row in rows]
        stacked[name] = np.stack(values_of_rows)
    return to_batch(stacked, has_documents)


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
    """Returns the step; raises if there is none."""
    if step < 0:
        raise IndexError(f"step={step} must be at least 0")
    return int(step)


def _checked_rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    """Returns the rows of a global batch to read; raises if there is no such batch."""
    if batch_size < 1:
        raise ConfigError(f"train.batch_size={batch_size} must be at least 1")
    if rows is None:
        return range(batch_size)
    are_within = bool(rows) and min(rows) >= 0 and max(rows) < batch_size
    if not are_within:
        raise ConfigError(
            f"train.batch_size={batch_size} has rows 0 to {batch_size - 1}, not {[*rows]}"
        )
    return rows
