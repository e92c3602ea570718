"""A released model as a run directory, from which training, evaluation and generation go on.

Weights go piece by piece from safetensors files into a checkpoint of step 0. What is under way is
in `converting/` of the run directory, which has no `config.json` before the end.
"""

import dataclasses
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import moejax
from moejax.config import to_dict
from moejax.data import Tokenizer
from moejax.interop.hf.conversion.journal import Journal
from moejax.interop.hf.conversion.texts import SOURCE_FOLDER, keep_texts, released_tokenizer
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.files.quantized import Source
from moejax.interop.hf.load import Checkpoint, empty_model, open_checkpoint
from moejax.interop.hf.pieces import PIECE_BYTES, Piece, filled_arrays, pieces_of
from moejax.interop.hf.places import Arrays, named_arrays, shapes_of
from moejax.locks import FolderLock
from moejax.models.parameters import count_parameters
from moejax.training.checkpoints.digests import digest_of, sums_of_region
from moejax.training.checkpoints.meta import TOKENIZER_FILES, tokenizer_digests
from moejax.training.checkpoints.streamed import Layout, StreamedCheckpoint, make_skeleton
from moejax.training.run_directory.layout import CONVERTING, write_run_directory

COMPLETE = "complete"
"""A file there: everything is written, and is being moved to its place."""

BATCH_BYTES = 2**28
"""What is written before it is noted as done, in bytes of float32."""

LOG_EVERY_S = 10.0

log = logging.getLogger("moejax")


def convert_to_run(folder: str | Path, workdir: Path, *, command: str = "") -> Checkpoint:
    """Converts a folder in the Hugging Face layout to a run directory.

    A conversion that was interrupted goes on where it stopped; nothing else may be in `workdir`.

    Args:
      folder: with `config.json` and safetensors files.
      workdir: the run directory, which is made.
      command: recorded in its `config.json`.

    Returns:
      What was converted.

    Raises:
      HfError: a folder that holds something else than such a model, or a run directory that holds
        something.
      LockedError: another process writes there.
    """
    checkpoint = open_checkpoint(folder)
    _, params, others = empty_model(checkpoint.config)
    sources = checkpoint.claim(named_arrays(params), named_arrays(others))
    config, tokenizer = released_tokenizer(checkpoint.config, checkpoint.folder)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    check_empty(workdir, "--workdir")
    with FolderLock(workdir, "convert"):
        conversion = _Conversion(checkpoint, tokenizer, workdir, sources, _of_state(params, others))
        try:
            conversion.run()
        except HfError:  # it would fail again
            shutil.rmtree(workdir / CONVERTING)
            raise
        conversion.finish(command)
    return checkpoint


def check_empty(folder: Path, name: str) -> None:
    """Raises `HfError` if a folder holds more than an interrupted conversion.

    Args:
      folder: a path at which nothing needs to be.
      name: the flag that gave it.
    """
    if folder.exists() and not folder.is_dir():
        raise HfError(f"{name}={folder} is a file; name a new folder")
    is_finishing = (folder / CONVERTING / COMPLETE).exists()
    found = {path.name for path in folder.glob("*") if not path.name.startswith(".")}
    others = sorted(found - {CONVERTING})
    if others and not is_finishing:
        raise HfError(f"{name}={folder} holds {others[0]}; name a new folder")


def move_all(staging: Path, folder: Path, names: Iterable[str]) -> None:
    """Moves files and folders to their place, those that were not moved yet."""
    for name in names:
        if (staging / name).exists():
            os.replace(staging / name, folder / name)


def _of_state(params: Any, others: Any) -> tuple[Arrays, Arrays]:
    """Returns parameters and what else a model carries, by path."""
    return named_arrays(params), named_arrays(others)


