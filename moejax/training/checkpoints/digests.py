"""Digests of arrays: what was in memory when a checkpoint was saved, compared when it is restored.

The elements of an array, as unsigned integers of up to 4 bytes, are laid out as a matrix whose rows
are taken in groups of about a megabyte. Each group is summed by columns modulo 2^32; a digest is
two sums of all these, weighted by odd numbers that depend on column and group. So

- damage within one element, or within several of one row, changes the digest but for one case in
  2^32 or fewer, and for certain where it is one element, since odd numbers have inverses modulo
  2^32; wider damage remains unnoticed once in 2^64. Rows of a group in another order have one
  digest: chunks, which might be mixed up, are larger or are checked;
- the sums of the parts of an array add up to the sums of the whole: a digest depends neither on how
  an array is split over devices and processes nor on the mesh that reads it;
- it costs one pass over memory, 0.05 s a gigabyte on two cores: less than a twentieth of the time
  of a restore of what the file cache holds, and less from a disk. A cryptographic digest would
  take a third.

A digest finds damage. It is no protection against somebody who writes checkpoints on purpose.
"""

import itertools
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from moejax.training.multihost.processes import gather_from_all

GROUP_BYTES = 2**20
MIN_COLUMNS = 256  # of shorter rows the sums by columns would be slow
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by the bytes of an element
WORD_BYTES = 4  # elements of more, float64 for one, are several words


class _Part(NamedTuple):
    """A part of an array that this process holds: where it lies, and its elements."""

    name: str
    place: tuple[slice, ...]
    shape: tuple[int, ...]
    data: Any


def digest_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each array, 16 hexadecimal digits; of several processes all must ask.

    Args:
      arrays: by name; split over devices in whatever way. Copies on other devices are
        not looked at.
    """
    parts = [part for name, array in arrays.items() for part in _parts(name, array)]
    parts.sort(
        key=lambda part: part.data.nbytes, reverse=True
    )  # no thread is left alone with a large one at the end
    rows = {name: row for row, name in enumerate(arrays)}
    sums_A2 = np.zeros((len(arrays), 2), np.uint32)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part, sums_2 in zip(parts, pool.map(_sums, parts), strict=True):
            sums_A2[rows[part.name]] += sums_2
    total_A2 = np.zeros_like(sums_A2)
    for word in gather_from_all(sums_A2.tobytes().hex()):
        total_A2 += np.frombuffer(bytes.fromhex(word), np.uint32).reshape(sums_A2.shape)
    return {
        name: f"{int(total_A2[row, 0]):08x}{int(total_A2[row, 1]):08x}"
        for name, row in rows.items()
    }


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
    if not data.size:
        return np.zeros(2, np.uint32)
    if data.dtype.itemsize > WORD_BYTES:  # its words are one more axis
        data = np.ascontiguousarray(data).reshape(*data.shape, 1).view(np.uint32)
        part = part._replace(
            place=(*part.place, slice(0, data.shape[-1])), shape=(*part.shape, data.shape[-1])
        )
    words = data.view(WORDS[data.dtype.itemsize])
    split = _split(part.shape)
    rows_R = _places(part.place[:split], part.shape[:split])
    columns_C = _places(part.place[split:], part.shape[split:])
    words_RC = words.reshape(len(rows_R), len(columns_C))
    # Groups and weights are those of the whole array, of which this process may hold some rows
    # and columns.
    groups_R = rows_R // np.uint32(
        max(1, GROUP_BYTES // (math.prod(part.shape[split:]) * data.dtype.itemsize))
    )
    starts = np.flatnonzero(np.diff(groups_R)) + 1
    bounds = itertools.pairwise([0, *starts.tolist(), len(rows_R)])
    sums_GC = np.stack(
        [words_RC[first:last].sum(axis=0, dtype=np.uint32) for first, last in bounds]
    )
    weights_G = _weights(groups_R[np.concatenate([[0], starts])])
    weights_2C = np.stack([_weights(columns_C), _weights(columns_C + np.uint32(2**31))])
    # Sums over the last axis, whose elements are neighbours: along the other one NumPy takes ten
    # times as long.
    sums_C = np.einsum("gc,g->c", sums_GC, weights_G)
    return (sums_C * weights_2C).sum(axis=1, dtype=np.uint32)


def _split(shape: tuple[int, ...]) -> int:
    """How many leading axes make the rows of the matrix: as many as leave rows of some length."""
    return max(
        (axes for axes in range(len(shape)) if math.prod(shape[axes:]) >= MIN_COLUMNS), default=0
    )


def _places(place: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Where rows or columns of a part are among those of the whole array, uint32."""
    places = np.zeros(1, np.uint32)
    for within, size in zip(place, shape, strict=True):
        of_axis = np.arange(*within.indices(size), dtype=np.uint32)
        places = (places[:, None] * np.uint32(size) + of_axis[None]).reshape(-1)
    return places


def _weights(places: np.ndarray) -> np.ndarray:
    """Odd numbers: the mixing of bits that ends MurmurHash3, so that neighbours have nothing in common."""
    mixed = places * np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    return mixed | np.uint32(1)
