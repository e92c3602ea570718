"""Digests of arrays: what was in memory when a checkpoint was saved, compared when it is restored.

The elements of an array, as unsigned integers of up to 4 bytes, are laid out as a matrix whose rows
are taken in groups of about a megabyte. Each group is summed by columns modulo 2^32; a digest is
two sums of all these, weighted by odd numbers that depend on column and group. So

- damage within one element, or within several of one row, changes the digest except in one case in
  2^32 or fewer, and always where it is one element, since odd numbers have inverses modulo 2^32;
  wider damage goes unnoticed once in 2^64. Rows of one group in another order have the same digest:
  chunks, which might be mixed up, are larger or have checksums;
- the sums of the parts of an array add up to the sums of the array: a digest depends neither on how
  an array is split over devices and processes nor on the mesh that reads it;
- it costs one pass over memory, 0.05 s per gigabyte on two cores: less than a twentieth of the time
  of a restore of what the file cache holds, and less from a disk. A cryptographic digest would
  take a third.

A digest finds damage. It is no protection against someone who changes checkpoints on purpose.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
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
    """A part of an array that this process holds.

    Attributes:
      name: of the array.
      place: where the part is in the array.
      shape: of the array.
      data: the elements of the part.
    """

    name: str
    place: tuple[slice, ...]
    shape: tuple[int, ...]
    data: Any


def digest_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digest of each array, 16 hexadecimal digits; every process must call this.

    Args:
      arrays: by name, split over devices in any way. Copies on other devices are ignored.
    """
    parts = []
    for name, array in arrays.items():
        parts += _parts(name, array)
    # The largest first, so that no thread is left alone with one at the end.
    parts.sort(key=lambda part: part.data.nbytes, reverse=True)
    row_of_name = {name: row for row, name in enumerate(arrays)}
    own_sums_A2 = np.zeros((len(arrays), 2), np.uint32)
    num_threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        sums_of_parts = pool.map(_weighted_sums, parts)
        for part, sums_2 in zip(parts, sums_of_parts, strict=True):
            row = row_of_name[part.name]
            own_sums_A2[row] += sums_2
    sums_A2 = _add_processes(own_sums_A2)
    return {name: digest_of(sums_2) for name, sums_2 in zip(arrays, sums_A2, strict=True)}


def digest_of(sums_2: np.ndarray) -> str:
    """Returns the digest of an array whose regions have these sums."""
    first, second = sums_2.tolist()
    return f"{first:08x}{second:08x}"


def sums_of_region(
    place: Sequence[int | slice], shape: tuple[int, ...], values: np.ndarray
) -> np.ndarray:
    """Returns what a region contributes to the digest of its array, uint32 [2].

    Sums of regions that make up the array, added modulo 2^32, are those of the array.

    Args:
      place: of the region in the array.
      shape: of the array.
      values: of the region.
    """
    missing = len(shape) - len(place)
    everywhere = (*place, *[slice(None)] * missing)
    slices = []
    for index in everywhere:
        of_axis = slice(index, index + 1) if isinstance(index, int) else index
        slices.append(of_axis)
    sizes = [len(range(*each.indices(size))) for each, size in zip(slices, shape, strict=True)]
    part = _Part("", tuple(slices), shape, np.ascontiguousarray(values).reshape(sizes))
    return _weighted_sums(part)


def _add_processes(sums_A2: np.ndarray) -> np.ndarray:
    """Adds up the sums of all processes, modulo 2^32."""
    total_A2 = np.zeros_like(sums_A2)
    for text in gather_from_all(sums_A2.tobytes().hex()):
        of_process = np.frombuffer(bytes.fromhex(text), np.uint32)
        total_A2 += of_process.reshape(sums_A2.shape)
    return total_A2


def _parts(name: str, array: Any) -> list[_Part]:
    """Returns what this process holds of an array, each element once over all processes."""
    if not isinstance(array, jax.Array):
        host = np.asarray(array)
        everything = tuple(slice(0, size) for size in host.shape)
        return [_Part(name, everything, host.shape, host)]
    parts = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            part = _Part(name, shard.index, array.shape, shard.data)
            parts.append(part)
    return parts