class _Conversion:
    """A conversion under way.

    Args:
      checkpoint: what is converted.
      tokenizer: of the model.
      workdir: the run directory, which this process has locked.
      sources: its tensors by name.
      arrays: parameters, and what else the model carries, by path.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        workdir: Path,
        sources: Mapping[str, Source],
        arrays: tuple[Arrays, Arrays],
    ):
        params, others = arrays
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.workdir = workdir
        self.staging = workdir / CONVERTING
        self.sources = sources
        self.field_of = dict.fromkeys(params, "params") | dict.fromkeys(others, "router_state")
        self.dtypes = {name: array.dtype for name, array in (params | others).items()}
        self.shapes = shapes_of(params | others)
        config, family = checkpoint.config, checkpoint.family
        self.pieces = list(pieces_of(config, family, self.shapes, PIECE_BYTES))
        filled = filled_arrays(config, family, self.shapes)
        self.given = {name: array for name, array in others.items() if name not in filled}
        self.sums: dict[str, np.ndarray] = {}

    def run(self) -> None:
        """Writes all pieces that are not written yet."""
        self.staging.mkdir(exist_ok=True)
        journal = self._open_journal()
        if (self.staging / COMPLETE).exists():
            return
        stored = StreamedCheckpoint(self.staging / "checkpoints" / "0")
        for number, sums in journal.done.items():
            self._add(self.pieces[number].array, np.array(sums, np.uint32))
        total = sum(_num_bytes(piece) for piece in self.pieces)
        progress = Progress(total)
        left = [number for number in range(len(self.pieces)) if number not in journal.done]
        progress.add(total - sum(_num_bytes(self.pieces[number]) for number in left))

        def convert(number: int) -> np.ndarray:
            return self._convert(self.pieces[number], stored)

        with ThreadPoolExecutor(num_threads()) as pool:
            for batch in self._batches(left):
                sums = list(pool.map(convert, batch))
                stored.sync()
                journal.add((n, each.tolist()) for n, each in zip(batch, sums, strict=True))
                for number, each in zip(batch, sums, strict=True):
                    self._add(self.pieces[number].array, each)
                progress.add(sum(_num_bytes(self.pieces[number]) for number in batch))
        journal.close()
        for name, array in self.given.items():
            stored.write(self._name(name), (), array)
            self._add(name, sums_of_region((), array.shape, array))
        self._write_meta(stored)
        (self.staging / COMPLETE).touch()

    def finish(self, command: str) -> None:
        """Moves what was written to its place; `config.json`, which makes it a run, comes last."""
        move_all(self.staging, self.workdir, ("checkpoints", SOURCE_FOLDER, *TOKENIZER_FILES))
        config = self.checkpoint.config
        write_run_directory(self.workdir, config, count_parameters(config), None, command)
        shutil.rmtree(self.staging)

    def _open_journal(self) -> Journal:
        """Returns the journal; begins again where it is of another conversion."""
        journal = Journal(self.staging / "journal.jsonl", self._identity())
        if not journal.done:
            (self.staging / COMPLETE).unlink(missing_ok=True)
            for name in ("checkpoints", SOURCE_FOLDER):
                shutil.rmtree(self.staging / name, ignore_errors=True)
            keep_texts(self.checkpoint, self.staging / SOURCE_FOLDER)
            self.tokenizer.save(self.staging)
            make_skeleton(self.staging / "checkpoints", 0, self._layouts())
        else:
            log.info("going on after %d of %d pieces", len(journal.done), len(self.pieces))
        return journal

    def _identity(self) -> dict[str, Any]:
        """Returns what tells one conversion from another."""
        folder = self.checkpoint.folder
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            stat = path.stat()
            files[path.name] = [stat.st_size, stat.st_mtime_ns]
        config = (folder / "config.json").read_bytes()
        return {
            "moejax": moejax.__version__,
            "config": hashlib.sha256(config).hexdigest(),
            "files": files,
            "pieces": len(self.pieces),
        }

    def _layouts(self) -> dict[str, Layout]:
        """Returns how each array is stored: regions that are written together in one chunk."""
        layouts = {}
        for piece in self.pieces:
            shape = self.shapes[piece.array]
            # The first piece of an array is no smaller than the others.
            if self._name(piece.array) not in layouts:
                chunk = (1,) * (len(shape) - len(piece.shape)) + piece.shape
                dtype = self.dtypes[piece.array]
                layouts[self._name(piece.array)] = Layout(shape, dtype, chunk)
        for name, array in self.given.items():
            layouts[self._name(name)] = Layout(array.shape, array.dtype, array.shape)
        return layouts

    def _convert(self, piece: Piece, stored: StreamedCheckpoint) -> np.ndarray:
        """Writes a piece; returns what it contributes to the digest of its array."""
        values = piece.to_ours(self.sources, self.dtypes[piece.array])
        stored.write(self._name(piece.array), piece.place, values)
        return sums_of_region(piece.place, self.shapes[piece.array], values)

    def _write_meta(self, stored: StreamedCheckpoint) -> None:
        manifest = {}
        for name, shape in self.shapes.items():
            manifest[self._name(name)] = {"shape": list(shape), "dtype": str(self.dtypes[name])}
        meta = {
            "step": 0,
            "manifest": manifest,
            "digests": {self._name(name): digest_of(sums) for name, sums in self.sums.items()},
            "config": to_dict(self.checkpoint.config),
            "tokenizer": tokenizer_digests(self.staging),
            "metrics": None,
            "notes": {},
        }
        stored.finish(meta)

    def _add(self, array: str, sums: np.ndarray) -> None:
        """Adds what a region contributes to a digest, modulo 2^32."""
        self.sums[array] = self.sums.get(array, np.zeros(2, np.uint32)) + sums

    def _name(self, array: str) -> str:
        """Returns what the checkpoint calls an array of the model."""
        return f"{self.field_of[array]}/{array}"

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yields numbers of pieces that are written before they are noted."""
        batch: list[int] = []
        size = 0
        for number in numbers:
            batch.append(number)
            size += _num_bytes(self.pieces[number])
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _num_bytes(piece: Piece) -> int:
    """Returns the size of a piece, in bytes of float32."""
    return 4 * int(np.prod(piece.shape))


def num_threads() -> int:
    """Returns how many pieces or files are converted at once; each takes memory."""
    return min(2, os.cpu_count() or 1)


class Progress:
    """Logs how far a conversion is, at most every `LOG_EVERY_S` seconds.

    Args:
      total: bytes to convert.
    """

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Notes that so much more is done."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("%.1f of %.1f GB", self._done / 1e9, self._total / 1e9)
