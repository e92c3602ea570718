"""`workdir/config.json`: what a run is, and the check that a resumed run is still the same."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

import moejax
from moejax.config import (
    AlarmConfig,
    Config,
    ConfigError,
    is_read,
    leaves,
    resolve_recorded,
    to_dict,
)
from moejax.models.parameters import ParameterCount
from moejax.paths import replace_file
from moejax.strict_json import to_json
from moejax.training.checkpoints.meta import newest_meta
from moejax.training.multihost.processes import broadcast_from_primary, raise_on_all
from moejax.training.optimizer import make_schedule
from moejax.training.run_directory.numerics import changed_numerics, numerics
from moejax.training.run_directory.text_record import record_text
from moejax.training.run_directory.tree import check_run_tree

MAY_CHANGE = (
    "train.num_steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.max_nonfinite_steps", "train.step_limit_s", "train.check_memory",
    "data.directory", "data.files", "data.source_dir",
    "moe.grouped_matmul", "moe.exchange",
    "moe.exchange_buffer", "moe.exchange_chunks", "moe.save_exchanged", "model.remat", "model.scan_layers",
    "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.context", "mesh.tensor",
    "mesh.dcn_data", "mesh.dcn_fsdp", "mesh.dcn_expert",
    *(f"alarms.{field.name}" for field in dataclasses.fields(AlarmConfig)),
)  # fmt: skip
"""Leaves that may differ when a run is continued: they change neither the model nor what a step computes, except that
`train.num_steps` stretches the learning-rate schedule."""

LOST_CONFIG = "restore it from a copy, or move it away and continue the run by its recipe: its checkpoint knows if it fits"

GLOB_LETTERS = "*?["

log = logging.getLogger("moejax")

SHARED_SECONDS = 60.0
"""Network file systems may show a new file so much later in another host."""

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
)


class Change(NamedTuple):
    """A leaf in which two configurations differ."""

    key: str
    saved: Any
    wanted: Any


def changes(saved: Config, wanted: Config) -> list[Change]:
    """The leaves in which a run's configuration and another one differ."""
    before, after = to_dict(saved), to_dict(wanted)
    pairs = [(key, *key.split(".")) for key, _ in leaves()]
    found = [
        Change(key, before[section][name], after[section][name]) for key, section, name in pairs
    ]
    return [change for change in found if change.saved != change.wanted]


def first_change(saved: Config, wanted: Config) -> Change | None:
    """The first difference that makes another run of it; None if there is none.

    A leaf that neither reads makes none: a run of an earlier version may have been
    started with one.
    """
    for change in changes(saved, wanted):
        if change.key not in MAY_CHANGE and (
            is_read(saved, change.key) or is_read(wanted, change.key)
        ):
            return change
    return None


def check_run_directory(workdir: Path, config: Config) -> None:
    """Raises `ConfigError` if the directory holds a run of another configuration, or cannot hold one; changes nothing.

    The run's configuration is what `config.json` says and, should that be lost or edited, what its
    checkpoint says.
    """
    check_path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; name a folder")
    check_run_tree(workdir)
    known = [read_config(workdir)] if (workdir / "config.json").exists() else []
    meta = newest_meta(workdir)
    if meta is not None:
        with contextlib.suppress(ConfigError):  # of another version: restoring it says so
            known.append(resolve_recorded(meta["config"]))
    for saved in known:
        change = first_change(saved, config)
        if change:
            raise ConfigError(
                f"{workdir} holds a run with {change.key}={change.saved}, not {change.wanted}; give "
                f"--config.{change.key}={change.saved} to continue it, or use another --workdir for a new one"
            )


def tell_changes(saved: Config, config: Config, step: int) -> None:
    """Logs how a continued run differs from what it was, and what that means for its schedule and its length."""
    told = [
        f"{change.key}={change.wanted} (was {change.saved})" for change in changes(saved, config)
    ]
    if told:
        log.info("continuing with %s", ", ".join(told))
    before, after = saved.train.num_steps, config.train.num_steps
    if step > after or (step == after and before != after):
        log.info(
            "train.num_steps=%d: the run is already at step %d, and nothing is trained", after, step
        )
    elif before != after:
        rates = [
            float(make_schedule(config.optimizer, num_steps)(step)) * config.optimizer.learning_rate
            for num_steps in (before, after)
        ]
        log.info(
            "train.num_steps=%d stretches the schedules: the learning rate goes on at %.3g, where %d steps had %.3g",
            after, rates[1], before, rates[0],
        )  # fmt: skip


