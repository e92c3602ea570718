"""Digests of arrays: what was in memory when a checkpoint was saved, compared when it is restored.

The elements of an array, as unsigned integers, are laid out as a matrix. Its digest is two sums modulo 2^32: of the
sums of its rows and of the sums of its columns, each weighted by an odd number that depends on the row or column. So

- any damage within one element changes both sums for certain, since an odd weight has an inverse modulo 2^32; larger
  damage, and rows or columns in another order, remain unnoticed with a probability of about 2^-64;
- the sums of the parts of an array add up to the sums of the whole: a digest depends neither on how an array is split
  over devices and processes nor on the mesh that reads it;
- it costs two passes over memory, where a cryptographic digest would take a third of the time of a restore.

A digest finds damage. It is no protection against somebody who writes checkpoints on purpose.
"""

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.training.processes import all_say

BLOCK_BYTES = 2**20  # of a matrix are summed at once: the second pass finds them in the processor's cache
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element


class _Part(NamedTuple):
    """A part of an array that this process holds: where it lies, and its elements."""

    name: str
    index: tuple[slice, ...]
    shape: tuple[int, ...]
    data: Any


def digest_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each array, 16 hexadecimal digits; of several processes all must ask.

    Args:
      arrays: by name; split over devices in whatever way. Copies on other devices are not looked at.
    """
    parts = [part for name, array in arrays.items() for part in _parts(name, array)]
    rows = {name: row for row, name in enumerate(arrays)}
    sums_A2 = np.zeros((len(arrays), 2), np.uint32)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part, sums_2 in zip(parts, pool.map(_sums, parts), strict=True):
            sums_A2[rows[part.name]] += sums_2
    total_A2 = np.zeros_like(sums_A2)
    for word in all_say(sums_A2.tobytes().hex()):
        total_A2 += np.frombuffer(bytes.fromhex(word), np.uint32).reshape(sums_A2.shape)
    return {name: f"{int(total_A2[row, 0]):08x}{int(total_A2[row, 1]):08x}" for name, row in rows.items()}


def _parts(name: str, array: Any) -> list[_Part]:
    """What this process holds of an array, each element once over all processes."""
    if not isinstance(array, jax.Array):
        host = np.asarray(array)
        return [_Part(name, tuple(slice(0, size) for size in host.shape), host.shape, host)]
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return [_Part(name, shard.index, array.shape, shard.data) for shard in shards]


def _sums(part: _Part) -> np.ndarray:
    """Both weighted sums of a part, uint32 [2]."""
    data = np.asarray(part.data)
    words = data.view(WORDS[data.dtype.itemsize])
    split = _split(part.shape)
    height = math.prod(words.shape[:split])
    words_RC = words.reshape(height, math.prod(words.shape[split:]))
    rows_R = np.empty(height, np.uint32)
    columns_C = np.zeros(words_RC.shape[1], np.uint32)
    at_once = max(1, BLOCK_BYTES // max(1, words_RC[:1].nbytes))
    for first in range(0, height, at_once):
        block = words_RC[first : first + at_once]
        rows_R[first : first + at_once] = block.sum(axis=1, dtype=np.uint32)
        columns_C += block.sum(axis=0, dtype=np.uint32)
    weighted = (
        rows_R * _weights(part.index[:split], part.shape[:split]),
        columns_C * _weights(part.index[split:], part.shape[split:]),
    )
    return np.array([sums.sum(dtype=np.uint32) for sums in weighted], np.uint32)


def _split(shape: tuple[int, ...]) -> int:
    """How many leading axes make the rows of the matrix: the number that makes it most nearly square."""
    return min(range(len(shape) + 1), key=lambda axes: max(math.prod(shape[:axes]), math.prod(shape[axes:])))


def _weights(index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The odd weights of rows or columns, by their places in the whole array."""
    places = np.zeros(1, np.uint32)
    for within, size in zip(index, shape, strict=True):
        of_axis = np.arange(*within.indices(size), dtype=np.uint32)
        places = (places[:, None] * np.uint32(size) + of_axis[None]).reshape(-1)
    # The mixing of bits that ends MurmurHash3: neighbours get weights that have nothing in common.
    mixed = places * np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    return mixed | np.uint32(1)
