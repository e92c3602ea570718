"""A checkpoint that is written, or read, region by region, for models larger than memory.

Orbax writes a skeleton, in which each array is a single number; then the arrays are made in its
store, with their shapes and in chunks that suit the regions, and filled through tensorstore. What
comes out is an ordinary checkpoint of weights without an optimizer, which `Checkpoints` restores.
Arrays are not compressed: compression would take longer than writing them.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from moejax.paths import replace_file, sync_path
from moejax.training.checkpoints.meta import FILE, seal

ITEM = "model"

BEING_WRITTEN = ".__lock"
"""How tensorstore ends the name of a file that it is writing."""

Place = tuple[int | slice, ...]
"""A region of an array."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """An array of a checkpoint.

    Attributes:
      shape: of the array.
      dtype: of its elements.
      chunk: shape of what is stored together.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]


def make_skeleton(folder: Path, step: int, arrays: Mapping[str, Layout]) -> None:
    """Makes the checkpoint of a step, whose arrays are to be written.

    Args:
      folder: of checkpoints, that has none of this step.
      step: of the checkpoint.
      arrays: by name.
    """
    numbers = {name: np.zeros((), layout.dtype) for name, layout in arrays.items()}
    items = {"model": ocp.args.StandardSave(numbers), "meta": ocp.args.JsonSave({})}
    with ocp.CheckpointManager(folder, item_names=tuple(items)) as manager:
        manager.save(step, args=ocp.args.Composite(**items))
    store = _Store(folder / str(step) / ITEM)
    for name, layout in arrays.items():
        store.make(name, layout)


class StoreError(ValueError):
    """A region that cannot be read or written: the message names the folder and the reason."""


class StreamedCheckpoint:
    """The arrays of a checkpoint, open for writing and reading regions, by several threads.

    Args:
      folder: of the checkpoint, such as `checkpoints/0`.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._store = _Store(folder / ITEM)
        self._synced: set[Path] = set()

    def write(self, name: str, place: Place, values: np.ndarray) -> None:
        """Writes a region; it is on disk after `sync`.

        Raises:
          StoreError: it cannot be written, for one because the disk is full.
        """
        try:
            self._store.open(name)[place].write(values).result()
        except (ValueError, OSError) as error:  # as tensorstore reports what the system says
            raise StoreError(
                f"{self._folder}: {name} cannot be written ({_line(error)})"
            ) from error

    def read(self, name: str, place: Place) -> np.ndarray:
        """Returns a region.

        Raises:
          StoreError: it cannot be read.
        """
        try:
            return self._store.open(name)[place].read().result()
        except (ValueError, OSError) as error:
            raise StoreError(f"{self._folder}: {name} cannot be read ({_line(error)})") from error

    def sync(self) -> None:
        """Returns when all that was written before is on disk; others may write meanwhile."""
        files = {path for path in (self._folder / ITEM).rglob("*") if path.is_file()}
        # What is being written gets its name when it is complete.
        data = {path for path in files if not path.name.endswith(BEING_WRITTEN)}
        manifests = {path for path in data if path.name.startswith("manifest")}
        for path in (data - self._synced) | manifests:
            sync_path(path)
        sync_path(self._folder / ITEM / "d")
        self._synced |= data

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Writes what the checkpoint says of itself, see `meta`."""
        self.sync()
        replace_file(self._folder / FILE, json.dumps(seal(meta)).encode())


class _Store:
    """The arrays of an item by name; each is opened once."""

    def __init__(self, folder: Path):
        # Files are synced by `sync`, many at once.
        base = {"driver": "file", "path": f"{folder}/", "file_io_sync": False}
        self._kvstore = {"driver": "ocdbt", "base": base}
        self._context = ts.Context()
        self._arrays: dict[str, Any] = {}

    def make(self, name: str, layout: Layout) -> None:
        metadata = {
            "shape": layout.shape,
            "chunks": layout.chunk,
            "dtype": layout.dtype.str,
            "compressor": None,
            "fill_value": None,
        }
        spec = {**self._spec(name), "metadata": metadata}
        self._arrays[name] = ts.open(
            spec, context=self._context, create=True, delete_existing=True
        ).result()

    def open(self, name: str) -> Any:
        if name not in self._arrays:
            spec = self._spec(name)
            self._arrays[name] = ts.open(spec, context=self._context, open=True).result()
        return self._arrays[name]

    def _spec(self, name: str) -> dict[str, Any]:
        return {"driver": "zarr", "kvstore": {**self._kvstore, "path": f"{name}/"}}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