def warn_of_lost_checkpoints(workdir: Path) -> None:
    """Says that a run begins again although it was trained before, where its checkpoints are gone."""
    path = workdir / "metrics.jsonl"
    if path.is_file() and path.stat().st_size:
        log.warning(
            "%s has metrics and no checkpoint: the run begins at step 0, and they are written again",
            workdir,
        )


def check_path(workdir: Path) -> None:
    """Raises `ConfigError` for a path below which orbax loses what it saves, without an error.

    It looks for its files by patterns, in which brackets and stars are no letters; and tensorstore,
    which writes them, takes names for UTF-8, whatever the locale says.
    """
    whole = str(workdir.resolve())
    special = [letter for letter in GLOB_LETTERS if letter in whole]
    if special:
        raise ConfigError(
            f"--workdir={workdir}: checkpoints cannot be saved below a folder whose name has {' '.join(special)} "
            f"({whole}); use another folder"
        )
    try:
        is_utf8 = os.fsencode(whole) == whole.encode()
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8:
        raise ConfigError(
            f"--workdir={str(workdir)!a} is not the same name in UTF-8 as in this locale "
            f"({sys.getfilesystemencoding()}); set LC_ALL=C.UTF-8, or use a name of ASCII letters"
        )


def write_run_directory(
    workdir: Path, config: Config, parameters: ParameterCount, corpus: str, command: str
) -> None:
    """Creates the directory if need be and writes `config.json`.

    Args:
      workdir: the run directory.
      config: of the run.
      parameters: of its model.
      corpus: identifies the prepared rows; a run is continued only on the rows it began with.
      command: that trains it.

    Raises:
      ConfigError: the directory holds a run on other data, or cannot be written.
    """
    path = workdir / "config.json"
    facts = _read_json(path) if path.exists() else {}
    before = facts.get("numerics", {})
    if not isinstance(before, dict):
        raise ConfigError(
            f"{path} is damaged: numerics={before!r} must be an object; restore it from a copy"
        )
    changed = changed_numerics(before)
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with {changed}, which changes its numbers; set that variable as it was, or use "
            "another --workdir"
        )
    meta = newest_meta(workdir)
    notes = meta.get("notes") if meta else None
    noted = notes.get("corpus") if isinstance(notes, dict) else None
    for before in (facts.get("corpus"), noted):
        if before is not None and before != corpus:
            raise ConfigError(
                f"{workdir} holds a run on the rows {before}; the text has changed since and gives {corpus}; "
                "restore the text, or use another --workdir"
            )
    device = jax.devices()[0]
    content = {
        "config": to_dict(config),
        "corpus": corpus,
        "text": record_text(config.data, corpus),
        "parameters": dataclasses.asdict(parameters),
        "versions": versions(),
        "git_commit": git_commit(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "numerics": numerics(),
        "command": command,
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written: {error.strerror}; use another folder"
        ) from error


def recorded_corpus(workdir: Path) -> str | None:
    """The rows that a run is trained on, as `config.json` says; None without one."""
    content = _read_json(workdir / "config.json") if (workdir / "config.json").exists() else {}
    return content.get("corpus") if isinstance(content, dict) else None


def check_shared(workdir: Path) -> None:
    """Raises `ConfigError` in a process that does not see the `config.json` that process 0 has written."""
    path = workdir / "config.json"

    def digest() -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

    written = broadcast_from_primary(digest())

    def see() -> None:
        deadline = time.monotonic() + SHARED_SECONDS
        while digest() != written:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--workdir={workdir} on {socket.gethostname()}, process {jax.process_index()}, is not the folder "
                    "that process 0 writes; name one on a file system that all hosts share"
                )
            time.sleep(0.5)

    raise_on_all(see)


def read_config(workdir: str | Path) -> Config:
    """The resolved configuration of a run.

    Raises:
      ConfigError: there is no readable `config.json`, or it does not describe a valid
        configuration.
      RunTreeError: the run directory has links out of it, or pipes.
    """
    check_run_tree(workdir)
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise ConfigError(f"{path} does not exist; --workdir must name the folder of a trained run")
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ConfigError(f"{path} is damaged (it has no entry config); {LOST_CONFIG}")
    try:
        return resolve_recorded(content["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give this user the right to read it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); {LOST_CONFIG}") from error


def versions() -> dict[str, str]:
    """Versions of Python, moejax and the packages that numbers depend on."""
    return {
        "python": platform.python_version(),
        "moejax": moejax.__version__,
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def git_commit() -> str:
    """Commit of the checkout moejax runs from, with "+changes" if it was edited; empty outside a checkout."""

    def git(*arguments: str) -> str:
        folder = Path(moejax.__file__).parent
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON document, whole or not at all."""
    replace_file(path, (to_json(content, indent=2) + "\n").encode())
