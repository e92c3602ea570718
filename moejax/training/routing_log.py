"""Where tokens went, over time: per-layer-per-expert arrays that grow beside `metrics.jsonl`.

`workdir/routing/` is a Zarr (version 3) group that any Zarr reader can open. Its attribute `layers` names the model
layer behind each row; three arrays grow together by one entry per logging interval:

  counts [S, N, E] int64    assignments to each expert, summed over the interval, before any are dropped
  probs  [S, N, E] float32  mean router probability
  step   [S]       int64    the last training step of the interval

`step` is written last and is the commit marker: an entry whose step is absent or -1 was never finished, and readers
stop in front of it. Every file is replaced in one rename, so a process killed at any moment loses at most the entry it
was writing. There is one writer, process 0; readers may look at any time. Only this file knows `tensorstore`.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float32, Int, Int64

FOLDER = "routing"
GROUP = "zarr.json"
UNFINISHED = -1  # the fill value of `step`
CHUNK_BYTES = 2**20  # an append rewrites one chunk: about a megabyte, so that long runs leave few files
ARRAYS: Mapping[str, tuple[str, int]] = {"counts": ("int64", 0), "probs": ("float32", 0), "step": ("int64", UNFINISHED)}


class RoutingLogError(ValueError):
    """A routing log that cannot be used: the message names the folder and the remedy."""


@dataclasses.dataclass(frozen=True)
class RoutingHistory:
    """All finished entries of a routing log.

    Attributes:
      layers: model layer index of each MoE layer.
      steps: training step at the end of each logging interval, increasing.
      counts_SNE: assignments to each expert in each interval, before dropping.
      probs_SNE: mean router probability of each expert in each interval.
    """

    layers: Int64[np.ndarray, "N"]
    steps: Int64[np.ndarray, "S"]
    counts_SNE: Int64[np.ndarray, "S N E"]
    probs_SNE: Float32[np.ndarray, "S N E"]


class RoutingLog:
    """The writer. Opening an existing log continues it behind its last finished entry.

    Args:
      workdir: the run directory.
      layers: model layer index of each MoE layer, in the order of the rows of `counts_NE`.
      num_experts: experts per layer.

    Raises:
      ValueError: there is a log of other layers or another number of experts, or one that cannot be read.
    """

    def __init__(self, workdir: str | Path, layers: Sequence[int], num_experts: int):
        self._folder = Path(workdir) / FOLDER
        attributes = {"layers": [int(layer) for layer in layers], "num_experts": int(num_experts)}
        if not (self._folder / GROUP).exists():
            _create(self._folder, attributes)
        with _naming_damage(self._folder):
            found = _read_attributes(self._folder)
        if found != attributes:
            raise RoutingLogError(
                f"{self._folder} logs layers {found['layers']} with {found['num_experts']} experts, this run has "
                f"layers {attributes['layers']} with {num_experts}; use another workdir, or delete that folder to "
                "begin anew"
            )
        self._shape = (len(layers), num_experts)
        with _naming_damage(self._folder):
            self._arrays = {name: _open(self._folder, name) for name in ARRAYS}
            self._steps = _finished(self._arrays["step"]).tolist()
            self._cut(len(self._steps))

    def append(self, step: int, counts_NE: Int[np.ndarray, "N E"], probs_NE: Float32[np.ndarray, "N E"]) -> None:
        """Adds the interval that ended with `step`; on return it is on disk.

        Args:
          step: larger than every logged step.
          counts_NE: assignments to each expert, summed over the interval, before dropping.
          probs_NE: mean router probability of each expert, in [0, 1].

        Raises:
          ValueError: a wrong shape, or a step that is not behind the last one.
        """
        for name, array in (("counts_NE", counts_NE), ("probs_NE", probs_NE)):
            if array.shape != self._shape:
                raise RoutingLogError(
                    f"{name} has shape {array.shape}; {self._folder} holds [layer, expert] {self._shape}"
                )
        last = self._steps[-1] if self._steps else -1
        if step <= last:
            raise RoutingLogError(
                f"step={step} must be above {last}, the last in {self._folder}; call truncate({step - 1}) first to "
                "write those steps again"
            )
        self._write("counts", counts_NE)
        self._write("probs", probs_NE)
        self._write("step", step)  # last: from here on the entry exists
        self._steps.append(step)

    def truncate(self, after_step: int) -> None:
        """Drops the entries behind `after_step`, for a run that resumes there and will write them again."""
        self._cut(sum(step <= after_step for step in self._steps))

    def _write(self, name: str, value: Any) -> None:
        entry = len(self._steps)
        rest = [None] * (self._arrays[name].rank - 1)
        self._arrays[name] = self._arrays[name].resize(exclusive_max=[entry + 1, *rest], expand_only=True).result()
        self._arrays[name][entry].write(value).result()

    def _cut(self, count: int) -> None:
        """Keeps the first `count` entries.

        Shrinking alone does not clear what lies in a chunk that stays: growing again would bring the old step back and
        commit an entry before its data. Hence the markers are cleared first.
        """
        if self._arrays["step"].shape[0] > count:
            self._arrays["step"][count:].write(UNFINISHED).result()
        for name in ("step", "counts", "probs"):
            rest = [None] * (self._arrays[name].rank - 1)
            self._arrays[name] = self._arrays[name].resize(exclusive_max=[count, *rest]).result()
        del self._steps[count:]


def read_routing(workdir: str | Path) -> RoutingHistory | None:
    """The finished entries of the routing log in `workdir`; None if there is none.

    Raises:
      ValueError: the folder is damaged; the message names it and the remedy.
    """
    folder = Path(workdir) / FOLDER
    if not (folder / GROUP).exists():
        return None
    with _naming_damage(folder):
        layers = np.array(_read_attributes(folder)["layers"], np.int64)
        steps = _finished(_open(folder, "step"))  # first: what it commits is complete in the others
        counts, probs = (_open(folder, name)[: len(steps)].read().result() for name in ("counts", "probs"))
        return RoutingHistory(layers, steps, counts, probs)


def _finished(step_array: tensorstore.TensorStore) -> Int64[np.ndarray, "S"]:
    """Steps in front of the first unfinished entry."""
    steps = step_array.read().result()
    unfinished = np.flatnonzero(steps == UNFINISHED)
    return steps[: unfinished[0]] if unfinished.size else steps


def _create(folder: Path, attributes: dict[str, Any]) -> None:
    """Makes empty arrays, then the group file: a folder without it is not a log yet and is made anew."""
    sizes = (len(attributes["layers"]), attributes["num_experts"])
    if min(sizes) < 1:
        raise RoutingLogError(f"a routing log needs MoE layers and experts, got {attributes}; a dense run has none")
    entries = int(np.clip(CHUNK_BYTES // (8 * sizes[0] * sizes[1]), 1, 256))
    for name, (dtype, fill) in ARRAYS.items():
        inner = [] if name == "step" else list(sizes)
        metadata = {
            "shape": [0, *inner],
            "data_type": dtype,
            "fill_value": fill,
            "dimension_names": ["step", "layer", "expert"][: 1 + len(inner)],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [entries, *inner]}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}],
        }
        spec = _spec(folder, name) | {"metadata": metadata}
        tensorstore.open(spec, create=True, delete_existing=True).result()
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    partial = folder / f"{GROUP}.partial"
    partial.write_text(json.dumps(group))
    os.replace(partial, folder / GROUP)


def _spec(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}


def _open(folder: Path, name: str) -> tensorstore.TensorStore:
    return tensorstore.open(_spec(folder, name), open=True).result()


def _read_attributes(folder: Path) -> dict[str, Any]:
    attributes = json.loads((folder / GROUP).read_text())["attributes"]
    return {"layers": list(attributes["layers"]), "num_experts": int(attributes["num_experts"])}


@contextlib.contextmanager
def _naming_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise RoutingLogError(f"{folder} is damaged ({reason}); delete it to do without its routing history") from error
