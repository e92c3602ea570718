"""A run's checkpoint in the Hugging Face layout: `config.json`, safetensors files and an index.

The weights go piece by piece into files of at most `FILE_BYTES`. What is under way is in
`converting/` of the folder, which has no `config.json` before the end.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

import moejax
from moejax.config import Config, resolve_recorded
from moejax.interop.hf.conversion.journal import Journal
from moejax.interop.hf.conversion.staging import (
    check_target,
    is_complete,
    mark_complete,
    move_all,
    remove_staging,
)
from moejax.interop.hf.conversion.texts import TEXTS, read_types
from moejax.interop.hf.conversion.to_run import Progress, num_threads
from moejax.interop.hf.errors import ConversionInterruptedError, HfError
from moejax.interop.hf.families import FAMILIES
from moejax.interop.hf.family import Family
from moejax.interop.hf.files.stored import DTYPES
from moejax.interop.hf.files.weights import INDEX, SINGLE
from moejax.interop.hf.load import abstract_model
from moejax.interop.hf.pieces import Piece, pieces_of
from moejax.interop.hf.places import named_arrays, shapes_of
from moejax.interop.hf.save import published_keys
from moejax.locks import FolderLock, check_held
from moejax.paths import replace_file, sync_path
from moejax.training.checkpoints.checkpoint import CheckpointError
from moejax.training.checkpoints.digests import digest_of, sums_of_region
from moejax.training.checkpoints.meta import (
    NOT_VERIFIED,
    DamageError,
    compare_digests,
    has_optimizer,
    read_meta,
    saved_steps,
)
from moejax.training.checkpoints.streamed import StoreError, StreamedCheckpoint
from moejax.training.run_directory.layout import CONVERTING, RELEASED, read_config

FILE_BYTES = 2**28
"""Size of a file, unless a tensor alone is larger."""

KEPT = ("bos_token_id", "eos_token_id", "max_position_embeddings", "pad_token_id")
"""Keys of a released model's `config.json` that say nothing of what it computes, and are kept."""

