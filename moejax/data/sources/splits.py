"""Which documents are held out for validation when a corpus does not say."""

import hashlib
from collections.abc import Mapping

import numpy as np

HELD_OUT = 1 / 20
"""Share of the bytes."""


def split_key(name: str) -> int:
    """Returns a document's key, 0 to 2**64 - 1, from its name: small keys are held out."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big")


def last_held_out(keys: np.ndarray, sizes: np.ndarray) -> int:
    """Returns the largest key that is held out.

    Documents up to it hold about a twentieth of the bytes.

    Args:
      keys: `split_key` of each document, uint64; documents of one key stay together.
      sizes: bytes of each, at least 1; the documents have at least two keys.

    Returns:
      A key of `keys`, never the largest; the same for any order of documents.
    """
    distinct, index_of_document = np.unique(keys, return_inverse=True)
    bytes_of_key = np.bincount(index_of_document, weights=sizes)
    candidates = bytes_of_key[:-1]  # the largest key stays in training
    # What remains of the twentieth before each key; a key is taken when at least half of it fits,
    # so that the share is as near as the order allows.
    budget = HELD_OUT * float(np.sum(sizes))
    budget_and_candidates = [budget, *candidates]
    remaining_after_each = np.subtract.accumulate(budget_and_candidates)
    remaining = remaining_after_each[:-1]
    does_not_fit = remaining < candidates / 2
    does_not_fit[0] = False  # at least one is taken
    num_taken = len(candidates)
    if does_not_fit.any():
        num_taken = int(np.argmax(does_not_fit))
    last_taken = distinct[num_taken - 1]
    return int(last_taken)


def held_out(sizes: Mapping[str, int]) -> set[str]:
    """Chooses documents for validation by a hash of their names.

    They hold about a twentieth of the bytes.

    Args:
      sizes: bytes of each document by name; at least two documents.

    Returns:
      The names held out: at least one, never all, and no empty document if two have text. They do
      not depend on the order of `sizes`.
    """
    with_text = {name: size for name, size in sizes.items() if size}
    chosen = with_text if len(with_text) > 1 else sizes
    key_of = {name: split_key(name) for name in chosen}
    keys = np.array(list(key_of.values()), np.uint64)
    sizes_of_keys = np.array(list(chosen.values()))
    last_key = last_held_out(keys, sizes_of_keys)
    return {name for name, key in key_of.items() if key <= last_key}
