"""Layers after the last, which predict further tokens in training and are not read."""

from collections.abc import Mapping
from typing import Any

from moejax.interop.hf.keys import first_of

KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many there are, in two spellings."""


def is_of_further_layers(name: str, published: Mapping[str, Any]) -> bool:
    """Whether a tensor is of such a layer, by its name and the content of `config.json`."""
    first = first_of(published, ("num_hidden_layers",))
    num_further = first_of(published, KEYS, 0)
    prefixes = [f"model.layers.{layer}." for layer in range(first, first + num_further)]
    return name.startswith(tuple(prefixes))
