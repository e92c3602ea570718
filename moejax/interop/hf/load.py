"""A released model as a `Decoder`: its configuration, and its weights in memory."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moejax.config import Config, ConfigError, nearest, resolve
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.families import FAMILIES
from moejax.interop.hf.family import Family
from moejax.interop.hf.keys import read_keys
from moejax.interop.hf.places import layer_places
from moejax.interop.hf.tensors import Target, Tensor, expand
from moejax.interop.hf.weights import Weights
from moejax.models import Decoder
from moejax.paths import resolve_path

TIED = "unembedding"
"""The array that a model with tied embeddings lacks; its files lack the tensor, too."""

Arrays = dict[str, np.ndarray]
"""Arrays of a model by path, such as `stacks/0/block/mixer/query`."""


def read_config(folder: str | Path) -> tuple[Config, Family]:
    """Returns the configuration that a folder's `config.json` describes, and its family.

    Raises:
      HfError: no such file, a family that is not known, or something that is not implemented.
    """
    path = resolve_path(folder) / "config.json"
    try:
        published = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise HfError(f"{path} cannot be read ({error})") from error
    if not isinstance(published, Mapping):
        raise HfError(f"{path} is damaged: it must be one JSON object")
    family = _family_of(path, published)
    try:
        config = resolve(read_keys(family.keys, published))
    except (HfError, ConfigError, TypeError) as error:
        raise HfError(f"{path}: {error}") from error
    return config, family


def load_model(folder: str | Path) -> Decoder:
    """Returns the model in a folder, with its weights in float32.

    Every tensor of the folder is used exactly once, and every array of the model filled once.

    Raises:
      HfError: a folder that holds something else than such a model.
    """
    folder = resolve_path(folder)
    config, family = read_config(folder)
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
    graphdef, state = nnx.split(abstract)
    arrays = _empty_arrays(state)
    with Weights(folder) as weights:
        for target, tensors in _targets(config, family, arrays):
            _fill(target, tensors, weights)
        weights.check_all_used([name for name in weights.names if family.is_ignored(name)])
    filled = [jax.numpy.asarray(array) for array in arrays.values()]
    structure = jax.tree.structure(state)
    return nnx.merge(graphdef, jax.tree.unflatten(structure, filled))


def _family_of(path: Path, published: Mapping[str, Any]) -> Family:
    model_type = str(published.get("model_type"))
    if model_type not in FAMILIES:
        raise HfError(
            f"{path}: model_type={model_type} is not known; the nearest is "
            f"{nearest(model_type, FAMILIES)}"
        )
    return FAMILIES[model_type]


def _empty_arrays(state: nnx.State) -> Arrays:
    """Returns arrays of 0 for all variables of a model, by path, in the order of its leaves."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        arrays[name] = np.zeros(leaf.shape, leaf.dtype)
    return arrays


def _targets(
    config: Config, family: Family, arrays: Arrays
) -> Iterator[tuple[Target, list[Tensor]]]:
    """Yields the arrays of a model, layer by layer, with the tensors that fill each."""
    yield from _with_tensors(family.outer, 0, arrays, "")
    for layer, place in enumerate(layer_places(config)):
        prefix = family.prefix.format(layer=layer)
        tensors = (*family.layer, *(family.moe if place.num_experts else family.dense))
        named = [dataclasses.replace(each, theirs=prefix + each.theirs) for each in tensors]
        of_layer = place.arrays_of(arrays)
        yield from _with_tensors(named, place.num_experts, of_layer, place.prefix)


def _with_tensors(
    tensors: Sequence[Tensor], num_experts: int, arrays: Arrays, prefix: str
) -> Iterator[tuple[Target, list[Tensor]]]:
    """Yields each array that tensors fill, with those tensors."""
    by_array: dict[str, list[Tensor]] = {}
    for tensor in expand(tensors, num_experts):
        by_array.setdefault(tensor.ours, []).append(tensor)
    for name, parts in by_array.items():
        if name not in arrays:
            if name == TIED:
                continue
            raise HfError(f"the model has no array {prefix}{name} for {parts[0].theirs}")
        yield Target(prefix + name, arrays[name]), parts


def _fill(target: Target, tensors: Sequence[Tensor], weights: Weights) -> None:
    for tensor in tensors:
        values = weights.take(tensor.theirs)
        target.fill(tensor, values)
    target.check_filled()