TORCH_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""How `config.json` and safetensors call the types that are written."""

log = logging.getLogger("moejax")

NO_SUMS = np.zeros(2, np.uint32)
"""What no region contributes to a digest."""


@dataclasses.dataclass(frozen=True)
class File:
    """One of the safetensors files.

    Attributes:
      name: of the file.
      pieces: whose tensors it holds.
    """

    name: str
    pieces: Sequence[Piece]


def convert_to_hf(
    workdir: Path,
    folder: Path,
    *,
    model_type: str = "",
    step: int | None = None,
    dtype: str = "",
) -> Family:
    """Writes a checkpoint of a run in the Hugging Face layout.

    A conversion that was interrupted goes on where it stopped; nothing else may be in `folder`.

    Args:
      workdir: the run directory.
      folder: is made.
      model_type: of the family, such as "mixtral"; by default the one it was converted from, or
        the first that fits.
      step: a saved step; None takes the newest.
      dtype: of all tensors, one of `TORCH_DTYPES`; by default as they were released, or float32
        where they were trained since.

    Returns:
      The family.

    Raises:
      HfError: a model that is none of the family, or a folder that holds something.
      CheckpointError: no such checkpoint, or it is damaged.
      LockedError: another process writes there.
    """
    check_target(folder, workdir, "--to_hf")
    run = _open_run(workdir, step)
    family = choose_family(run.config, model_type, _published_by(workdir))
    keys = published_keys(run.config, family)
    with FolderLock(folder, "convert"):
        check_target(folder, workdir, "--to_hf")
        export = _Export(run, family, folder, dtype)
        if not is_complete(folder):
            _write(export)
        export.finish(keys)
    (folder / ".lock").unlink(missing_ok=True)
    return family


def _write(export: "_Export") -> None:
    """Writes all files; what cannot be converted leaves nothing."""
    try:
        export.run()
    except ConversionInterruptedError:
        raise
    except (HfError, CheckpointError):  # it would fail again
        shutil.rmtree(export.staging)
        raise


def choose_family(config: Config, model_type: str, source: Mapping[str, Any]) -> Family:
    """Returns the family as which a model is written.

    Args:
      config: of the model.
      model_type: of the family that is asked for; "" for any that fits.
      source: `config.json` of the released model that it was converted from; empty if none.

    Raises:
      HfError: an unknown family, or none fits.
    """
    if model_type and model_type not in FAMILIES:
        raise HfError(f"--family={model_type} is not known; the families are {', '.join(FAMILIES)}")
    if model_type:
        published_keys(config, FAMILIES[model_type])
        return FAMILIES[model_type]
    first = [name for name in (source.get("model_type"),) if name in FAMILIES]
    for name in [*first, *FAMILIES]:
        try:
            published_keys(config, FAMILIES[name])
        except ValueError:
            continue
        return FAMILIES[name]
    raise HfError("the model is one of no family; --family=NAME says why it is not of that one")


@dataclasses.dataclass(frozen=True)
class _Run:
    """A checkpoint of a run, of which no array was read.

    Attributes:
      workdir: the run directory.
      config: of the run.
      step: of the checkpoint.
      meta: what it says of itself.
    """

    workdir: Path
    config: Config
    step: int
    meta: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.workdir / "checkpoints" / str(self.step)


def _open_run(workdir: Path, step: int | None) -> _Run:
    read_config(workdir)  # refuses what is no run
    steps = saved_steps(workdir)
    if not steps:
        raise CheckpointError(f"{workdir} holds no checkpoint; train the run first")
    chosen = steps[-1] if step is None else step
    if chosen not in steps:
        raise CheckpointError(f"{workdir} holds no step {chosen}; it holds {steps}")
    folder = workdir / "checkpoints" / str(chosen)
    try:
        meta = read_meta(folder)
    except (DamageError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); use another --step") from error
    return _Run(workdir, resolve_recorded(meta["config"]), chosen, meta)


def _published_by(workdir: Path) -> Mapping[str, Any]:
    """Returns `config.json` of the released model that a run was converted from; empty if none."""
    path = workdir / RELEASED / "config.json"
    if not path.is_file():
        return {}
    try:
        published = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HfError(f"{path} is damaged ({error}); restore it from a copy") from error
    return published if isinstance(published, dict) else {}


class _Export:
    """A conversion under way.

    Args:
      source: what is converted.
      family: as which it is written.
      folder: that this process has locked.
      dtype: of all tensors; "" is that of each in the released model, or float32.
    """

    def __init__(self, source: _Run, family: Family, folder: Path, dtype: str):
        self.source = source
        self.folder = folder
        self.family = family
        self.staging = folder / CONVERTING
        _, params, others = abstract_model(source.config)
        arrays = named_arrays(params) | named_arrays(others)
        self.field_of = dict.fromkeys(named_arrays(params), "params")
        self.shapes = shapes_of(arrays)
        is_untouched = not dtype and not has_optimizer(source.meta)
        self.types = read_types(source.workdir / RELEASED) if is_untouched else {}
        self.default_type = TORCH_DTYPES[dtype or "float32"]
        self.files = _files(list(pieces_of(source.config, family, self.shapes)), self.dtype)

    def dtype(self, tensor: str) -> np.dtype:
        """Returns the type that a tensor is written with."""
        return DTYPES[self.types.get(tensor, self.default_type)]

    def run(self) -> None:
        """Writes all files that are not written yet, and compares the digests of all arrays."""
        self.staging.mkdir(exist_ok=True)
        journal = Journal(self.staging, self._identity())
        for number in [number for number in journal.done if not self._is_there(number, journal)]:
            del journal.done[number]
        stored = StreamedCheckpoint(self.source.folder)
        total = sum(_num_bytes(piece, self.dtype) for file in self.files for piece in file.pieces)
        progress = Progress(total)
        left = [number for number in range(len(self.files)) if number not in journal.done]
        with ThreadPoolExecutor(num_threads()) as pool:
            notes = pool.map(lambda number: self._write(self.files[number], stored), left)
            for number, note in zip(left, notes, strict=True):
                check_held(self.folder)
                journal.add([(number, note)])
                file = self.files[number]
                progress.add(sum(_num_bytes(piece, self.dtype) for piece in file.pieces))
        journal.close()
        self._compare([note["sums"] for note in journal.done.values()])
        mark_complete(self.folder)

    def _is_there(self, number: int, journal: Journal) -> bool:
        """Whether a file that is noted as done is there in its size."""
        path = self.staging / self.files[number].name
        return path.is_file() and path.stat().st_size == journal.done[number]["bytes"]

    def finish(self, keys: Mapping[str, Any]) -> None:
        """Moves the files to their place; `config.json`, which makes it a model, comes last."""
        move_all(self.folder, [file.name for file in self.files])
        if len(self.files) > 1:
            replace_file(self.folder / INDEX, json.dumps(self._index(), indent=1).encode())
        published = _published_by(self.source.workdir)
        texts = self.source.workdir / RELEASED
        for name in TEXTS:
            if name != "config.json" and (texts / name).is_file():
                shutil.copyfile(texts / name, self.folder / name)
        kept = {key: published[key] for key in KEPT if key in published}
        content = json.dumps({**keys, **kept, "torch_dtype": self._torch_dtype()}, indent=2)
        replace_file(self.folder / "config.json", content.encode())
        remove_staging(self.folder)

    def _torch_dtype(self) -> str:
        """Returns the type of most tensors, as `config.json` calls it."""
        types = [self.types.get(name, self.default_type) for name in self._index()["weight_map"]]
        most = max(sorted(set(types)), key=types.count)
        return next(name for name, kind in TORCH_DTYPES.items() if kind == most)

    def _write(self, file: File, stored: StreamedCheckpoint) -> dict[str, Any]:
        """Writes a file; returns its size, and what its pieces add to the digests of arrays."""
        tensors: dict[str, np.ndarray] = {}
        sums: dict[str, np.ndarray] = {}
        for piece in file.pieces:
            values = self._read(piece, stored)
            for name, tensor in piece.to_theirs(values):
                typed = _as_type(name, tensor, self.dtype(name))
                # Rows of one tensor may come from several arrays, one after the other.
                tensors[name] = np.concatenate([tensors[name], typed]) if name in tensors else typed
            added = sums_of_region(piece.place, self.shapes[piece.array], values)
            sums[piece.array] = sums.get(piece.array, NO_SUMS) + added
        path = self.staging / file.name
        try:
            save_file(tensors, path, metadata={"format": "pt"})
            os.chmod(path, 0o644)  # the library makes files private
            sync_path(path)
        except (SafetensorError, OSError) as error:
            raise ConversionInterruptedError(
                f"{path} cannot be written ({error}); make room, and run the command again to go on"
            ) from error
        by_name = {name: each.tolist() for name, each in sums.items()}
        return {"bytes": path.stat().st_size, "sums": by_name}

    def _read(self, piece: Piece, stored: StreamedCheckpoint) -> np.ndarray:
        try:
            return stored.read(self._name(piece.array), piece.place)
        except StoreError as error:
            raise CheckpointError(f"{error}; use another --step, or a copy of the run") from error

    def _compare(self, sums_of_files: Iterable[Mapping[str, list[int]]]) -> None:
        """Raises `CheckpointError` if an array is not what was saved."""
        sums: dict[str, np.ndarray] = {}
        for sums_of_file in sums_of_files:
            for array, values in sums_of_file.items():
                sums[array] = sums.get(array, NO_SUMS) + np.array(values, np.uint32)
        found = {self._name(array): digest_of(own_sums) for array, own_sums in sums.items()}
        if "digests" not in self.source.meta:
            log.warning(NOT_VERIFIED, self.source.folder)
            return
        try:
            compare_digests(self.source.meta["digests"], found)
        except DamageError as error:
            raise CheckpointError(
                f"{self.source.folder}: {error}; use another --step, or a copy of the run"
            ) from error

    def _index(self) -> dict[str, Any]:
        file_of: dict[str, str] = {}
        total = 0
        for file in self.files:
            for piece in file.pieces:
                total += _num_bytes(piece, self.dtype)
                file_of |= dict.fromkeys(piece.shapes(), file.name)
        return {"metadata": {"total_size": total}, "weight_map": file_of}

    def _identity(self) -> dict[str, Any]:
        """Returns what tells one conversion from another."""
        meta = json.dumps(self.source.meta, sort_keys=True).encode()
        return {
            "moejax": moejax.__version__,
            "checkpoint": hashlib.sha256(meta).hexdigest(),
            "files": [file.name for file in self.files],
            "dtype": self.default_type,
            "family": self.family.model_type,
        }

    def _name(self, array: str) -> str:
        """Returns what the checkpoint calls an array of the model."""
        return f"{self.field_of.get(array, 'router_state')}/{array}"


def _files(pieces: Sequence[Piece], dtype: Any) -> list[File]:
    """Divides pieces into files, named as such files are."""
    groups: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        num_bytes = _num_bytes(piece, dtype)
        has_further_rows = any(tensor.first_row for tensor in piece.tensors)
        if groups[-1] and size + num_bytes > FILE_BYTES and not has_further_rows:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += num_bytes
    if len(groups) == 1:
        return [File(SINGLE, groups[0])]
    total = len(groups)
    names = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    return [File(name, group) for name, group in zip(names, groups, strict=True)]


def _num_bytes(piece: Piece, dtype: Any) -> int:
    """Returns the size of a piece's tensors."""
    sizes = [int(np.prod(shape)) * dtype(name).itemsize for name, shape in piece.shapes().items()]
    return sum(sizes)


def _as_type(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor in another type; raises `HfError` if that cannot hold its values."""
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        typed = tensor.astype(dtype)
    if not np.isfinite(typed).all():
        raise HfError(
            f"{name} has values beyond {dtype}; write it with --dtype=float32 or bfloat16"
        )
    return typed
