"""The item `meta` of a checkpoint: a JSON document about the checkpoint, with its own digest.

  step       of the training run; the folder's name says the same
  manifest   path, shape and dtype of every array
  digests    of every array, see `digests`
  config     of the run
  tokenizer  SHA-256 of its files
  metrics    the validation loss by which the best checkpoint is chosen, or null
  notes      what else a continued run needs
  digest     of all of this

Checkpoints of earlier versions have none of `step`, `digests`, `metrics` and `digest`.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from moejax.paths import replace_file
from moejax.training.run_directory.line_file import is_as_noted
from moejax.training.run_directory.reader import RunDirectory
from moejax.training.state import TrainState

FILE = "meta/metadata"  # where orbax keeps a JSON item of that name
METRICS_FILE = "metrics/metrics"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
MODEL_FIELDS = ("params", "router_state")
"""What the item `model` holds of a state; the item `optimizer` holds the rest."""

OLD_KEYS = {"manifest", "config", "tokenizer", "notes"}
KEYS = {*OLD_KEYS, "step", "digests", "metrics", "digest"}

NOT_VERIFIED = "%s was saved without digests by an earlier version: its arrays were not verified"
"""A warning, of a folder."""

log = logging.getLogger("moejax")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the folder, the array and the remedy."""


class DamageError(Exception):
    """What is wrong with a checkpoint's files, proven by comparison.

    The caller adds the folder and the remedy.
    """


