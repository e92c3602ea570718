"""Checkpoints through orbax: asynchronous, complete or absent, restored strictly.

A checkpoint holds these items: `model` (parameters and router state), `optimizer` (moments and counters), `meta` (a
manifest of every array's path, shape and dtype, the configuration, and digests of the tokenizer's files) and, if it was
evaluated, `metrics` (its validation loss). Inference
restores `model` alone. A restore compares the manifest with what the program expects first: every array, shape and
dtype must agree, for orbax itself would fill in or cast.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moejax.config import to_dict
from moejax.training.state import Trainable, TrainState

MODEL_FIELDS = ("params", "router_state")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the folder, the array and the remedy."""


class Checkpoints:
    """The checkpoints of a run directory: the newest `keep` and the best by validation loss.

    Args:
      workdir: the run directory; steps go to `workdir/checkpoints/<step>/`.
      trainable: says which arrays there are and where they live.
      read_only: never write or delete, for looking at a run.
    """

    def __init__(self, workdir: str | Path, trainable: Trainable, *, read_only: bool = False):
        self.workdir = Path(workdir).resolve()
        self.trainable = trainable
        self.folder = self.workdir / "checkpoints"
        self._notes: dict[int, dict[str, Any]] = {}
        policies = ocp.checkpoint_managers
        keep = trainable.config.train.keep_checkpoints
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["eval/loss"], n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                preservation_policy=None
                if read_only
                else policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            ),
            item_names=("model", "optimizer", "meta"),
        )

    def steps(self) -> list[int]:
        """Complete steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, metrics: Mapping[str, float] | None = None, notes: Mapping[str, Any] | None = None
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
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return False
        self.wait()
        model, optimizer = _split(_named_arrays(state))
        meta = {
            "manifest": manifest(state),
            "config": to_dict(self.trainable.config),
            "tokenizer": tokenizer_digests(self.workdir),
            "notes": dict(notes or {}),
        }
        items = {
            "model": ocp.args.StandardSave(model),
            "optimizer": ocp.args.StandardSave(optimizer),
            "meta": ocp.args.JsonSave(meta),
        }
        if metrics:
            # Orbax, which reads this item when it opens the folder, writes it by itself only where it has a `best_fn`.
            items["metrics"] = ocp.args.JsonSave(dict(metrics))
        is_begun = self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=dict(metrics) if metrics else None
        )
        if not is_begun:
            raise CheckpointError(
                f"{self.folder} holds step {self.steps()[-1]}: step {step} cannot be saved before it; remove the later "
                "steps, or go on from the newest"
            )
        return True

    def drop_after(self, step: int) -> None:
        """Removes later steps, of a run that goes on from this one."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def restore(self, step: int | None = None) -> TrainState | None:
        """The state of a step, or of the newest complete one; None if there is none.

        Raises:
          CheckpointError: the step does not exist, is damaged, or differs from what the configuration describes.
        """
        step = self._choose(step)
        if step is None:
            return None
        arrays = self._read(step, ("model", "optimizer"))
        return jax.tree.unflatten(jax.tree.structure(self.trainable.abstract), arrays.values())

    def notes(self, step: int) -> dict[str, Any]:
        """What was noted with a step; of several processes one alone can ask once it was restored."""
        if step not in self._notes:
            self._notes[step] = self._read_meta(step).get("notes", {})
        return self._notes[step]

    def restore_model(self, step: int | None = None) -> tuple[int, Any, Any]:
        """Returns (step, params, router_state) without reading the optimizer's arrays.

        Raises:
          CheckpointError: there is no such step, it is damaged, or it differs from what the configuration describes.
        """
        step = self._choose(step)
        if step is None:
            raise CheckpointError(f"{self.folder} holds no complete checkpoint; train the run first")
        arrays = self._read(step, ("model",))
        trees = []
        for field in MODEL_FIELDS:
            abstract = getattr(self.trainable.abstract, field)
            leaves = [value for name, value in arrays.items() if name.startswith(f"{field}/")]
            trees.append(jax.tree.unflatten(jax.tree.structure(abstract), leaves))
        return step, trees[0], trees[1]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        # One of several processes that failed must not wait for a save in which the others may no longer take part.
        if error is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Waits for the last save; raises `CheckpointError` if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises `CheckpointError` if saving failed."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # orbax passes on whatever the writing thread met: a full disk, lost rights
            raise CheckpointError(
                f"saving to {self.folder} failed ({(str(error) or type(error).__name__).splitlines()[0]}); "
                "the steps saved before are whole: make room or rights, and run the command again"
            ) from error

    def _choose(self, step: int | None) -> int | None:
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no step {step}; it holds {steps}")
        return step if step is not None else (steps[-1] if steps else None)

    def _read(self, step: int, items: tuple[str, ...]) -> dict[str, jax.Array]:
        """Reads items of a step after comparing the whole manifest; arrays come in the order of the state's leaves."""
        folder = self.folder / str(step)
        remedy = f"remove {folder} to continue from an older one"
        try:
            meta = self._read_meta(step)
            self._notes[step] = meta.get("notes", {})
            compare_manifests(meta["manifest"], manifest(self.trainable.abstract), folder)
            self._compare_tokenizer(meta["tokenizer"], folder)
            parts = dict(zip(("model", "optimizer"), _split(_abstract_arrays(self.trainable)), strict=True))
            args = {item: ocp.args.StandardRestore(parts[item]) for item in items}
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except CheckpointError:
            raise
        except Exception as error:  # orbax raises many kinds for missing and damaged files
            raise CheckpointError(
                f"{folder} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); {remedy}"
            ) from error
        arrays = {name: value for item in items for name, value in restored[item].items()}
        return {name: arrays[name] for name in _named_arrays(self.trainable.abstract) if name in arrays}

    def _read_meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def _compare_tokenizer(self, saved: Mapping[str, str], folder: Path) -> None:
        if saved != tokenizer_digests(self.workdir):
            raise CheckpointError(
                f"{folder} was saved with another tokenizer than {self.workdir}/tokenizer.*; restore those files, or "
                "start a new run in another --workdir"
            )


