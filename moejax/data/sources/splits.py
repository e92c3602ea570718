"""Which documents are held out for validation when a corpus does not say."""

import hashlib
from collections.abc import Mapping

import numpy as np

HELD_OUT = 1 / 20  # share of the bytes


def split_key(name: str) -> int:
    """The number, 0 to 2**64 - 1, by which a document of this name is held out or not: small ones are."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")


def last_held_out(keys: np.ndarray, sizes: np.ndarray) -> int:
    """The largest key that is held out, so that documents up to it hold about a twentieth of the bytes.

    Args:
      keys: `split_key` of each document, uint64; documents of one key stay together.
      sizes: bytes of each, at least 1; the documents have at least two keys.

    Returns:
      A key of `keys`, never the largest; the same for any order of documents.
    """
    distinct, place = np.unique(keys, return_inverse=True)
    bytes_of_key = np.bincount(place, weights=sizes)[:-1]
    # What is left of the twentieth before each key; a key is taken when at least half of it fits,
    # so that the share is as near as the order allows.
    left = np.subtract.accumulate([HELD_OUT * float(np.sum(sizes)), *bytes_of_key])[:-1]
    does_not_fit = left < bytes_of_key / 2
    does_not_fit[0] = False  # at least one
    taken = int(np.argmax(does_not_fit)) if does_not_fit.any() else len(bytes_of_key)
    return int(distinct[taken - 1])


def held_out(sizes: Mapping[str, int]) -> set[str]:
    """Chooses documents for validation by a hash of their names, until they hold a twentieth of the bytes.

    Args:
      sizes: bytes of each document by name; at least two documents.

    Returns:
      The names held out: at least one, never all, and no empty document if two have text; the same
        in any order of
      `sizes`.
    """
    with_text = [name for name, size in sizes.items() if size]
    names = with_text if len(with_text) > 1 else list(sizes)
    keys = {name: split_key(name) for name in names}
    last = last_held_out(
        np.array(list(keys.values()), np.uint64), np.array([sizes[name] for name in names])
    )
    return {name for name, key in keys.items() if key <= last}
