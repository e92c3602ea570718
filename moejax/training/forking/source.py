"""The checkpoint that a run begins with."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from moejax.config import Config, ConfigError, InitConfig
from moejax.paths import resolve_path
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.checkpoints.meta import read_meta, read_notes, saved_steps
from moejax.training.run_directory.layout import read_config, recorded_lineage
from moejax.training.run_directory.reader import RunDirectory
from moejax.training.state import TrainSetup, make_train_setup


@dataclasses.dataclass(frozen=True)
class Source:
    """A step of another run.

    Attributes:
      workdir: its run directory.
      step: of the checkpoint.
      config: with which it was trained.
    """

    workdir: Path
    step: int
    config: Config

    def setup(self, mesh: Mesh, config: Config) -> TrainSetup:
        """Returns what is known of the source's arrays, split over the mesh of a fork.

        Args:
          mesh: of the fork.
          config: of the fork.
        """
        here = dataclasses.replace(self.config, mesh=config.mesh)
        return make_train_setup(here, mesh)

    def checkpoints(self, setup: TrainSetup) -> Checkpoints:
        """Opens the checkpoints of the source, to read them."""
        return Checkpoints(self.workdir, setup, read_only=True)

    @property
    def num_tokens(self) -> int:
        """Targets that it was trained on."""
        notes = read_notes(self._meta())
        return int(notes.get("tokens", 0))

    def _meta(self) -> dict[str, Any]:
        return read_meta(self.workdir / "checkpoints" / str(self.step))

    def lineage(self) -> list[dict[str, Any]]:
        """Returns what a fork records of where it comes from: the source, and its own sources."""
        facts = RunDirectory(self.workdir).read_facts()
        digests = json.dumps(self._meta().get("digests", {}), sort_keys=True)
        own = {
            "workdir": str(self.workdir),
            "step": self.step,
            "arrays_sha256": hashlib.sha256(digests.encode()).hexdigest(),
            "git_commit": facts.get("git_commit", ""),
            "command": facts.get("command", ""),
        }
        return [own, *recorded_lineage(self.workdir)]


def split_source(text: str) -> tuple[str, int | None]:
    """Returns folder and step of `DIR[:STEP]`; None if there is no step."""
    folder, colon, step = text.rpartition(":")
    if colon and step.isdecimal() and not Path(text).is_dir():
        return folder, int(step)
    return text, None


def find_source(init: InitConfig, fork: Path) -> Source:
    """Finds the checkpoint that `init.source` names: a step, or the newest one.

    Args:
      init: with a source.
      fork: the run directory of the fork. If it says with which step it began, that is taken where
        none is named, although the source may have been trained on since.

    Raises:
      ConfigError: there is none.
    """
    folder, step = split_source(init.source)
    lineage = recorded_lineage(fork)
    if step is None and lineage:
        step = int(lineage[0]["step"])
    workdir = resolve_path(folder, "init.source")
    if (workdir / "config.json").is_file() and b'"model_type"' in (
        workdir / "config.json"
    ).read_bytes():
        raise ConfigError(
            f"init.source={init.source} is a released model; convert it first, by moejax convert "
            f"--hf={folder} --workdir=RUN, and begin with RUN"
        )
    config = read_config(workdir)
    if step is None:
        step = max(saved_steps(workdir), default=None)
    if step is None:
        raise ConfigError(
            f"init.source={init.source} holds no complete checkpoint; train it first, or name "
            "another run"
        )
    return Source(workdir, step, config)
