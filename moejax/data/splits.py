"""Which documents are held out for validation when a corpus does not say."""

import hashlib
from collections.abc import Mapping

HELD_OUT = 1 / 20  # share of the bytes


def held_out(sizes: Mapping[str, int]) -> set[str]:
    """Chooses documents for validation by a hash of their names, until they hold a twentieth of the bytes.

    Args:
      sizes: bytes of each document by name; at least two documents.

    Returns:
      The names held out: at least one, never all, and no empty document if two have text; the same in any order of
      `sizes`.
    """
    chosen: set[str] = set()
    remaining = HELD_OUT * sum(sizes.values())
    with_text = [name for name, size in sizes.items() if size]
    names = with_text if len(with_text) > 1 else list(sizes)
    # A document is taken when at least half of it fits: the share is then as near as the order allows.
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8")).digest())[:-1]:
        if chosen and remaining < sizes[name] / 2:
            break
        chosen.add(name)
        remaining -= sizes[name]
    return chosen
