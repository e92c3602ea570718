"""Where tokens went, over time: arrays by layer and expert that grow along with `metrics.jsonl`.

`workdir/routing/` is a Zarr (version 3) group that any Zarr reader can open. Its attribute `layers`
names the model layer of each row; the arrays grow together by one entry per logging interval:

  counts      [S, N, E] int64    assignments to each expert, summed over the interval, before any
                                 are dropped
  probs       [S, N, E] float32  mean router probability
  importance  [S, N, E] float32  mean combine weight, before any are dropped
  idle_steps  [S, N, E] int32    steps since the expert was last chosen, at the end of the interval
  bias        [S, N, E] float32  selection bias at the end of the interval; NaN where there is none
  layers      [S, N, M] float32  the metrics of a layer over the interval, in the order of the
                                 attribute `metrics`
  gradient_norms, update_norms, weight_norms
              [S, N, E] float32  norms of each expert's weights, and of what belongs to them, in the
                                 last step of the interval; NaN where there are none
  step        [S]       int64    the last training step of the interval

`step` is written last and is the commit marker: an entry whose step is absent or -1 was never
finished, and readers stop before it; arrays grow by whole chunks, so most end with such
entries. Every file is replaced in one rename, so a process killed at any moment loses at most the
entry it was writing. There is one writer, process 0; readers may look at any time.

Every chunk ends with its CRC-32C, and every chunk of a finished entry is on disk, so that reading
notices what was changed or lost; the group's attributes carry a digest. Logs of earlier versions
have neither. What is damaged is refused by name: nothing is written over what is left.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float32, Int

from moejax.paths import resolve_path
from moejax.training.run_directory.routing_history import RoutingHistory
from moejax.training.run_directory.routing_store import (
    ADDED,
    ARRAYS,
    FOLDER,
    GROUP,
    UNFINISHED,
    RoutingLogError,
    array_shapes,
    check_stored,
    chunk_entries,
    create_array,
    create_arrays,
    finished_steps,
    has_entries,
    move_command,
    naming_damage,
    open_array,
    read_attributes,
    remove_unfinished_writes,
    write_group,
)

log = logging.getLogger("moejax")


class RoutingLog:
    """Writes a routing log. Opening an existing one continues it after its last finished entry.

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
        self._create_if_absent(attributes)
        self._check_attributes(attributes)
        self._shapes = array_shapes(attributes)
        self._chunk_entries = chunk_entries(self._shapes)
        with naming_damage(self._folder):
            self._steps = finished_steps(open_array(self._folder, "step")).tolist()
            self._arrays = {name: self._open(name) for name in ARRAYS}
            for name, array in self._arrays.items():
                check_stored(name, array[: len(self._steps)])
            self._cut(len(self._steps))

    def _open(self, name: str) -> tensorstore.TensorStore:
        """Opens an array; one that the log of an earlier version lacks has fill values."""
        if name not in ADDED or (self._folder / name).is_dir():
            return open_array(self._folder, name)
        array = create_array(self._folder, name, self._shapes)
        count = len(self._steps)
        if count:
            log.warning(
                "%s lacks %s: it is of an earlier version, or has lost it; its %d entries so far "
                "have none",
                self._folder,
                name,
                count,
            )
        grown = array.resize(exclusive_max=[count, *[None] * (array.rank - 1)]).result()
        _, fill_value = ARRAYS[name]
        if count:
            grown[:count].write(np.float32(fill_value)).result()
        return grown

    def _create_if_absent(self, attributes: dict[str, Any]) -> None:
        """Makes the arrays if there is no log, or only the group file if that alone is lost."""
        if (self._folder / GROUP).exists():
            return
        with naming_damage(self._folder):
            is_filled = has_entries(self._folder)
        if is_filled:
            log.warning("%s/%s is lost and is written again", self._folder, GROUP)
            write_group(self._folder, attributes)
        else:
            create_arrays(self._folder, attributes)

    def _check_attributes(self, attributes: dict[str, Any]) -> None:
        """Raises `RoutingLogError` if the log is one of other layers, experts or metrics."""
        with naming_damage(self._folder):
            found = read_attributes(self._folder)
        if found == attributes:
            return
        raise RoutingLogError(
            f"{self._folder} logs layers {found['layers']} with {found['num_experts']} experts, "
            f"this run has layers {attributes['layers']} with {attributes['num_experts']}, and the "
            "metrics logged of a layer must be the same; use another workdir, or move that folder "
            f"away: {move_command(self._folder)}"
        )

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
            axis; the fill value is written for those that are absent.

        Raises:
          ValueError: a wrong name or shape, or a step that does not come after the last one.
        """
        arrays = {"counts": counts, "probs": probs, **others}
        self._check_entry(step, arrays)
        entry = len(self._steps)
        values: dict[str, Any] = {}
        for name, (dtype, fill_value) in ARRAYS.items():
            # Fill values are written, too: otherwise those of an entry that was cut off would come
            # back.
            values[name] = arrays.get(name, np.dtype(dtype).type(fill_value))
        del values["step"]
        with naming_damage(self._folder):
            self._make_room(entry)
            writes = [self._arrays[name][entry].write(value) for name, value in values.items()]
            # They wait for the disk together, and none is under way when an error is raised.
            errors = [write.exception() for write in writes]
            for error in filter(None, errors):
                raise error
            self._arrays["step"][entry].write(step).result()  # last: from here on the entry exists
        self._steps.append(step)

    def _check_entry(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises `RoutingLogError` for a wrong name, shape or step."""
        shapes = {name: shape for name, shape in self._shapes.items() if name != "step"}
        for name, array in arrays.items():
            if array.shape != self._shapes.get(name):
                known = ", ".join(f"{other} {shape}" for other, shape in shapes.items())
                raise RoutingLogError(
                    f"{name} has shape {array.shape}; {self._folder} holds {known}"
                )
        last = self._steps[-1] if self._steps else -1
        if step <= last:
            raise RoutingLogError(
                f"step={step} must be above {last}, the last in {self._folder}; call "
                f"truncate({step - 1}) first to write those steps again"
            )

    @property
    def num_entries(self) -> int:
        """How many intervals are logged."""
        return len(self._steps)

    def truncate(self, after_step: int, noted: int | None = None) -> None:
        """Drops the entries after a step, for a run that resumes there and will write them again.

        Args:
          after_step: the last step to keep.
          noted: `num_entries` at that step, from its checkpoint: a log that has fewer has lost
            some, which is reported.
        """
        with naming_damage(self._folder):
            self._cut(sum(step <= after_step for step in self._steps))
        if noted is not None and noted != self.num_entries:
            log.warning(
                "%s has %d entries up to step %d, of %d that were written: a part of the routing "
                "history is lost",
                self._folder,
                self.num_entries,
                after_step,
                noted,
            )

    def _make_room(self, entry: int) -> None:
        """Lets arrays grow, `step` last, so that they hold an entry.

        They grow by complete chunks, since each time their metadata is written again.
        """
        num_chunks = entry // self._chunk_entries + 1
        for name, array in self._arrays.items():
            if array.shape[0] <= entry:
                self._arrays[name] = self._resized(name, num_chunks * self._chunk_entries)

    def _resized(self, name: str, num_entries: int) -> tensorstore.TensorStore:
        array = self._arrays[name]
        unchanged = [None] * (array.rank - 1)
        return array.resize(exclusive_max=[num_entries, *unchanged]).result()

    def _cut(self, count: int) -> None:
        """Keeps the first `count` entries.

        Shrinking alone does not clear what is in a chunk that stays: growing again would bring
        the old step back and commit an entry before its data. Hence the markers are cleared first.
        """
        if self._arrays["step"].shape[0] > count:
            self._arrays["step"][count:].write(UNFINISHED).result()
        for name in reversed(list(ARRAYS)):  # `step` first
            self._arrays[name] = self._resized(name, count)
        del self._steps[count:]


def read_routing(workdir: str | Path) -> RoutingHistory | None:
    """Opens the finished entries of the routing log in `workdir`; None if there is none.

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
