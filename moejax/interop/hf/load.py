"""A released model as a `Decoder`: its configuration, and its weights in memory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax.config import Config, nearest, resolve
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.families import FAMILIES
from moejax.interop.hf.family import Family
from moejax.interop.hf.files.json_objects import read_json
from moejax.interop.hf.files.quantized import Source
from moejax.interop.hf.files.weights import Weights
from moejax.interop.hf.keys import read_keys
from moejax.interop.hf.pieces import claim_tensors, filled_arrays, pieces_of
from moejax.interop.hf.places import named_arrays, shapes_of
from moejax.models import Decoder
from moejax.paths import resolve_path


def read_config(folder: str | Path) -> tuple[Config, Family]:
    """Returns the configuration that a folder's `config.json` describes, and its family.

    Raises:
      HfError: no such file, a family that is not known, or something that is not implemented.
    """
    config, family, _ = _read_published(resolve_path(folder) / "config.json")
    return config, family


def _read_published(path: Path) -> tuple[Config, Family, Mapping[str, Any]]:
    """Returns the configuration of a `config.json`, its family, and its content."""
    try:
        published = read_json(path.read_bytes())
    except PermissionError as error:
        raise HfError(
            f"{path} cannot be read (Permission denied); give this user the right to read it"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise HfError(f"{path} cannot be read ({error})") from error
    if not isinstance(published, Mapping):
        raise HfError(f"{path} is damaged: it must be one JSON object")
    family = _family_of(path, published)
    try:
        config = resolve(read_keys(family.keys, published))
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise HfError(f"{path}: {error}") from error
    return config, family, published


def load_model(folder: str | Path) -> Decoder:
    """Returns the model in a folder, with its weights in float32.

    Every tensor of the folder is used exactly once, and every array of the model filled once.

    Raises:
      HfError: a folder that holds something else than such a model.
    """
    checkpoint = open_checkpoint(folder)
    graphdef, abstract, others = abstract_model(checkpoint.config)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    arrays = named_arrays(params) | named_arrays(others)
    sources = checkpoint.claim(named_arrays(params), named_arrays(others))
    for piece in pieces_of(checkpoint.config, checkpoint.family, shapes_of(arrays)):
        array = arrays[piece.array]
        array[piece.place] = piece.to_ours(sources, array.dtype)
    leaves, structure = jax.tree.flatten((params, others))
    del params, others, arrays
    for number, leaf in enumerate(leaves):  # each is freed once it is an array of jax
        leaves[number] = jax.numpy.asarray(leaf)
    return nnx.merge(graphdef, *jax.tree.unflatten(structure, leaves))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder with a released model, of which nothing but `config.json` and headers was read.

    Attributes:
      folder: the folder.
      config: of the model.
      family: of which it is one.
      published: the content of `config.json`.
      weights: its tensors.
    """

    folder: Path
    config: Config
    family: Family
    published: Mapping[str, Any]
    weights: Weights

    def claim(self, params: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Source]:
        """Returns all tensors by name, none of which is read yet.

        Args:
          params: parameters of the model by path, which may be abstract.
          others: likewise, what else it carries.

        Raises:
          HfError: tensors that the model has no place for, or lacks.
        """
        shapes = shapes_of(params) | shapes_of(others)
        sources = claim_tensors(self.config, self.family, shapes, self.weights)
        unfilled = params.keys() - filled_arrays(self.config, self.family, shapes)
        if unfilled:
            raise HfError(
                f"no tensor of {self.family.model_type} fills {sorted(unfilled)[0]} of the model"
            )
        names = self.weights.names
        ignored = [name for name in names if self.family.is_ignored(name, self.published)]
        self.weights.check_all_used(ignored)
        return sources


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Reads the configuration of a folder and the headers of its weights.

    Raises:
      HfError: a folder that holds something else than such a model.
    """
    folder = resolve_path(folder)
    config, family, published = _read_published(folder / "config.json")
    weights = Weights(folder, published.get("quantization_config"))
    return Checkpoint(folder, config, family, published, weights)


def abstract_model(config: Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the structure of a model, shapes of its parameters, and what else it carries.

    It takes no memory for parameters, however many there are.
    """
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, params, *_ = nnx.split(abstract, nnx.Param, ...)

    @jax.jit
    def make_others():
        model = Decoder(config, rngs=nnx.Rngs(params=0))
        _, _, *others = nnx.split(model, nnx.Param, ...)
        return others[0]

    return graphdef, params, jax.tree.map(np.array, make_others())


def _family_of(path: Path, published: Mapping[str, Any]) -> Family:
    model_type = str(published.get("model_type"))
    if model_type not in FAMILIES:
        raise HfError(
            f"{path}: model_type={model_type} is not known; the nearest is "
            f"{nearest(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]
