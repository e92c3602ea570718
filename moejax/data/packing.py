"""Documents into rows of a fixed number of slots, without a token lost or repeated as a target.

The stream of a document is `[bos, t_1 .. t_n, eos]`: n + 1 predictions. It is cut into pieces of at
most L = seq_len predictions, and neighbouring pieces share one token (the last target of one is the
first input of the next), so every token but `bos` is a target exactly once. A row has L + 1 slots,
inputs and targets together. A full piece fills a row; shorter ones share rows by first-fit
decreasing bin packing [1], marked by segments, between which attention must not look.

[1] D. S. Johnson, "Near-optimal bin packing algorithms", 1973.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Row = dict[str, np.ndarray]
Piece = tuple[np.ndarray, int]  # ids, and the number of their document
FEATURES = ("tokens", "segments", "positions", "documents")
PADDING = {"documents": -1}  # of other features 0

WINDOW_SLOTS = (
    1 << 20
)  # short pieces are packed in groups of so many slots: memory stays flat however large the corpus


def cut(stream: Sequence[int], seq_len: int) -> list[np.ndarray]:
    """Cuts a document's stream into pieces of at most `seq_len` predictions that overlap by one token.

    Args:
      stream: ids, [n + 2], from `bos` to `eos`.
      seq_len: L.

    Returns:
      int32 arrays of 2 to L + 1 ids; all but the last have L + 1.
    """
    ids = np.asarray(stream, np.int32)
    return [ids[start : start + seq_len + 1] for start in range(0, len(ids) - 1, seq_len)]


def pack(streams: Iterable[Sequence[int]], seq_len: int) -> Iterator[Row]:
    """Packs documents into rows, deterministically and with bounded memory.

    Args:
      streams: one stream of ids, [n + 2], per document.
      seq_len: L.

    Yields:
      Rows of int32 arrays [L + 1]: `tokens`; `segments`, 1, 2, ... per piece and 0 for padding;
      `positions`, from 0 in each piece; `documents`, which of the streams a piece is of, counted
      from 0. Padding is 0, and -1 in `documents`.
    """
    waiting: list[Piece] = []
    slots = 0
    for document, stream in enumerate(streams):
        for ids in cut(stream, seq_len):
            if len(ids) == seq_len + 1:
                yield lay_out([(ids, document)], seq_len)
            else:
                waiting.append(
                    (ids.copy(), document)
                )  # a view would keep all of its document in memory
                slots += len(ids)
        if slots >= WINDOW_SLOTS:
            yield from _pack_window(waiting, seq_len)
            waiting, slots = [], 0
    yield from _pack_window(waiting, seq_len)


def _pack_window(pieces: list[Piece], seq_len: int) -> Iterator[Row]:
    for members in first_fit_decreasing([len(ids) for ids, _ in pieces], seq_len + 1):
        yield lay_out([pieces[m] for m in members], seq_len)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns items, longest first and ties in order, each to the first bin with room for it.

    Args:
      lengths: slots of each item, 1 to `capacity`.
      capacity: slots of a bin.

    Returns:
      The indices of the items in each bin.
    """
    room = np.full(len(lengths), capacity)  # there are never more bins than items
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        bin_ = int(
            np.argmax(room[: len(bins) + 1] >= lengths[item])
        )  # the last of these is a new bin, which has room
        if bin_ == len(bins):
            bins.append([])
        bins[bin_].append(item)
        room[bin_] -= lengths[item]
    return bins


def empty_row(seq_len: int) -> Row:
    """A row of padding, [L + 1]."""
    return {name: np.full(seq_len + 1, PADDING.get(name, 0), np.int32) for name in FEATURES}


def lay_out(pieces: Sequence[Piece], seq_len: int) -> Row:
    """One row, [L + 1], with the pieces side by side in it."""
    row = empty_row(seq_len)
    start = 0
    for segment, (ids, document) in enumerate(pieces, start=1):
        stop = start + len(ids)
        row["tokens"][start:stop] = ids
        row["segments"][start:stop] = segment
        row["positions"][start:stop] = np.arange(len(ids))
        row["documents"][start:stop] = document
        start = stop
    return row
