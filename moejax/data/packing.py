"""Documents into rows of a fixed number of slots, without a token lost or repeated as a target.

The stream of a document is `[bos, t_1 .. t_n, eos]`: n + 1 predictions. It is cut into pieces of at
most L = seq_len predictions, and neighbouring pieces share one token (the last target of one is the
first input of the next), so every token but `bos` is a target exactly once. A row has L + 1 slots
for inputs and targets together. A full piece fills a row; shorter ones share rows by first-fit
decreasing bin packing [1]. Their segments differ, and attention must not look across segments.

[1] D. S. Johnson, "Near-optimal bin packing algorithms", 1973.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Row = dict[str, np.ndarray]
Piece = tuple[np.ndarray, int]  # ids, and the number of their document
FEATURES = ("tokens", "segments", "positions", "documents")
PADDING = {"documents": -1}  # other features are padded with 0

WINDOW_SLOTS = 1 << 20
"""Short pieces are packed in groups of this many slots, so that memory does not grow with the
corpus."""


def cut(stream: Sequence[int], seq_len: int) -> list[np.ndarray]:
    """Cuts a document's stream into pieces of at most `seq_len` predictions.

    Neighbouring pieces overlap by one token.

    Args:
      stream: ids, [n + 2], from `bos` to `eos`.
      seq_len: L.

    Returns:
      int32 arrays of 2 to L + 1 ids; all but the last have L + 1.
    """
    ids = np.asarray(stream, np.int32)
    num_predictions = len(ids) - 1
    pieces = []
    for start in range(0, num_predictions, seq_len):
        end = start + seq_len + 1  # the last target, with which the next piece begins
        pieces.append(ids[start:end])
    return pieces


def pack(streams: Iterable[Sequence[int]], seq_len: int) -> Iterator[Row]:
    """Packs documents into rows, deterministically and with bounded memory.

    Args:
      streams: one stream of ids, [n + 2], per document.
      seq_len: L.

    Yields:
      Rows of int32 arrays [L + 1]: `tokens`; `segments`, 1, 2, ... per piece and 0 for padding;
      `positions`, from 0 in each piece; `documents`, the index of the stream that a piece comes
      from. Padding is 0, and -1 in `documents`.
    """
    slots_of_row = seq_len + 1
    waiting: list[Piece] = []
    num_slots = 0
    for document, stream in enumerate(streams):
        for ids in cut(stream, seq_len):
            if len(ids) == slots_of_row:
                piece = (ids, document)
                yield lay_out([piece], seq_len)
            else:
                # A view would keep all of its document in memory.
                waiting.append((ids.copy(), document))
                num_slots += len(ids)
        if num_slots >= WINDOW_SLOTS:
            yield from _pack_window(waiting, seq_len)
            waiting = []
            num_slots = 0
    yield from _pack_window(waiting, seq_len)


def _pack_window(pieces: list[Piece], seq_len: int) -> Iterator[Row]:
    """Packs short pieces into rows that they share."""
    slots_of_row = seq_len + 1
    lengths = [len(ids) for ids, _ in pieces]
    bins = first_fit_decreasing(lengths, slots_of_row)
    for members in bins:
        pieces_of_row = [pieces[m] for m in members]
        yield lay_out(pieces_of_row, seq_len)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assigns items, longest first and ties in order, each to the first bin with room for it.

    Args:
      lengths: slots of each item, 1 to `capacity`.
      capacity: slots of a bin.

    Returns:
      The indices of the items in each bin.
    """
    num_items = len(lengths)
    bins: list[list[int]] = []
    room = np.full(num_items, capacity)  # there are never more bins than items
    longest_first = sorted(range(num_items), key=lambda item: -lengths[item])
    for item in longest_first:
        length = lengths[item]
        # All open bins and a new one, which has room for any item.
        num_candidates = len(bins) + 1
        has_room = room[:num_candidates] >= length
        first = int(np.argmax(has_room))
        if first == len(bins):
            bins.append([])
        bins[first].append(item)
        room[first] -= length
    return bins


def empty_row(seq_len: int) -> Row:
    """Returns a row of padding, [L + 1]."""
    row = {}
    for name in FEATURES:
        padding = PADDING.get(name, 0)
        row[name] = np.full(seq_len + 1, padding, np.int32)
    return row


def lay_out(pieces: Sequence[Piece], seq_len: int) -> Row:
    """Returns one row, [L + 1], that holds the pieces one after the other."""
    row = empty_row(seq_len)
    start = 0
    for segment, (ids, document) in enumerate(pieces, start=1):
        num_slots = len(ids)
        end = start + num_slots
        slots = slice(start, end)
        row["tokens"][slots] = ids
        row["segments"][slots] = segment
        row["positions"][slots] = np.arange(num_slots)
        row["documents"][slots] = document
        start = end
    return row
