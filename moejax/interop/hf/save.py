"""A model of ours in the Hugging Face layout."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from moejax.config import (
    MOE_OF_TRAINING,
    OF_COMPUTATION,
    AttentionConfig,
    Config,
    ModelConfig,
    MoeConfig,
    declared,
    folded,
    resolve,
)
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.families import FAMILIES
from moejax.interop.hf.family import Family
from moejax.interop.hf.files.weights import SINGLE
from moejax.interop.hf.keys import read_keys, write_keys
from moejax.interop.hf.pieces import Piece, join_rows, pieces_of
from moejax.interop.hf.places import Arrays, named_arrays, shapes_of
from moejax.models import Decoder
from moejax.paths import replace_file, resolve_path

BY_SHAPE = ("d_ff", "vocab_size")
"""Leaves of `model` that are compared by the shapes of tensors."""

BY_LAYER = ("every", "first_dense", "per_layer")
"""Leaves of `moe` that are in what each layer is."""


def save_model(model: Decoder, folder: str | Path, model_type: str) -> None:
    """Writes a model as `config.json` and `model.safetensors`, in float32.

    Args:
      model: whose layers are those of the family.
      folder: is made if it is not there; it may hold no other model.
      model_type: of the family, such as "mixtral".

    Raises:
      HfError: a model that is not one of the family, whose message names the leaf, or a folder
        that holds a model.
    """
    path = resolve_path(folder)
    found = sorted(
        each.name for each in path.glob("*") if each.name.startswith(("model", "config"))
    )
    if found:
        raise HfError(f"{path} holds {found[0]}; name a folder without a model")
    family = FAMILIES[model_type]
    keys = published_keys(model.config, family)
    arrays = named_arrays(jax.tree.map(np.asarray, nnx.state(model)))
    tensors = dict(their_tensors(model.config, family, arrays))
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    replace_file(path / "config.json", json.dumps(keys, indent=2).encode())


def their_tensors(
    config: Config, family: Family, arrays: Arrays
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors that a model's arrays are published as: names and values."""
    pieces = pieces_of(config, family, shapes_of(arrays))
    in_pieces = (each for piece in pieces for each in piece.to_theirs(_values(arrays, piece)))
    yield from join_rows(in_pieces)


def _values(arrays: Arrays, piece: Piece) -> np.ndarray:
    return arrays[piece.array][piece.place]


def published_keys(config: Config, family: Family) -> dict[str, Any]:
    """Returns the keys of `config.json`; reading them gives a model that computes the same.

    Raises:
      HfError: a model that is not one of the family.
    """
    config = _with_multiplier(config)
    values = {key: each.value(config) for key, each in declared().items()}
    values["model.vocab_size"] = config.vocab_size
    values["dense_layers"] = [n for n, kind in enumerate(config.layers) if kind is None]
    values["top_k_by_layer"] = [kind.top_k for kind in config.layers if kind is not None]
    keys = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": "float32",
        "max_position_embeddings": config.data.seq_len,
        **write_keys(family.keys, values),
    }
    _check_same(config, resolve(read_keys(family.keys, keys)), family)
    return keys


def _with_multiplier(config: Config) -> Config:
    """Returns the configuration with its multipliers as leaves, also those that follow."""
    config = folded(config)
    model = config.model
    multiplier = model.embedding_multiplier or model.d_model**0.5
    model = dataclasses.replace(model, embedding_multiplier=multiplier)
    return dataclasses.replace(config, model=model)


def _check_same(config: Config, read: Config, family: Family) -> None:
    """Raises `HfError` unless what is read back computes what the model computes."""
    for section, names in _compared().items():
        for name in names:
            ours, theirs = (getattr(getattr(each, section), name) for each in (config, read))
            _require_same(f"{section}.{name}", ours, theirs, family)
    for layer, (ours, theirs) in enumerate(zip(config.layers, read.layers, strict=True)):
        if (ours is None) != (theirs is None):
            raise HfError(f"layer {layer} would be read back as another kind of layer")
        if ours is None:
            continue
        for name in _moe_leaves():
            _require_same(f"moe.{name}", getattr(ours, name), getattr(theirs, name), family)


def _compared() -> dict[str, list[str]]:
    """Returns the leaves of the decoder that are compared, by section."""
    model = [field.name for field in dataclasses.fields(ModelConfig)]
    attention = [field.name for field in dataclasses.fields(AttentionConfig)]
    left_out = {*OF_COMPUTATION, *BY_SHAPE}
    return {"model": [name for name in model if name not in left_out], "attention": attention}


def _moe_leaves() -> list[str]:
    names = [field.name for field in dataclasses.fields(MoeConfig)]
    left_out = {*MOE_OF_TRAINING, *BY_LAYER}
    return [name for name in names if name not in left_out]


def _require_same(key: str, ours: Any, theirs: Any, family: Family) -> None:
    if ours != theirs:
        raise HfError(
            f"{key}={ours} does not fit the family {family.model_type}, which would be read back "
            f"with {theirs}"
        )
