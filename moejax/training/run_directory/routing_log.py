"""Where tokens went, over time: per-layer-per-expert arrays that grow beside `metrics.jsonl`.

`workdir/routing/` is a Zarr (version 3) group that any Zarr reader can open. Its attribute `layers`
names the model layer behind each row; the arrays grow together by one entry per logging interval:

  counts      [S, N, E] int64    assignments to each expert, summed over the interval, before any are dropped
  probs       [S, N, E] float32  mean router probability
  importance  [S, N, E] float32  mean combine weight, before any are dropped
  idle_steps  [S, N, E] int32    steps since the expert was last chosen, at the end of the interval
  bias        [S, N, E] float32  selection bias, at the end of the interval; NaN where there is none
  layers      [S, N, M] float32  the metrics of a layer that the attribute `metrics` names, over the interval
  step        [S]       int64    the last training step of the interval

`step` is written last and is the commit marker: an entry whose step is absent or -1 was never
finished, and readers stop in front of it; arrays grow by whole chunks, so most end with such
entries. Every file is replaced in one rename, so a process killed at any moment loses at most the
entry it was writing. There is one writer, process 0; readers may look at any time.

Every chunk ends with its CRC-32C, and every chunk of a finished entry is on disk, so that reading
notices what was changed or lost; the group's attributes carry a digest. Logs of earlier versions
have neither. What is damaged is refused by name: nothing is written over what is left.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float32, Int, Int64

from moejax.paths import resolve_path
from moejax.training.run_directory.routing_store import (
    ARRAYS,
    FOLDER,
    GROUP,
    UNFINISHED,
    RoutingLogError,
    array_shapes,
    check_stored,
    chunk_entries,
    create_arrays,
    finished_steps,
    has_checksums,
    has_entries,
    move_command,
    naming_damage,
    open_array,
    read_attributes,
    read_group,
    remove_unfinished_writes,
    write_group,
)

CHUNKS_AT_ONCE = 8  # read for a sum

log = logging.getLogger("moejax")


class RoutingHistory:
    """The finished entries of a routing log; its arrays are read when they are asked for, in slices.

    What a run appends later is not seen: open it anew.

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
            self.steps = finished_steps(
                step_array
            )  # first: what it commits is complete in the others
            is_checked = has_checksums(step_array)
            names = [
                name
                for name in ARRAYS
                if name != "step" and (is_checked or (folder / name).is_dir())
            ]
            self._arrays = {name: open_array(folder, name) for name in names}
            shape = (len(self.layers), self.num_experts)
            for name, array in self._arrays.items():
                if array.shape[1 : 1 + (1 if name == "layers" else 2)] != (
                    shape[:1] if name == "layers" else shape
                ):
                    raise ValueError(
                        f"{name} has the shape {array.shape} for {shape[0]} layers, {shape[1]} experts"
                    )
        self.names = tuple(names)

    def __repr__(self) -> str:
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if self.num_entries else ""
        return (
            f"RoutingHistory({self.num_entries} entries{span}, {len(self.layers)} layers, {self.num_experts} experts: "
            f"{', '.join(self.names)})"
        )

    @property
    def num_entries(self) -> int:
        """How many intervals are logged, S."""
        return len(self.steps)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some entries of an array, `[entries, N, ...]`; chunks outside of them are not read.

        Args:
          name: one of `names`.
          start: the first entry, as in a slice: -10 is the tenth from the end.
          stop: behind the last one; None reads to the end.
        """
        array = self._array(name)
        first, end, _ = slice(start, stop).indices(self.num_entries)
        with naming_damage(self._folder):
            part = array[first : max(first, end)]
            check_stored(name, part)
            return part.read().result()

    def blocks(self, name: str, first: int = 0) -> Iterator[np.ndarray]:
        """All entries from `first` on, `[s, N, ...]` for some s at a time: a few chunks are in memory at once."""
        array = self._array(name)
        at_once = CHUNKS_AT_ONCE * array.chunk_layout.read_chunk_template.shape[0]
        for start in range(first, self.num_entries, at_once):
            yield self.read(name, start, min(start + at_once, self.num_entries))

    def summed(self, name: str, num_columns: int) -> tuple[Int64[np.ndarray, "C"], np.ndarray]:
        """Sums over neighbouring entries, few enough to draw, with no more than a few chunks in memory at once.

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
        array, entries = self._array(name), self.num_entries
        starts_C = np.linspace(0, entries, min(num_columns, entries), endpoint=False).astype(int)
        is_integer = np.issubdtype(array.dtype.numpy_dtype, np.integer)
        sums_C = np.zeros((len(starts_C), *array.shape[1:]), np.int64 if is_integer else np.float64)
        first = 0
        for block in self.blocks(name):
            column = (
                np.searchsorted(starts_C, np.arange(first, first + len(block)), side="right") - 1
            )
            begins = np.flatnonzero(np.diff(column, prepend=-1))
            sums_C[column[begins]] += np.add.reduceat(block, begins, axis=0, dtype=sums_C.dtype)
            first += len(block)
        return self.steps[np.append(starts_C[1:], entries)[: len(starts_C)] - 1], sums_C

    @functools.cached_property
    def counts_SNE(self) -> Int64[np.ndarray, "S N E"]:
        """Assignments to each expert in each interval, before dropping; all of them."""
        return self.read("counts")

    @functools.cached_property
    def probs_SNE(self) -> Float32[np.ndarray, "S N E"]:
        """Mean router probability of each expert in each interval; all of them."""
        return self.read("probs")

    def _array(self, name: str) -> tensorstore.TensorStore:
        if name not in self._arrays:
            raise RoutingLogError(
                f"{self._folder} has no array {name!r}; use one of {', '.join(self.names)}"
            )
        return self._arrays[name]


