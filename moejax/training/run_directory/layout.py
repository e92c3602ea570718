"""`workdir/config.json`: what a run is, and the check that a continued run is still the same."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import moejax
from moejax.config import Config, ConfigError, resolve_recorded, to_dict
from moejax.models.parameters import ParameterCount
from moejax.paths import replace_file
from moejax.strict_json import to_json
from moejax.training.checkpoints.meta import has_optimizer, newest_meta, read_notes
from moejax.training.multihost.processes import broadcast_from_primary, raise_on_all
from moejax.training.run_directory.changes import first_change
from moejax.training.run_directory.numerics import changed_numerics, numerics
from moejax.training.run_directory.reader import RunDirectory, check_run_tree
from moejax.training.run_directory.text_record import record_text

LOST_CONFIG = (
    "restore it from a copy, or move it away and continue the run by its recipe: its checkpoint "
    "knows if it fits"
)

CONVERTING = "converting"
"""A folder of a run directory in which released weights are being written."""

RELEASED = "hf"
"""A folder of a run directory with what a released model came with besides weights."""

GLOB_LETTERS = "*?["

log = logging.getLogger("moejax")

SHARED_SECONDS = 60.0
"""Network file systems may show a new file this much later on another host."""

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


def check_run_directory(workdir: Path, config: Config) -> None:
    """Checks that a directory can hold a run of this configuration; changes nothing.

    The run's configuration is what `config.json` says and, should that be lost or edited, what its
    checkpoint says.

    Raises:
      ConfigError: it holds a run of another configuration, or cannot hold one.
    """
    check_path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; name a folder")
    check_run_tree(workdir)
    if (workdir / CONVERTING).exists():
        raise ConfigError(
            f"{workdir} holds a conversion that is not finished; run moejax convert again, or use "
            "another --workdir"
        )
    for saved, has_begun in _known_configs(workdir):
        change = first_change(saved, config, has_begun=has_begun)
        if change:
            saved_leaf = f"{change.key}={change.saved}"
            raise ConfigError(
                f"{workdir} holds a run with {saved_leaf}, not {change.wanted}; give "
                f"--config.{saved_leaf} to continue it, or use another --workdir for a new one"
            )


def _known_configs(workdir: Path) -> Iterator[tuple[Config, bool]]:
    """Yields the configurations of a run directory, and whether each has trained anything."""
    if (workdir / "config.json").exists():
        config = read_config(workdir)
        yield config, _recorded_facts(workdir).get("corpus") is not None
    meta = newest_meta(workdir)
    if meta is not None:
        # The checkpoint may be of another version; restoring it reports that.
        with contextlib.suppress(ConfigError):
            yield resolve_recorded(meta["config"]), has_optimizer(meta)


def check_not_converted(workdir: Path) -> None:
    """Raises `ConfigError` where a run without checkpoints began with the weights of others."""
    if (workdir / RELEASED).exists():
        raise ConfigError(
            f"{workdir} began with the weights of a released model, and its checkpoints are gone; "
            "restore them, or convert the model again, to another --workdir"
        )


def warn_of_lost_checkpoints(workdir: Path) -> None:
    """Warns that a run begins again although it was trained before: its checkpoints are gone."""
    path = workdir / "metrics.jsonl"
    if path.is_file() and path.stat().st_size:
        log.warning(
            "%s has metrics and no checkpoint: the run begins at step 0, and they are written "
            "again",
            workdir,
        )


def check_path(workdir: Path) -> None:
    """Raises `ConfigError` for a path below which orbax loses what it saves, without an error.

    It looks for its files by patterns, in which brackets and stars have a meaning; and tensorstore,
    which writes them, takes names for UTF-8, whatever the locale says.
    """
    resolved = str(workdir.resolve())
    special = [letter for letter in GLOB_LETTERS if letter in resolved]
    if special:
        raise ConfigError(
            f"--workdir={workdir}: checkpoints cannot be saved below a folder whose name has "
            f"{' '.join(special)} ({resolved}); use another folder"
        )
    try:
        is_utf8 = os.fsencode(resolved) == resolved.encode()
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8:
        raise ConfigError(
            f"--workdir={str(workdir)!a} is not the same name in UTF-8 as in this locale "
            f"({sys.getfilesystemencoding()}); set LC_ALL=C.UTF-8, or use a name of ASCII letters"
        )


def write_run_directory(
    workdir: Path,
    config: Config,
    parameters: ParameterCount,
    corpus: str | None,
    command: str,
    lineage: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Creates the directory if need be and writes `config.json`.

    Args:
      workdir: the run directory.
      config: of the run.
      parameters: of its model.
      corpus: identifies the prepared rows; a run is continued only on the rows it began with. None:
        it has none yet, for its weights were converted.
      command: the command that trains it.
      lineage: of a run that begins with the weights of others: these runs, the nearest first.

    Raises:
      ConfigError: the directory holds a run on other data, or cannot be written.
    """
    path = workdir / "config.json"
    if _recorded_facts(workdir).get("corpus", "") is not None:
        _check_numerics(workdir)  # converted weights depend on no setting of jax
    if corpus is not None:
        _check_corpus(workdir, corpus)
    device = jax.devices()[0]
    content = {
        "config": to_dict(config),
        "corpus": corpus,
        "text": None if corpus is None else record_text(config.data, corpus),
        "parameters": dataclasses.asdict(parameters),
        "versions": versions(),
        "git_commit": git_commit(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "numerics": numerics(),
        "command": command,
    }
    if lineage:
        content["lineage"] = list(lineage)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be written: {error.strerror}; use another folder"
        ) from error