def manifest(state: TrainState) -> dict[str, dict[str, Any]]:
    """Path, shape and dtype of every array."""
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in _named_arrays(state).items()
    }


def compare_manifests(saved: Mapping[str, Any], expected: Mapping[str, Any], folder: str | Path) -> None:
    """Raises `CheckpointError` naming the first array that is missing, unknown, or of another shape or dtype."""
    for name in (*expected, *saved):
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"{folder}: {name} is {_describe(saved.get(name))} in the checkpoint but "
                f"{_describe(expected.get(name))} in the model; use the configuration of the run, or another --workdir"
            )


def tokenizer_digests(workdir: str | Path) -> dict[str, str]:
    """SHA-256 of the tokenizer's files in a run directory."""
    paths = [Path(workdir) / name for name in TOKENIZER_FILES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.exists()}


def _describe(entry: Mapping[str, Any] | None) -> str:
    return "absent" if entry is None else f"{entry['dtype']}{entry['shape']}"


def _named_arrays(state: TrainState) -> dict[str, Any]:
    """Arrays by path, in the order of the tree's leaves: `params/stacks/0/block/attention/key`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): x for path, x in leaves}


def _abstract_arrays(trainable: Trainable) -> dict[str, jax.ShapeDtypeStruct]:
    shardings = _named_arrays(trainable.shardings)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in _named_arrays(trainable.abstract).items()
    }


def _split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, optimizer) arrays."""
    prefixes = tuple(f"{field}/" for field in MODEL_FIELDS)
    model = {name: x for name, x in arrays.items() if name.startswith(prefixes)}
    return model, {name: x for name, x in arrays.items() if name not in model}
