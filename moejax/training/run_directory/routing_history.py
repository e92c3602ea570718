"""Reads the finished entries of a routing log, in slices; see `routing_log` for its arrays."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float32, Int64

from moejax.training.run_directory.routing_store import (
    ADDED,
    ARRAYS,
    RoutingLogError,
    check_stored,
    finished_steps,
    has_checksums,
    naming_damage,
    open_array,
    read_group,
)

CHUNKS_AT_ONCE = 8  # read for a sum


class RoutingHistory:
    """Reads the finished entries of a routing log, in slices and on demand.

    What a run appends later is not seen: open the log again.

    Args:
      folder: of the log.

    Attributes:
      layers: model layer index of each MoE layer, int64 [N].
      num_experts: width of the router, E.
      steps: training step at the end of each logging interval, increasing, int64 [S].
      names: the arrays that this log holds.
      attributes: what the log says about itself.

    Raises:
      RoutingLogError: the folder is damaged; later, so is a part that is read.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        with naming_damage(folder):
            self.attributes: Mapping[str, Any] = read_group(folder)
            self.layers = np.array(self.attributes["layers"], np.int64)
            self.num_experts = int(self.attributes["num_experts"])
            step_array = open_array(folder, "step")
            # Read first: what it commits is complete in the other arrays.
            self.steps = finished_steps(step_array)
            names = [name for name in ARRAYS if name != "step"]
            # Earlier versions had fewer arrays.
            optional = names if not has_checksums(step_array) else ADDED
            absent = [name for name in optional if not (folder / name).is_dir()]
            names = [name for name in names if name not in absent]
            self._arrays = {name: open_array(folder, name) for name in names}
            self._check_shapes()
        self.names = tuple(names)

    def _check_shapes(self) -> None:
        """Raises `ValueError` unless all arrays have the layers and experts of the attributes."""
        num_layers = len(self.layers)
        for name, array in self._arrays.items():
            # The array `layers` has metrics in the place of experts.
            is_fitting = array.shape[1:2] == (num_layers,)
            if name != "layers":
                is_fitting = array.shape[1:3] == (num_layers, self.num_experts)
            if not is_fitting:
                raise ValueError(
                    f"{name} has the shape {array.shape} for {num_layers} layers, "
                    f"{self.num_experts} experts"
                )

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if self.num_entries else ""
        return (
            f"RoutingHistory({self.num_entries} entries{span}, {len(self.layers)} layers, "
            f"{self.num_experts} experts: {', '.join(self.names)})"
        )

    @property
    def num_entries(self) -> int:
        """How many intervals are logged, S."""
        return len(self.steps)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads some entries of an array, `[entries, N, ...]`; other chunks are not read.

        Args:
          name: one of `names`.
          start: the first entry, as in a slice: -10 is the tenth from the end.
          stop: the entry after the last one; None reads to the end.
        """
        array = self._array(name)
        first, end, _ = slice(start, stop).indices(self.num_entries)
        with naming_damage(self._folder):
            part = array[first : max(first, end)]
            check_stored(name, part)
            return part.read().result()

    def blocks(self, name: str, first: int = 0) -> Iterator[np.ndarray]:
        """Reads all entries from `first` on, `[s, N, ...]` for some s at a time.

        Only a few chunks are in memory at once.
        """
        array = self._array(name)
        chunk = array.chunk_layout.read_chunk_template.shape
        num_at_once = CHUNKS_AT_ONCE * chunk[0]
        for start in range(first, self.num_entries, num_at_once):
            stop = min(start + num_at_once, self.num_entries)
            yield self.read(name, start, stop)

    def summed(self, name: str, num_columns: int) -> tuple[Int64[np.ndarray, "C"], np.ndarray]:
        """Sums over neighbouring entries, to have few enough columns to draw.

        Only a few chunks are in memory at once.

        Args:
          name: one of `names`.
          num_columns: how many sums at most, C.

        Returns:
          The last step of each sum, and the sums `[C, N, ...]`, int64 or float64.

        Raises:
          RoutingLogError: `num_columns` is below 1.
        """
        if num_columns < 1:
            raise RoutingLogError(f"num_columns={num_columns} must be at least 1")
        array = self._array(name)
        num_sums = min(num_columns, self.num_entries)
        starts_C = np.linspace(0, self.num_entries, num_sums, endpoint=False).astype(int)
        is_integer = np.issubdtype(array.dtype.numpy_dtype, np.integer)
        dtype = np.dtype(np.int64 if is_integer else np.float64)
        entry_shape = array.shape[1:]
        sums_C = np.zeros((num_sums, *entry_shape), dtype)
        first = 0
        for block in self.blocks(name):
            columns, sums = _sum_by_column(block, starts_C, first, dtype)
            sums_C[columns] += sums  # a column may begin in one block and go on in the next
            first += len(block)
        ends_C = np.append(starts_C[1:], self.num_entries)[:num_sums]
        last_steps_C = self.steps[ends_C - 1]
        return last_steps_C, sums_C

    @functools.cached_property
    def counts_SNE(self) -> Int64[np.ndarray, "S N E"]:
        """Assignments to each expert in each interval, before dropping; all entries."""
        return self.read("counts")

    @functools.cached_property
    def probs_SNE(self) -> Float32[np.ndarray, "S N E"]:
        """Mean router probability of each expert in each interval; all entries."""
        return self.read("probs")

    def _array(self, name: str) -> tensorstore.TensorStore:
        if name not in self._arrays:
            known = ", ".join(self.names)
            raise RoutingLogError(f"{self._folder} has no array {name!r}; use one of {known}")
        return self._arrays[name]


def _sum_by_column(
    block: np.ndarray, starts_C: np.ndarray, first: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Sums the entries of a block that belong to one column.

    Args:
      block: entries, `[s, N, ...]`.
      starts_C: the first entry of each column.
      first: the number of the block's first entry.
      dtype: of the sums.

    Returns:
      The columns that have entries in the block, and their sums.
    """
    entries = np.arange(first, first + len(block))
    num_begun = np.searchsorted(starts_C, entries, side="right")
    column_of_entry = num_begun - 1
    is_begin = np.diff(column_of_entry, prepend=-1)
    begins = np.flatnonzero(is_begin)
    sums = np.add.reduceat(block, begins, axis=0, dtype=dtype)
    return column_of_entry[begins], sums