class RoutingLog:
    """The writer. Opening an existing log continues it behind its last finished entry.

    Args:
      workdir: the run directory.
      layers: model layer index of each MoE layer, in the order of the rows of `counts_NE`.
      num_experts: experts per layer.
      metrics: names of what the array `layers` holds of each layer.

    Raises:
      ValueError: there is a log of other layers, metrics or another number of experts, or one that
        cannot be read.
    """

    def __init__(
        self,
        workdir: str | Path,
        layers: Sequence[int],
        num_experts: int,
        metrics: Sequence[str] = (),
    ):
        self._folder = Path(workdir) / FOLDER
        attributes = {
            "layers": [int(layer) for layer in layers],
            "num_experts": int(num_experts),
            "metrics": list(metrics),
        }
        remove_unfinished_writes(self._folder)
        if not (self._folder / GROUP).exists():
            with naming_damage(self._folder):
                is_filled = has_entries(self._folder)
            if is_filled:
                log.warning("%s/%s is lost and is written again", self._folder, GROUP)
                write_group(self._folder, attributes)
            else:
                create_arrays(self._folder, attributes)
        with naming_damage(self._folder):
            found = read_attributes(self._folder)
        if found != attributes:
            raise RoutingLogError(
                f"{self._folder} logs layers {found['layers']} with {found['num_experts']} experts, this run has "
                f"layers {attributes['layers']} with {num_experts}, and the metrics logged of a layer must be the "
                f"same; use another workdir, or move that folder away: {move_command(self._folder)}"
            )
        self._shapes = array_shapes(attributes)
        self._chunk_entries = chunk_entries(self._shapes)
        with naming_damage(self._folder):
            self._arrays = {name: open_array(self._folder, name) for name in ARRAYS}
            self._steps = finished_steps(self._arrays["step"]).tolist()
            for name, array in self._arrays.items():
                check_stored(name, array[: len(self._steps)])
            self._cut(len(self._steps))

    def append(
        self,
        step: int,
        counts: Int[np.ndarray, "N E"],
        probs: Float32[np.ndarray, "N E"],
        **others: np.ndarray,
    ) -> None:
        """Adds the interval that ended with `step`; on return it is on disk.

        Args:
          step: larger than every logged step.
          counts: assignments to each expert, summed over the interval, before dropping.
          probs: mean router probability of each expert, in [0, 1].
          others: more arrays by name, of the shapes at the top of this file without their first
            axis; where they are absent, the fill value stands for them.

        Raises:
          ValueError: a wrong name or shape, or a step that is not behind the last one.
        """
        arrays = {"counts": counts, "probs": probs, **others}
        for name, array in arrays.items():
            if array.shape != self._shapes.get(name):
                raise RoutingLogError(
                    f"{name} has shape {array.shape}; {self._folder} holds "
                    + ", ".join(
                        f"{known} {shape}"
                        for known, shape in self._shapes.items()
                        if known != "step"
                    )
                )
        last = self._steps[-1] if self._steps else -1
        if step <= last:
            raise RoutingLogError(
                f"step={step} must be above {last}, the last in {self._folder}; call truncate({step - 1}) first to "
                "write those steps again"
            )
        entry = len(self._steps)
        # Fill values are written, too: of an entry that was cut off, the old ones would come back.
        absent = {
            name: np.dtype(dtype).type(fill)
            for name, (dtype, fill) in ARRAYS.items()
            if name not in (*arrays, "step")
        }
        with naming_damage(self._folder):
            self._make_room(entry)
            written = [
                self._arrays[name][entry].write(array) for name, array in (arrays | absent).items()
            ]
            for future in written:  # they wait for the disk together
                future.result()
            self._arrays["step"][entry].write(step).result()  # last: from here on the entry exists
        self._steps.append(step)

    @property
    def num_entries(self) -> int:
        """How many intervals are logged."""
        return len(self._steps)

    def truncate(self, after_step: int, noted: int | None = None) -> None:
        """Drops the entries behind `after_step`, for a run that resumes there and will write them again.

        Args:
          after_step: the last step to keep.
          noted: `num_entries` at that step, from its checkpoint: having fewer is a loss that
            the log says.
        """
        with naming_damage(self._folder):
            self._cut(sum(step <= after_step for step in self._steps))
        if noted is not None and noted != self.num_entries:
            log.warning(
                "%s has %d entries up to step %d, of %d that were written: a part of the routing history is lost",
                self._folder, self.num_entries, after_step, noted,
            )  # fmt: skip

    def _make_room(self, entry: int) -> None:
        """Lets arrays grow, `step` last, by whole chunks: each time their description is written anew."""
        for name, array in self._arrays.items():
            if array.shape[0] <= entry:
                chunk = self._chunk_entries
                self._arrays[name] = self._resized(name, (entry // chunk + 1) * chunk)

    def _resized(self, name: str, entries: int) -> tensorstore.TensorStore:
        rest = [None] * (self._arrays[name].rank - 1)
        return self._arrays[name].resize(exclusive_max=[entries, *rest]).result()

    def _cut(self, count: int) -> None:
        """Keeps the first `count` entries.

        Shrinking alone does not clear what lies in a chunk that stays: growing again would bring
        the old step back and commit an entry before its data. Hence the markers are cleared first.
        """
        if self._arrays["step"].shape[0] > count:
            self._arrays["step"][count:].write(UNFINISHED).result()
        for name in reversed(list(ARRAYS)):  # `step` first
            self._arrays[name] = self._resized(name, count)
        del self._steps[count:]


def read_routing(workdir: str | Path) -> RoutingHistory | None:
    """The finished entries of the routing log in `workdir`; None if there is none.

    Raises:
      ValueError: the folder is damaged; the message names it and the remedy.
    """
    folder = resolve_path(workdir) / FOLDER
    if (folder / GROUP).exists():
        return RoutingHistory(folder)
    with naming_damage(folder):
        if has_entries(folder):
            raise ValueError(f"{GROUP} is lost; continuing the run writes it again")
    return None
