"""Checkpoints through orbax: asynchronous, complete or absent, restored strictly.

A checkpoint holds these items: `model` (parameters and router state), `optimizer` (moments and
counters), `meta` (what it says about itself, see `checkpoint_meta`) and, if it was evaluated,
`metrics` (its validation loss). Inference restores `model` alone. A restore compares the manifest
with what the program expects first: every array, shape and dtype must agree, for orbax itself would
fill in or cast. Then it compares a digest of every array with that of what was in memory when it
was saved, for orbax does not check the bytes that it reads.
"""

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moejax.config import Config, ConfigError, resolve_recorded, to_dict
from moejax.locks import check_held
from moejax.training.checkpoints.digests import digest_arrays
from moejax.training.checkpoints.failed_reads import quiet_reads
from moejax.training.checkpoints.meta import (
    CheckpointError,
    DamageError,
    add_metrics,
    check_saved,
    compare_digests,
    compare_manifests,
    manifest,
    named_arrays,
    read_meta,
    saved_steps,
    seal,
    tokenizer_digests,
)
from moejax.training.multihost.processes import is_first, wait_for_all
from moejax.training.run_directory.layout import first_change
from moejax.training.state import TrainSetup, TrainState

MODEL_FIELDS = ("params", "router_state")
NO_RIGHTS = ("PERMISSION_DENIED", "EACCES", "EPERM")  # in what tensorstore says

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
        self._unchecked: int | None = None  # a step that is being saved
        policies = ocp.checkpoint_managers
        keep = setup.config.train.keep_checkpoints
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["eval/loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = (
            None if read_only else policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        )
        try:
            # In reading, orbax warns that it will not write.
            with _from_level("absl", logging.ERROR if read_only else logging.NOTSET):
                options = ocp.CheckpointManagerOptions(
                    create=not read_only, read_only=read_only, preservation_policy=policy
                )
                self._manager = ocp.CheckpointManager(
                    self.folder, options=options, item_names=("model", "optimizer", "meta")
                )
        except Exception as error:  # orbax raises many kinds for missing and damaged files
            for step in saved_steps(self.workdir):
                self._read_meta(step)
            raise CheckpointError(
                f"{self.folder} cannot be opened ({_reason(error)}); {_rights_or_copy(error)}"
            ) from error

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts to save in the background, after the previous save has finished and was found to be good.

        Args:
          state: the state; may be donated to the next step as soon as this returns.
          metrics: `eval/loss` of this state, if it was evaluated.
          notes: JSON that a continued run needs besides, see `notes`.

        Returns:
          False if this step is saved already.

        Raises:
          CheckpointError: the save before failed, or a later step is saved: see `drop_after`.
          LockedError: another process has taken over the run directory.
        """
        check_held(self.workdir)
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self.wait()
        model, optimizer = _split(named_arrays(state))
        meta = {
            "step": step,
            "manifest": manifest(state),
            "digests": digest_arrays(named_arrays(state)),
            "config": to_dict(self.setup.config),
            "tokenizer": tokenizer_digests(self.workdir),
            "metrics": dict(metrics) if metrics else None,
            "notes": dict(notes or {}),
        }
        items = {
            "model": ocp.args.StandardSave(model),
            "optimizer": ocp.args.StandardSave(optimizer),
            "meta": ocp.args.JsonSave(seal(meta)),
        }
        if metrics:
            # Orbax, which reads this item when it opens the folder, writes it by itself only where
            # it has a `best_fn`.
            items["metrics"] = ocp.args.JsonSave(dict(metrics))
        is_begun = self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=dict(metrics) if metrics else None
        )
        if not is_begun:
            raise CheckpointError(
                f"{self.folder} holds step {self.steps()[-1]}: step {step} cannot be saved before it; remove the later "
                "steps, or go on from the newest"
            )
        self._unchecked = step
        return True

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the evaluation of a step that was saved before it was evaluated; of several processes all must ask.

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
        """Removes later steps, of a run that goes on from this one."""
        for later in self.steps():
            if later > step:
                log.info("%s/%d is removed: the run goes on from step %d", self.folder, later, step)
                self._manager.delete(later)

    def restore(self, step: int | None = None) -> TrainState | None:
        """The state of a step, or of the newest complete one; None if there is none.

        Raises:
          CheckpointError: the step does not exist, is damaged, or differs from what the
            configuration describes.
        """
        step = self._choose(step)
        if step is None:
            return None
        arrays = self._read(step, ("model", "optimizer"))
        return jax.tree.unflatten(jax.tree.structure(self.setup.abstract), arrays.values())

    def notes(self, step: int) -> dict[str, Any]:
        """What was noted with a step."""
        notes = self._read_meta(step).get("notes")
        return notes if isinstance(notes, dict) else {}

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
        """Returns when what was saved is on disk and was looked at.

        Raises:
          CheckpointError: saving failed, or what it left cannot be read.
        """
        step, self._unchecked = self._unchecked, None
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except (
            Exception
        ) as error:  # orbax passes on whatever the writing thread met: a full disk, lost rights
            raise CheckpointError(
                f"saving to {self.folder} failed ({_reason(error)}); "
                "the steps saved before are whole: make room or rights, and run the command again"
            ) from error
        if step is not None and is_first():
            self._check_saved(step)

    def check_listing(self) -> None:
        """Raises `CheckpointError` if there is the folder of a step that does not count: it must not be passed over."""
        for step in saved_steps(self.workdir):
            if step not in self.steps():
                raise self._unreadable(step, DamageError("it is not a whole checkpoint"))

    def _check_saved(self, step: int) -> None:
        model, optimizer = _split(named_arrays(self.setup.abstract))
        try:
            check_saved(self.folder / str(step), {"model": set(model), "optimizer": set(optimizer)})
        except Exception as error:  # tensorstore raises many kinds
            raise CheckpointError(
                f"{self.folder / str(step)} was saved and cannot be read ({_reason(error)}); the run stops here: "
                "look at the file system, and begin again in another --workdir"
            ) from error

    def _choose(self, step: int | None) -> int | None:
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}; it holds {steps}")
        if step is not None:
            return step
        self.check_listing()
        return steps[-1] if steps else None

    def _read(self, step: int, items: tuple[str, ...]) -> dict[str, jax.Array]:
        """Reads and verifies items of a step; arrays come in the order of the state's leaves."""
        folder = self.folder / str(step)
        parts = dict(zip(("model", "optimizer"), _split(_abstract_arrays(self.setup)), strict=True))
        args = {item: ocp.args.StandardRestore(parts[item]) for item in items}
        try:
            with quiet_reads():
                meta = read_meta(folder)
                compare_manifests(meta["manifest"], manifest(self.setup.abstract), folder)
                self._compare_config(meta["config"], folder)
                self._compare_tokenizer(meta["tokenizer"], folder)
                restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            found = {name: value for item in items for name, value in restored[item].items()}
            if "digests" in meta:
                compare_digests(meta["digests"], digest_arrays(found))
            else:
                log.warning(
                    "%s was saved without digests by an earlier version: its arrays were not verified",
                    folder,
                )
            if "step" in found and int(found["step"]) != step:
                raise DamageError(
                    f"it holds step {int(found['step'])}: the folder was renamed or copied"
                )
        except CheckpointError:
            raise
        except Exception as error:  # orbax raises many kinds for missing and damaged files
            raise self._unreadable(step, error) from error
        return {name: found[name] for name in named_arrays(self.setup.abstract) if name in found}

    def config(self, step: int) -> Config:
        """The configuration that a step was saved with."""
        return resolve_recorded(self._read_meta(step)["config"])

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            return read_meta(self.folder / str(step))
        except (DamageError, OSError) as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> CheckpointError:
        """What to say of a step that cannot be restored; only what was proven is called damage."""
        folder = self.folder / str(step)
        if _lacks_rights(error):
            return CheckpointError(
                f"{folder} cannot be read ({_reason(error)}); {_rights_or_copy(error)}"
            )
        state = "is damaged" if isinstance(error, DamageError) else "cannot be read"
        names = [name for name in named_arrays(self.setup.abstract) if name in str(error)]
        place = "" if isinstance(error, DamageError) or not names else f" at {max(names, key=len)}"
        older = [other for other in saved_steps(self.workdir) if other < step]
        if older:
            move = shlex.join(["mv", str(folder), str(self.workdir / f"damaged-{step}")])
            remedy = f"restore it from a copy, or go on from step {older[-1]} after: {move}"
        else:
            remedy = "restore it from a copy; no older step is saved"
        return CheckpointError(f"{folder} {state}{place} ({_reason(error)}); {remedy}")

    def _compare_config(self, saved: Mapping[str, Any], folder: Path) -> None:
        """The configuration in the checkpoint is the one that trained it, whatever became of `config.json`."""
        try:
            change = first_change(resolve_recorded(saved), self.setup.config)
        except ConfigError as error:
            raise CheckpointError(
                f"{folder} was saved with a configuration that cannot be used: {error}"
            ) from error
        if change:
            raise CheckpointError(
                f"{folder} was trained with {change.key}={change.saved}, not {change.wanted}; restore config.json, "
                f"give --config.{change.key}={change.saved}, or use another --workdir"
            )

    def _compare_tokenizer(self, saved: Mapping[str, str], folder: Path) -> None:
        if saved != tokenizer_digests(self.workdir):
            raise CheckpointError(
                f"{folder} was saved with another tokenizer than {self.workdir}/tokenizer.*; restore those files, or "
                "start a new run in another --workdir"
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


def _reason(error: BaseException) -> str:
    """The first line of what the first error of a chain says, without what libraries add for their developers."""
    while error.__cause__ is not None and not isinstance(error, DamageError):
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.split(r" \[source locations=| \[tensorstore_spec|\. See full TensorStore", text)[0][
        :300
    ]


def _lacks_rights(error: BaseException) -> bool:
    """Whether it is the file system that refuses."""
    return isinstance(error, PermissionError) or any(word in str(error) for word in NO_RIGHTS)


def _rights_or_copy(error: BaseException) -> str:
    if _lacks_rights(error):
        return f"give this user (id {os.getuid()}) the right to read and write it"
    return "restore it from a copy, or use another --workdir"


def _abstract_arrays(setup: TrainSetup) -> dict[str, jax.ShapeDtypeStruct]:
    shardings = named_arrays(setup.shardings)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in named_arrays(setup.abstract).items()
    }


def _split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, optimizer) arrays."""
    prefixes = tuple(f"{field}/" for field in MODEL_FIELDS)
    model = {name: x for name, x in arrays.items() if name.startswith(prefixes)}
    return model, {name: x for name, x in arrays.items() if name not in model}
