"""Loads a model from a run directory, which holds all that is needed."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from moejax.config import Config, MeshConfig
from moejax.data import Corpus, Tokenizer, load_tokenizer, prepare
from moejax.models import Decoder
from moejax.paths import resolve_path
from moejax.sharding import make_mesh
from moejax.training.checkpoints.averages import restore_weights
from moejax.training.checkpoints.checkpoint import Checkpoints
from moejax.training.run_directory.layout import read_config
from moejax.training.run_directory.text import TextPlaces, open_run_corpus, said_text
from moejax.training.state import make_train_setup


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A model with its weights, ready to call.

    Attributes:
      config: of the run.
      model: the decoder.
      tokenizer: the run's own.
      step: of the checkpoint.
      mesh: over which the weights are split, which must be in context where the model is called;
        None: they are on one device.
      workdir: the run directory; None for a model that was made in memory, or is a released one.
    """

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    step: int
    mesh: Mesh | None = None
    workdir: Path | None = None

    def corpus(self, places: TextPlaces | None = None) -> Corpus:
        """Returns the rows it was trained on; see `training.run_directory.text.open_run_corpus`.

        Those of a released model are any that `places` names, or the speeches.
        """
        if self.workdir is None:
            return prepare(said_text(self.config.data, places), self.tokenizer)
        return open_run_corpus(self.workdir, self.tokenizer, places)


def load_run(
    workdir: str | Path,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    average: str = "",
) -> LoadedRun:
    """Loads a checkpoint, whatever mesh the run was trained on.

    Args:
      workdir: the run directory; nothing found in it is executed.
      step: a saved step; None takes the newest.
      mesh: of all devices, over which the weights are split; None loads onto the first device.
      average: of weights, see `training.checkpoints.averages`.

    Raises:
      ConfigError: no readable `config.json`, or the model does not fit the mesh.
      DataError: the tokenizer is missing or damaged.
      CheckpointError: no such checkpoint, or it is damaged.
    """
    workdir = resolve_path(workdir)
    config = read_config(workdir)
    tokenizer = load_tokenizer(workdir)
    here = dataclasses.replace(config, mesh=mesh or MeshConfig(data=1))
    devices = None if mesh else jax.devices()[:1]
    setup = make_train_setup(here, make_mesh(here, devices))
    checkpoints = Checkpoints(workdir, setup, read_only=True)
    step, params, router_state = restore_weights(checkpoints, step, average)
    return LoadedRun(
        config=config,
        model=nnx.merge(setup.graphdef, params, router_state),
        tokenizer=tokenizer,
        step=step,
        mesh=setup.mesh if mesh else None,
        workdir=Path(workdir),
    )