def seal(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the document with its own digest."""
    return {**meta, "digest": _digest(meta)}


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the `meta` of a checkpoint folder.

    Raises:
      DamageError: it differs from what was written, or the folder is another step's.
      OSError: it cannot be read.
    """
    try:
        meta = json.loads((folder / FILE).read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{FILE} is no JSON document ({str(error)[:80]})") from error
    keys = set(meta) if isinstance(meta, dict) else set()
    if keys in (OLD_KEYS, OLD_KEYS - {"notes"}):
        return meta
    if keys != KEYS:
        raise DamageError(f"{FILE} has the entries {', '.join(sorted(keys)) or 'of no object'}")
    if meta["digest"] != _digest(_without_digest(meta)):
        raise DamageError(f"{FILE} differs from the digest that was saved with it")
    if meta["step"] != int(folder.name):
        raise DamageError(f"it holds step {meta['step']}: the folder was renamed or copied")
    _check_metrics(folder, meta["metrics"])
    return meta


def add_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Adds the evaluation of a checkpoint that was saved before it was evaluated.

    The item of metrics is written first: as long as `meta` does not list it, it is ignored, so that
    a kill between both writes leaves no damage.

    Raises:
      DamageError: `meta` differs from what was written.
      OSError: it cannot be read or written.
    """
    meta = read_meta(folder)
    if "digest" not in meta:  # of an earlier version
        return
    metrics = dict(metrics)
    changed = _without_digest(meta) | {"metrics": metrics}
    (folder / METRICS_FILE).parent.mkdir(exist_ok=True)
    replace_file(folder / METRICS_FILE, json.dumps(metrics).encode())
    replace_file(folder / FILE, json.dumps(seal(changed)).encode())


def newest_meta(workdir: Path) -> dict[str, Any] | None:
    """Returns the `meta` of a run's newest checkpoint that has a readable one; None without any."""
    for step in reversed(saved_steps(workdir)):
        try:
            return read_meta(workdir / "checkpoints" / str(step))
        except (DamageError, OSError):  # restoring that checkpoint reports it
            continue
    return None


def read_notes(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the notes of a checkpoint's `meta`; empty if there are none."""
    notes = meta.get("notes") if meta else None
    return notes if isinstance(notes, dict) else {}


def warn_of_changed_metrics(path: Path) -> None:
    """Warns if a run's `metrics.jsonl` is not what its newest checkpoint noted of it."""
    meta = newest_meta(path.parent)
    noted = read_notes(meta).get("metrics")
    if meta and noted and not is_as_noted(path, noted):
        log.warning(
            "%s is not what was written up to step %d: a part of it is lost or changed; values of "
            "those steps may be wrong",
            path,
            meta["step"],
        )


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps that have an entry in `checkpoints`, increasing."""
    return RunDirectory(workdir).saved_steps()


def check_saved(folder: Path, items: Mapping[str, set[str]]) -> None:
    """Checks that a checkpoint that was just saved is complete.

    Args:
      folder: its own.
      items: the names of the arrays of each item.

    Raises:
      DamageError: a part of it is absent.
      OSError, ValueError: a part of it cannot be read.
    """
    read_meta(folder)
    for item, names in items.items():
        absent = sorted(names - _stored_arrays(folder / item))
        if not absent:
            continue
        what = absent[0]
        if len(absent) > 1:
            what = f"{absent[0]} and {len(absent) - 1} more"
        raise DamageError(f"{item} lacks {what}")


def _stored_arrays(folder: Path) -> set[str]:
    """Returns the names of the arrays that an item's B-tree lists."""
    import tensorstore

    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    store = tensorstore.KvStore.open(spec).result()
    names = set()
    for key in store.list().result():
        name, separator, file = key.decode().rpartition("/")
        if separator and file == ".zarray":
            names.add(name)
    return names


def manifest(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns shape and dtype of every array, by path."""
    entries = {}
    for name, array in named_arrays(state).items():
        entries[name] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    return entries


def compare_manifests(
    saved: Mapping[str, Any], expected: Mapping[str, Any], folder: str | Path
) -> None:
    """Checks that two manifests agree.

    Raises:
      CheckpointError: an array is missing, unknown, or of another shape or dtype; names the first.
    """
    _check_names(saved, expected, folder)
    for name in (*expected, *saved):
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"{folder}: {name} is {_describe(saved.get(name))} in the checkpoint but "
                f"{_describe(expected.get(name))} in the model; use the configuration of the run, "
                "or another --workdir"
            )


def _check_names(saved: Mapping[str, Any], expected: Mapping[str, Any], folder: str | Path) -> None:
    """Raises `CheckpointError` where the arrays are those of the model, under other names."""
    unknown = [name for name in saved if name not in expected]
    absent = [name for name in expected if name not in saved]
    sizes_of_unknown = sorted(_describe(saved[name]) for name in unknown)
    sizes_of_absent = sorted(_describe(expected[name]) for name in absent)
    if unknown and sizes_of_unknown == sizes_of_absent:
        raise CheckpointError(
            f"{folder} was saved by a version that names arrays differently: it has {unknown[0]}, "
            f"and the model has {absent[0]}; use the version that trained it (config.json names "
            "its git commit), or train again in another --workdir"
        )


def compare_digests(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises `DamageError` if arrays differ from what was saved; it names the first."""
    changed = [name for name, digest in found.items() if saved.get(name) != digest]
    if not changed:
        return
    what = f"{changed[0]} differs"
    if len(changed) > 1:
        what = f"{changed[0]} and {len(changed) - 1} more arrays differ"
    raise DamageError(f"{what} from the digest saved with it")


def tokenizer_digests(workdir: str | Path) -> dict[str, str]:
    """Returns the SHA-256 of the tokenizer's files in a run directory, by name."""
    digests = {}
    for name in TOKENIZER_FILES:
        path = Path(workdir) / name
        if path.exists():
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def named_arrays(state: TrainState) -> dict[str, Any]:
    """Returns arrays by path, in the order of the tree's leaves.

    A path is such as `params/stacks/0/block/mixer/key`.
    """
    arrays = {}
    for path, array in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        arrays[name.removesuffix("/value")] = array
    return arrays


def has_optimizer(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds the optimizer's arrays: weights of others come without."""
    _, optimizer = split_items(meta["manifest"])
    return bool(optimizer)


def split_items(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of the item `model` and those of the item `optimizer`."""
    model: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    for name, array in arrays.items():
        field, _, _ = name.partition("/")
        item = model if field in MODEL_FIELDS else optimizer
        item[name] = array
    return model, optimizer


def _describe(entry: Mapping[str, Any] | None) -> str:
    return "absent" if entry is None else f"{entry['dtype']}{entry['shape']}"


def _without_digest(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key != "digest"}


def _digest(meta: Mapping[str, Any]) -> str:
    text = json.dumps(meta, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_metrics(folder: Path, expected: Mapping[str, float] | None) -> None:
    """Compares the item from which orbax learns which checkpoint is the best."""
    path = folder / METRICS_FILE
    if expected is None:
        return
    try:
        found = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise DamageError(f"{METRICS_FILE} is absent or no JSON document") from error
    if found != expected:
        raise DamageError(f"{METRICS_FILE} says {str(found)[:80]} and not {expected}")
