"""A released model as a `Decoder`: its configuration, and its weights in memory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax.config import Config, nearest, resolve
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.families import FAMILIES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import read_keys
from moejax.interop.hf.places import arrays_with_tensors, named_arrays
from moejax.interop.hf.tensors import Target, Tensor
from moejax.interop.hf.weights import Weights
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
        published = json.loads(path.read_bytes())
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
    folder = resolve_path(folder)
    config, family, published = _read_published(folder / "config.json")
    graphdef, params, others = _empty_model(config)
    arrays = named_arrays(params) | named_arrays(others)
    with Weights(folder) as weights:
        for name, array, tensors in arrays_with_tensors(config, family, arrays):
            _fill(Target(name, array), tensors, weights)
        ignored = [name for name in weights.names if family.is_ignored(name, published)]
        weights.check_all_used(ignored)
    return nnx.merge(graphdef, *jax.tree.map(jax.numpy.asarray, (params, others)))


def _empty_model(config: Config) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns the structure of a model, parameters to be filled, and what else it carries."""
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, abstract_params, *_ = nnx.split(abstract, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params)

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


def _fill(target: Target, tensors: Sequence[Tensor], weights: Weights) -> None:
    for tensor in tensors:
        values = weights.take(tensor.theirs)
        target.fill(tensor, values)
    target.check_filled()
