"""Checkpoints through orbax: asynchronous, complete or absent, restored strictly.

A checkpoint holds these items: `model` (parameters and router state), `optimizer` (moments and
counters), `meta` (a document about the checkpoint, see `meta`) and, if it was evaluated, `metrics`
(its validation loss). Inference restores `model` alone. A restore first compares the manifest with
what the program expects: every array, shape and dtype must agree, for orbax itself would fill in or
cast. Then it compares a digest of every array with the one of what was in memory when it was saved,
for orbax does not check the bytes that it reads.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moejax.config import Config, ConfigError, resolve_recorded, to_dict
from moejax.locks import check_held
from moejax.training.checkpoints.digests import digest_arrays
from moejax.training.checkpoints.failed_reads import quiet_reads
from moejax.training.checkpoints.messages import reason_of, rights_or_copy, unreadable
from moejax.training.checkpoints.meta import (
    MODEL_FIELDS,
    NOT_VERIFIED,
    CheckpointError,
    DamageError,
    add_metrics,
    check_saved,
    compare_digests,
    compare_manifests,
    has_optimizer,
    manifest,
    named_arrays,
    read_meta,
    read_notes,
    saved_steps,
    seal,
    split_items,
    tokenizer_digests,
)
from moejax.training.multihost.processes import is_first, wait_for_all
from moejax.training.run_directory.changes import first_change
from moejax.training.state import TrainSetup, TrainState

log = logging.getLogger("moejax")


class Checkpoints:
    """The checkpoints of a run directory: the newest `keep` and the best by validation loss.

    Args:
      workdir: the run directory; steps go to `workdir/checkpoints/<step>/`.
      setup: says which arrays there are and where they live.
      read_only: never write or delete, for looking at a run.
    """

    def __init__(self, workdir: str | Path, setup: TrainSetup, *, read_only: bool = False):
        self.workdir = Path(workdir).resolve()
        self.setup = setup
        self.folder = self.workdir / "checkpoints"
        self._unchecked_step: int | None = None  # it is being saved
        try:
            self._manager = self._open(read_only)
        except Exception as error:  # orbax raises many kinds for missing and damaged files
            for step in saved_steps(self.workdir):
                self._read_meta(step)  # which may say better what is wrong
            raise CheckpointError(
                f"{self.folder} cannot be opened ({reason_of(error)}); {rights_or_copy(error)}"
            ) from error

    def _open(self, read_only: bool) -> ocp.CheckpointManager:
        """Opens orbax's manager of the folder."""
        policies = ocp.checkpoint_managers
        policy = None
        if not read_only:
            newest = policies.LatestN(self.setup.config.train.keep_checkpoints)
            best = policies.BestN(
                get_metric_fn=lambda metrics: -metrics["eval/loss"],
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            policy = policies.AnyPreservationPolicy([newest, best])
        # For reading, orbax warns that it will not write.
        level = logging.ERROR if read_only else logging.NOTSET
        with _from_level("absl", level):
            options = ocp.CheckpointManagerOptions(
                create=not read_only, read_only=read_only, preservation_policy=policy
            )
            item_names = ("model", "optimizer", "meta")
            return ocp.CheckpointManager(self.folder, options=options, item_names=item_names)

    def steps(self) -> list[int]:
        """Returns the complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts to save in the background, once the previous save has finished and was checked.

        Args:
          state: the state; may be donated to the next step as soon as this returns.
          metrics: `eval/loss` of this state, if it was evaluated.
          notes: JSON that a continued run needs as well, see `notes`.

        Returns:
          False if this step is saved already.

        Raises:
          CheckpointError: the previous save failed, or a later step is saved: see `drop_after`.
          LockedError: another process has taken over the run directory.
        """
        check_held(self.workdir)
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self.wait()
        own_metrics = dict(metrics) if metrics else None
        if not self._start_save(state, own_metrics, dict(notes or {})):
            raise CheckpointError(
                f"{self.folder} holds step {self.steps()[-1]}: step {step} cannot be saved before "
                "it; remove the later steps, or go on from the newest"
            )
        self._unchecked_step = step
        return True

    def _start_save(
        self, state: TrainState, metrics: dict[str, float] | None, notes: dict[str, Any]
    ) -> bool:
        """Hands the items of a checkpoint to orbax; returns whether it began to save them."""
        arrays = named_arrays(state)
        model, optimizer = split_items(arrays)
        meta = {
            "step": int(state.step),
            "manifest": manifest(state),
            "digests": digest_arrays(arrays),
            "config": to_dict(self.setup.config),
            "tokenizer": tokenizer_digests(self.workdir),
            "metrics": metrics,
            "notes": notes,
        }
        items = {
            "model": ocp.args.StandardSave(model),
            "optimizer": ocp.args.StandardSave(optimizer),
            "meta": ocp.args.JsonSave(seal(meta)),
        }
        if metrics:
            # Orbax, which reads this item when it opens the folder, writes it by itself only where
            # it has a `best_fn`.
            items["metrics"] = ocp.args.JsonSave(metrics)
        composite = ocp.args.Composite(**items)
        return self._manager.save(int(state.step), args=composite, metrics=metrics)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the evaluation of a step that was saved before it was evaluated.

        Every process must call this.

        Raises:
          CheckpointError: the step is damaged, or cannot be written.
        """
        self.wait()
        if is_first():
            check_held(self.workdir)
            try:
                add_metrics(self.folder / str(step), metrics)
            except (DamageError, OSError) as error:
                raise self._unreadable(step, error) from error
        wait_for_all()
        self._manager.reload()

    def drop_after(self, step: int) -> None:
        """Removes the later steps of a run that goes on from this one."""
        for later in self.steps():
            if later > step:
                log.info("%s/%d is removed: the run goes on from step %d", self.folder, later, step)
                self._manager.delete(later)

    def restore(self, step: int | None = None) -> TrainState | None:
        """Returns the state of a step, or of the newest complete one; None if there is none.

        A checkpoint of weights alone begins training: its optimizer is a fresh one.

        Raises:
          CheckpointError: the step does not exist, is damaged, or differs from what the
            configuration describes.
        """
        step = self._choose(step)
        if step is None:
            return None
        if not has_optimizer(self._read_meta(step)):
            _, params, router_state = self.restore_model(step)
            return self.setup.begin(params, router_state)
        arrays = self._read(step, ("model", "optimizer"))
        structure = jax.tree.structure(self.setup.abstract)
        return jax.tree.unflatten(structure, arrays.values())

    def notes(self, step: int) -> dict[str, Any]:
        """Returns what was noted with a step."""
        return read_notes(self._read_meta(step))

    def restore_model(self, step: int | None = None) -> tuple[int, Any, Any]:
        """Returns (step, params, router_state) without reading the optimizer's arrays.

        Raises:
          CheckpointError: there is no such step, it is damaged, or it differs from what the
            configuration describes.
        """
        step = self._choose(step)
        if step is None:
            raise CheckpointError(
                f"{self.folder} holds no complete checkpoint; train the run first"
            )
        arrays = self._read(step, ("model",))
        trees = []
        for field in MODEL_FIELDS:
            abstract = getattr(self.setup.abstract, field)
            leaves = [value for name, value in arrays.items() if name.startswith(f"{field}/")]
            trees.append(jax.tree.unflatten(jax.tree.structure(abstract), leaves))
        return step, trees[0], trees[1]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        # One of several processes that failed must not wait for a save in which the others may no
        # longer take part.
        if error is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for the last save; raises `CheckpointError` if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Returns when what was saved is on disk and was checked.

        Raises:
          CheckpointError: saving failed, or what it left cannot be read.
        """
        step = self._unchecked_step
        self._unchecked_step = None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        # Orbax passes on whatever the writing thread met: a full disk, lost rights.
        except Exception as error:
            raise CheckpointError(
                f"saving to {self.folder} failed ({reason_of(error)}); the steps saved before are "
                "intact: make room or rights, and run the command again"
            ) from error
        if step is not None and is_first():
            self._check_saved(step)

    def check_listing(self) -> None:
        """Raises `CheckpointError` if the folder of a step is no checkpoint to orbax.

        A run must not pass over it without a message.
        """
        for step in saved_steps(self.workdir):
            if step not in self.steps():
                raise self._unreadable(step, DamageError("it is not a complete checkpoint"))

    def _check_saved(self, step: int) -> None:
        model, optimizer = split_items(named_arrays(self.setup.abstract))
        try:
            check_saved(self.folder / str(step), {"model": set(model), "optimizer": set(optimizer)})
        except Exception as error:  # tensorstore raises many kinds
            raise CheckpointError(
                f"{self.folder / str(step)} was saved and cannot be read ({reason_of(error)}); the "
                "run stops here: look at the file system, and begin again in another --workdir"
            ) from error

    def _choose(self, step: int | None) -> int | None:
        """Returns the step to read: the one asked for, or the newest; None if there is none."""
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}; it holds {steps}")
        if step is not None:
            return step
        self.check_listing()
        return steps[-1] if steps else None

    def _read(self, step: int, items: tuple[str, ...]) -> dict[str, jax.Array]:
        """Reads and verifies items of a step; arrays come in the order of the state's leaves."""
        try:
            arrays = self._read_verified(step, items)
        except CheckpointError:
            raise
        except Exception as error:  # orbax raises many kinds for missing and damaged files
            raise self._unreadable(step, error) from error
        return {name: arrays[name] for name in named_arrays(self.setup.abstract) if name in arrays}

    def _read_verified(self, step: int, items: tuple[str, ...]) -> dict[str, jax.Array]:
        """Reads items of a step, and compares them with what was written and what is expected."""
        folder = self.folder / str(step)
        model, optimizer = split_items(_abstract_arrays(self.setup))
        expected = {"model": model, "optimizer": optimizer}
        args = {item: ocp.args.StandardRestore(expected[item]) for item in items}
        with quiet_reads():
            meta = read_meta(folder)
            wanted = manifest(self.setup.abstract)
            if not has_optimizer(meta):
                wanted, _ = split_items(wanted)
            compare_manifests(meta["manifest"], wanted, folder)
            self._compare_config(meta, folder)
            self._compare_tokenizer(meta["tokenizer"], folder)
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        arrays: dict[str, jax.Array] = {}
        for item in items:
            arrays |= restored[item]
        if "digests" in meta:
            compare_digests(meta["digests"], digest_arrays(arrays))
        else:
            log.warning(NOT_VERIFIED, folder)
        if "step" in arrays and int(arrays["step"]) != step:
            raise DamageError(
                f"it holds step {int(arrays['step'])}: the folder was renamed or copied"
            )
        return arrays

    def config(self, step: int) -> Config:
        """Returns the configuration that a step was saved with."""
        return resolve_recorded(self._read_meta(step)["config"])

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            return read_meta(self.folder / str(step))
        except (DamageError, OSError) as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        return unreadable(self.workdir, step, error, named_arrays(self.setup.abstract))

    def _compare_config(self, meta: Mapping[str, Any], folder: Path) -> None:
        """Compares the configuration that trained the checkpoint, even if `config.json` changed."""
        try:
            saved = resolve_recorded(meta["config"])
            change = first_change(saved, self.setup.config, has_begun=has_optimizer(meta))
        except ConfigError as error:
            raise CheckpointError(
                f"{folder} was saved with a configuration that cannot be used: {error}"
            ) from error
        if change:
            saved_leaf = f"{change.key}={change.saved}"
            raise CheckpointError(
                f"{folder} was trained with {saved_leaf}, not {change.wanted}; restore "
                f"config.json, give --config.{saved_leaf}, or use another --workdir"
            )

    def _compare_tokenizer(self, saved: Mapping[str, str], folder: Path) -> None:
        if saved != tokenizer_digests(self.workdir):
            raise CheckpointError(
                f"{folder} was saved with another tokenizer than {self.workdir}/tokenizer.*; "
                "restore those files, or start a new run in another --workdir"
            )


@contextlib.contextmanager
def _from_level(name: str, level: int) -> Iterator[None]:
    """Passes on a library's messages from a level on; a level of 0 changes nothing."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)


def _abstract_arrays(setup: TrainSetup) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of every array of a state, by path."""
    shardings = named_arrays(setup.shardings)
    arrays = {}
    for name, array in named_arrays(setup.abstract).items():
        arrays[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name])
    return arrays
