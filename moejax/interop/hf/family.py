"""A family of released models: its keys and its tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.interop.hf.keys import Entry
from moejax.interop.hf.tensors import Tensor


def _is_frequency(name: str, published: Mapping[str, Any]) -> bool:
    """Whether a tensor holds rotary frequencies, which follow from `config.json`."""
    del published
    return name.endswith("rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of released models, as two tables.

    Attributes:
      model_type: what `config.json` calls it.
      architecture: the class of the reference.
      keys: of `config.json`.
      outer: tensors outside of the layers, by their complete names.
      layer: tensors that every layer has, after `prefix`.
      dense: further tensors of a dense layer.
      moe: further tensors of a MoE layer.
      prefix: of the names of a layer's tensors.
      is_ignored: whether a tensor, by its name and the content of `config.json`, says nothing of
        how a text is evaluated.
      shared_beside: whether the reference's module of experts is without the shared one, which it
        adds after it; only arrays `mlp_out` of a reference file depend on it.
      deviations: arrays of a reference file that are otherwise here on purpose, and why.
    """

    model_type: str
    architecture: str
    keys: tuple[Entry, ...]
    outer: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    moe: tuple[Tensor, ...]
    prefix: str = "model.layers.{layer}."
    is_ignored: Callable[[str, Mapping[str, Any]], bool] = _is_frequency
    shared_beside: bool = False
    deviations: Mapping[str, str] = dataclasses.field(default_factory=dict)