def _check_numerics(workdir: Path) -> None:
    """Raises `ConfigError` if a run was trained under other settings of jax that decide numbers."""
    recorded = _recorded_facts(workdir).get("numerics", {})
    if not isinstance(recorded, dict):
        raise ConfigError(
            f"{workdir / 'config.json'} is damaged: numerics={recorded!r} must be an object; "
            "restore it from a copy"
        )
    changed = changed_numerics(recorded)
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with {changed}, which changes its numbers; set that variable "
            "as it was, or use another --workdir"
        )


def _check_corpus(workdir: Path, corpus: str) -> None:
    """Raises `ConfigError` if a run was trained on other rows."""
    recorded = _recorded_facts(workdir).get("corpus")
    noted = read_notes(newest_meta(workdir)).get("corpus")
    for earlier in (recorded, noted):
        if earlier is not None and earlier != corpus:
            raise ConfigError(
                f"{workdir} holds a run on the rows {earlier}; the text has changed since and "
                f"gives {corpus}; restore the text, or use another --workdir"
            )


def _recorded_facts(workdir: Path) -> Any:
    """Returns what `config.json` says; empty without one."""
    run = RunDirectory(workdir)
    return _read_facts(run) if run.config.exists() else {}


def recorded_lineage(workdir: Path) -> list[dict[str, Any]]:
    """Returns the runs whose weights a run began with, as `config.json` says, nearest first."""
    facts = _recorded_facts(workdir)
    lineage = facts.get("lineage", []) if isinstance(facts, dict) else []
    is_sound = isinstance(lineage, list) and all(map(_is_source, lineage))
    if not is_sound:
        raise ConfigError(
            f"{workdir / 'config.json'} is damaged: lineage must be a list of runs with workdir "
            "and step; restore it from a copy"
        )
    return lineage


def _is_source(entry: Any) -> bool:
    """Whether an entry of a lineage names a run and a step."""
    is_named = isinstance(entry, dict) and isinstance(entry.get("workdir"), str)
    return is_named and type(entry.get("step")) is int


def recorded_corpus(workdir: Path) -> str | None:
    """Returns the rows that a run is trained on, as `config.json` says; None without one."""
    facts = _recorded_facts(workdir)
    return facts.get("corpus") if isinstance(facts, dict) else None


def check_shared(workdir: Path) -> None:
    """Checks that all processes see the `config.json` that process 0 has written.

    Raises:
      ConfigError: this process does not see it.
      ProcessError: another process does not.
    """
    path = workdir / "config.json"

    def digest() -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

    written = broadcast_from_primary(digest())

    def wait_for_file() -> None:
        deadline = time.monotonic() + SHARED_SECONDS
        while digest() != written:
            if time.monotonic() > deadline:
                process = f"{socket.gethostname()}, process {jax.process_index()}"
                raise ConfigError(
                    f"--workdir={workdir} on {process}, is not the folder that process 0 writes; "
                    "name one on a file system that all hosts share"
                )
            time.sleep(0.5)

    raise_on_all(wait_for_file)


def read_config(workdir: str | Path) -> Config:
    """Returns the resolved configuration of a run.

    Raises:
      ConfigError: there is no readable `config.json`, or it does not describe a valid
        configuration.
      RunTreeError: the run directory has links out of it, or pipes.
    """
    check_run_tree(workdir)
    run = RunDirectory(Path(workdir))
    path = run.config
    if not path.exists():
        raise ConfigError(f"{path} does not exist; --workdir must name the folder of a trained run")
    content = _read_facts(run)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ConfigError(f"{path} is damaged (it has no entry config); {LOST_CONFIG}")
    try:
        return resolve_recorded(content["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_facts(run: RunDirectory) -> Any:
    """Reads `config.json`; raises `ConfigError` with the remedy if that fails."""
    path = run.config
    try:
        return run.read_facts()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give this user the right to read it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); {LOST_CONFIG}") from error


def versions() -> dict[str, str]:
    """Returns the versions of Python, moejax and the packages that numbers depend on."""
    own = {"python": platform.python_version(), "moejax": moejax.__version__}
    return own | {package: importlib.metadata.version(package) for package in PACKAGES}


def git_commit() -> str:
    """Returns the commit of the checkout that moejax runs from; empty outside a checkout.

    It ends with "+changes" if the checkout was edited.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        is_edited = bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+changes" if is_edited else commit


def _git(*arguments: str) -> str:
    """Returns what git prints about the checkout that moejax runs from."""
    folder = str(Path(moejax.__file__).parent)
    command = ["git", "-C", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON document in one step: a reader sees the old file or the new one."""
    replace_file(path, (to_json(content, indent=2) + "\n").encode())
