"""A run directory into a model: all one needs is the directory."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from moejax.config import Config, MeshConfig
from moejax.data import Tokenizer, load_tokenizer
from moejax.models import Decoder
from moejax.sharding import make_mesh
from moejax.training.checkpoint import Checkpoints
from moejax.training.run_directory import read_config
from moejax.training.state import make_trainable


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A model with its weights, ready to call.

    Attributes:
      config: of the run.
      model: the decoder.
      tokenizer: the run's own.
      step: of the checkpoint.
    """

    config: Config
    model: Decoder
    tokenizer: Tokenizer
    step: int


def load_run(workdir: str | Path, step: int | None = None) -> LoadedRun:
    """Loads a checkpoint onto the first device, whatever mesh the run was trained on.

    Args:
      workdir: the run directory; nothing found in it is executed.
      step: a saved step; None takes the newest.

    Raises:
      ConfigError: no readable `config.json`.
      DataError: the tokenizer is missing or damaged.
      CheckpointError: no such checkpoint, or it is damaged.
    """
    config = read_config(workdir)
    tokenizer = load_tokenizer(workdir)
    one_device = dataclasses.replace(config, mesh=MeshConfig(data=1))
    trainable = make_trainable(one_device, make_mesh(one_device, jax.devices()[:1]))
    checkpoints = Checkpoints(workdir, trainable, read_only=True)
    step, params, router_state = checkpoints.restore_model(step)
    return LoadedRun(config, nnx.merge(trainable.graphdef, params, router_state), tokenizer, step)
