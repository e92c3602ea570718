"""`workdir/config.json`: what a run is, and the check that a resumed run is still the same."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

import moejax
from moejax.config import AlarmConfig, Config, ConfigError, leaves, resolve_recorded, to_dict
from moejax.models.parameters import ParameterCount
from moejax.training.numerics import changed_numerics, numerics
from moejax.training.processes import fail_together, first_says

MAY_CHANGE = (
    "train.num_steps", "train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
    "train.max_nonfinite_steps", "train.step_limit_s", "data.directory", "moe.grouped_matmul", "moe.exchange",
    "moe.exchange_buffer", "moe.exchange_chunks", "moe.save_exchanged", "model.remat", "model.scan_layers",
    "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.context", "mesh.tensor",
    "mesh.dcn_data", "mesh.dcn_fsdp", "mesh.dcn_expert",
    *(f"alarms.{field.name}" for field in dataclasses.fields(AlarmConfig)),
)  # fmt: skip
"""Leaves that may differ when a run is continued: they change neither the model nor what a step computes, except that
`train.num_steps` stretches the learning-rate schedule."""

SHARED_SECONDS = 60.0
"""Network file systems may show a new file so much later in another host."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def check_run_directory(workdir: Path, config: Config) -> None:
    """Raises `ConfigError` if the directory holds a run of another configuration; changes nothing."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir={workdir} is a file; name a folder")
    if not (workdir / "config.json").exists():
        return
    saved, wanted = to_dict(read_config(workdir)), to_dict(config)
    for key, _ in leaves():
        section, name = key.split(".")
        if saved[section][name] != wanted[section][name] and key not in MAY_CHANGE:
            raise ConfigError(
                f"{workdir} holds a run with {key}={saved[section][name]}, not {wanted[section][name]}; "
                "use another --workdir, or remove that folder"
            )


def write_run_directory(workdir: Path, config: Config, parameters: ParameterCount, corpus: str, command: str) -> None:
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
    if path.exists():
        facts = json.loads(path.read_text(encoding="utf-8"))
        changed = changed_numerics(facts.get("numerics", {}))
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with {changed}, which changes its numbers; set that variable as it was, or use "
                "another --workdir"
            )
        before = facts.get("corpus", corpus)
        if before != corpus:
            raise ConfigError(
                f"{workdir} holds a run on the rows {before}; the text has changed since and gives {corpus}; "
                "restore the text, or use another --workdir"
            )
    device = jax.devices()[0]
    content = {
        "config": to_dict(config),
        "corpus": corpus,
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
        raise ConfigError(f"--workdir={workdir} cannot be written: {error.strerror}; use another folder") from error


def check_shared(workdir: Path) -> None:
    """Raises `ConfigError` in a process that does not see the `config.json` that process 0 has written."""
    path = workdir / "config.json"

    def digest() -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

    written = first_says(digest())

    def see() -> None:
        deadline = time.monotonic() + SHARED_SECONDS
        while digest() != written:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--workdir={workdir} on {socket.gethostname()}, process {jax.process_index()}, is not the folder "
                    "that process 0 writes; name one on a file system that all hosts share"
                )
            time.sleep(0.5)

    fail_together(see)


def read_config(workdir: str | Path) -> Config:
    """The resolved configuration of a run.

    Raises:
      ConfigError: there is no readable `config.json`, or it does not describe a valid configuration.
    """
    path = Path(workdir) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return resolve_recorded(content["config"])
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; --workdir must name the folder of a trained run") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it, or train the run anew") from error


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
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON document, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
