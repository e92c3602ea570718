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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import moejax
from moejax.config import resolve_recorded, to_dict
from moejax.data import Tokenizer
from moejax.interop.hf.conversion.journal import Journal
from moejax.interop.hf.conversion.staging import (
    check_target,
    is_complete,
    mark_complete,
    move_all,
    remove_staging,
)
from moejax.interop.hf.conversion.texts import TEXTS, keep_texts, released_tokenizer
from moejax.interop.hf.errors import ConversionInterruptedError, HfError
from moejax.interop.hf.files.quantized import Source
from moejax.interop.hf.load import Checkpoint, abstract_model, open_checkpoint
from moejax.interop.hf.pieces import PIECE_BYTES, Piece, filled_arrays, pieces_of
from moejax.interop.hf.places import Arrays, named_arrays, shapes_of
from moejax.locks import FolderLock, check_held
from moejax.models.parameters import count_parameters
from moejax.training.checkpoints.digests import digest_of, sums_of_region
from moejax.training.checkpoints.meta import TOKENIZER_FILES, read_meta, tokenizer_digests
from moejax.training.checkpoints.streamed import (
    Layout,
    StoreError,
    StreamedCheckpoint,
    make_skeleton,
)
from moejax.training.run_directory.layout import CONVERTING, RELEASED, write_run_directory

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
    check_target(workdir, checkpoint.folder, "--workdir")
    if not is_complete(workdir):
        _, params, others = abstract_model(checkpoint.config)
        parts = named_arrays(params), named_arrays(others)
        sources = checkpoint.claim(*parts)
    config, tokenizer = released_tokenizer(checkpoint.config, checkpoint.folder)
    checkpoint = dataclasses.replace(checkpoint, config=config)
    with FolderLock(workdir, "convert"):
        # Again, since the process that held the lock until now may have converted something.
        check_target(workdir, checkpoint.folder, "--workdir")
        if not is_complete(workdir):
            _write(_Conversion(checkpoint, tokenizer, workdir, sources, parts))
        _finish(workdir, command)
    return checkpoint


def _write(conversion: "_Conversion") -> None:
    """Writes everything; what cannot be converted leaves nothing."""
    try:
        conversion.run()
    except ConversionInterruptedError:
        raise
    except HfError:  # it would fail again
        shutil.rmtree(conversion.staging)
        raise


def _finish(workdir: Path, command: str) -> None:
    """Moves what was written to its place; `config.json`, which makes it a run, comes last."""
    meta = read_meta(_first_existing(workdir / CONVERTING, workdir) / "checkpoints" / "0")
    config = resolve_recorded(meta["config"])
    tokenizer_files = [name for name in TOKENIZER_FILES if name in meta["tokenizer"]]
    move_all(workdir, ("checkpoints", RELEASED, *tokenizer_files))
    write_run_directory(workdir, config, count_parameters(config), None, command)
    remove_staging(workdir)


def _first_existing(*folders: Path) -> Path:
    """Returns the first folder that has checkpoints."""
    return next(folder for folder in folders if (folder / "checkpoints").exists())


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
        self.progress = Progress(sum(_num_bytes(piece) for piece in self.pieces))

    def run(self) -> None:
        """Writes all pieces that are not written yet."""
        self.staging.mkdir(exist_ok=True)
        journal = Journal(self.staging, self._identity())
        stored = self._open(journal)
        self.progress.add(sum(_num_bytes(self.pieces[number]) for number in journal.done))
        left = [number for number in range(len(self.pieces)) if number not in journal.done]
        with ThreadPoolExecutor(num_threads()) as pool, ThreadPoolExecutor(1) as noting:
            noted = None
            for batch in self._batches(left):
                sums = list(pool.map(lambda number: self._convert(number, stored), batch))
                if noted is not None:
                    noted.result()
                # While the disk is waited for, the next batch is converted.
                noted = noting.submit(self._note, journal, stored, batch, sums)
            if noted is not None:
                noted.result()
        journal.close()
        for number, sums_2 in journal.done.items():
            self._add(self.pieces[number].array, np.array(sums_2, np.uint32))
        for name, array in self.given.items():
            stored.write(self._name(name), (), array)
            self._add(name, sums_of_region((), array.shape, array))
        self._write_meta(stored)
        mark_complete(self.workdir)

    def _note(
        self,
        journal: Journal,
        stored: StreamedCheckpoint,
        batch: Sequence[int],
        sums: Sequence[list[int]],
    ) -> None:
        """Notes that pieces are written, once they are on disk."""
        stored.sync()
        check_held(self.workdir)
        journal.add(zip(batch, sums, strict=True))
        self.progress.add(sum(_num_bytes(self.pieces[number]) for number in batch))

    def _open(self, journal: Journal) -> StreamedCheckpoint:
        """Returns the checkpoint with the pieces of the journal; a new one where they are lost."""
        checkpoint = self.staging / "checkpoints" / "0"
        if journal.done:
            log.info("going on after %d of %d pieces", len(journal.done), len(self.pieces))
            stored = StreamedCheckpoint(checkpoint)
            if self._has_all(journal, stored):
                return stored
            log.warning("%s is not what was written; the conversion begins again", checkpoint)
            journal.done.clear()
        for name in ("checkpoints", RELEASED):
            shutil.rmtree(self.staging / name, ignore_errors=True)
        for name in TOKENIZER_FILES:
            (self.staging / name).unlink(missing_ok=True)
        keep_texts(self.checkpoint, self.staging / RELEASED)
        self.tokenizer.save(self.staging)
        make_skeleton(self.staging / "checkpoints", 0, self._layouts())
        return StreamedCheckpoint(checkpoint)

    def _has_all(self, journal: Journal, stored: StreamedCheckpoint) -> bool:
        """Whether the pieces that are noted as done can be read as they were written."""
        for number, sums in journal.done.items():
            piece = self.pieces[number]
            try:
                values = stored.read(self._name(piece.array), piece.place)
            except StoreError:
                return False
            if sums_of_region(piece.place, self.shapes[piece.array], values).tolist() != sums:
                return False
        return True

    def _identity(self) -> dict[str, Any]:
        """Returns what tells one conversion from another."""
        folder = self.checkpoint.folder
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            stat = path.stat()
            files[path.name] = [stat.st_size, stat.st_mtime_ns]
        texts = {}
        for name in TEXTS:
            path = folder / name
            if path.is_file():
                texts[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return {
            "moejax": moejax.__version__,
            "texts": texts,
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

    def _convert(self, number: int, stored: StreamedCheckpoint) -> list[int]:
        """Writes a piece; returns what it contributes to the digest of its array."""
        piece = self.pieces[number]
        values = piece.to_ours(self.sources, self.dtypes[piece.array])
        try:
            stored.write(self._name(piece.array), piece.place, values)
        except StoreError as error:
            raise ConversionInterruptedError(
                f"{error}; make room, and run the command again to go on"
            ) from error
        return sums_of_region(piece.place, self.shapes[piece.array], values).tolist()

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
