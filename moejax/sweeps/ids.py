"""The id of a configuration: the same in every version of moejax that computes the same from it.

An id hashes the leaves that have neither their default nor their derived value: their dotted keys
and values, in alphabetical order. So

- a new leaf changes no id where its default means what was done before, nor does a leaf that is
  removed where it had its default;
- a leaf that is given with the value that it has anyway changes no id, and 1 and 1.0 are one number
  for a leaf that is a float;
- a seed other than the default is in the id. Packs are not: they say which arms train together,
  and may change while a sweep runs.

An id does not say what a default was. If one changes, or the rule by which a leaf is derived, a
recipe that leaves it open has the id that it had, and another configuration. That is no trap,
because ids name the arms of one sweep only, and its directory keeps every leaf of each: an arm is
recognised by its configuration (`store/recorded.py`), and keeps the id with which it was recorded,
whatever rule gave it that. A sweep of a version that made ids in another way goes on likewise.
"""

import hashlib
import json
from typing import Any

from moejax.config import Config, declared, given_leaves

ID_DIGITS = 10
"""Of the hash: among 10,000 arms two share an id with a probability of 1 in 22,000."""

LEFT_OUT = ("data.directory", "train.check_memory")
"""Leaves that change neither what is computed nor what is recorded."""


def hash_config(config: Config) -> str:
    """Returns the SHA-256 of what a resolved configuration sets, in hexadecimal.

    Two configurations have the same if they are equal but for the leaves of `LEFT_OUT`.
    """
    hashed = {}
    for key, value in given_leaves(config).items():
        if key not in LEFT_OUT:
            hashed[key] = _plain(key, value)
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(key: str, value: Any) -> Any:
    """Returns a value as it is hashed: a float leaf's as a float, and -0.0 as 0.0."""
    is_float = declared()[key].annotation is float
    return float(value) + 0.0 if is_float else value