def _weighted_sums(part: _Part) -> np.ndarray:
    """Returns both weighted sums of a part, uint32 [2]."""
    part = _as_words(part)
    words = part.data
    if not words.size:
        return np.zeros(2, np.uint32)
    num_row_axes = _num_row_axes(part.shape)
    column_shape = part.shape[num_row_axes:]
    rows_R = _indices(part.place[:num_row_axes], part.shape[:num_row_axes])
    columns_C = _indices(part.place[num_row_axes:], column_shape)
    # Groups and weights are those of the complete array, of which this process may hold some rows
    # and columns.
    row_bytes = math.prod(column_shape) * words.dtype.itemsize
    rows_of_group = max(1, GROUP_BYTES // row_bytes)
    groups_R = rows_R // np.uint32(rows_of_group)
    words_RC = words.reshape(len(rows_R), len(columns_C))
    groups_G, sums_GC = _sum_groups(words_RC, groups_R)
    sums_C = np.einsum("gc,g->c", sums_GC, _odd_weights(groups_G))
    first_weights_C = _odd_weights(columns_C)
    second_weights_C = _odd_weights(columns_C + np.uint32(2**31))
    weights_2C = np.stack([first_weights_C, second_weights_C])
    # Over the last axis, whose elements are neighbours: over the other one NumPy takes ten times as
    # long.
    return (sums_C * weights_2C).sum(axis=1, dtype=np.uint32)


def _as_words(part: _Part) -> _Part:
    """Returns a part whose elements are unsigned integers, on the host."""
    data = np.asarray(part.data)
    element_bytes = data.dtype.itemsize
    if element_bytes <= WORD_BYTES:
        words = data.view(WORDS[element_bytes])
        return part._replace(data=words)
    # The words of an element become one more axis.
    elements = np.ascontiguousarray(data).reshape(*data.shape, 1)
    words = elements.view(np.uint32)
    num_words = words.shape[-1]
    place = (*part.place, slice(0, num_words))
    shape = (*part.shape, num_words)
    return part._replace(place=place, shape=shape, data=words)


def _sum_groups(words_RC: np.ndarray, groups_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the groups of rows, increasing, and the sums of each by columns, uint32 [G, C]."""
    last_rows = np.flatnonzero(np.diff(groups_R))  # of all groups but the last one
    starts = [0, *(last_rows + 1).tolist()]
    bounds = itertools.pairwise([*starts, len(groups_R)])
    sums = []
    for start, end in bounds:
        sum_C = words_RC[start:end].sum(axis=0, dtype=np.uint32)
        sums.append(sum_C)
    return groups_R[starts], np.stack(sums)


def _num_row_axes(shape: tuple[int, ...]) -> int:
    """Returns how many leading axes make the rows of the matrix.

    They are as many as leave at least `MIN_COLUMNS` columns.
    """
    for num_axes in reversed(range(len(shape))):
        if math.prod(shape[num_axes:]) >= MIN_COLUMNS:
            return num_axes
    return 0


def _indices(place: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Returns the indices of a part's rows or columns in the complete array, uint32."""
    indices = np.zeros(1, np.uint32)
    for within, size in zip(place, shape, strict=True):
        start, stop, step = within.indices(size)
        of_axis = np.arange(start, stop, step, dtype=np.uint32)
        of_outer_axes = indices * np.uint32(size)
        sums = of_outer_axes[:, None] + of_axis[None]
        indices = sums.reshape(-1)
    return indices


def _odd_weights(indices: np.ndarray) -> np.ndarray:
    """Returns an odd number for each index: neighbours have nothing in common.

    Bits are mixed as at the end of MurmurHash3.
    """
    mixed = indices * np.uint32(0x9E3779B1)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    return mixed | np.uint32(1)
