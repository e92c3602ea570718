"""A family of released models: its keys and its tensors."""

import dataclasses
from collections.abc import Callable

from moejax.config import Config
from moejax.interop.hf.keys import Entry
from moejax.interop.hf.tensors import Tensor


def _is_frequency(name: str, config: Config) -> bool:
    """Whether a tensor holds rotary frequencies, which follow from the configuration."""
    del config
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
      is_ignored: whether a tensor says nothing that `config.json` does not.
    """

    model_type: str
    architecture: str
    keys: tuple[Entry, ...]
    outer: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    moe: tuple[Tensor, ...]
    prefix: str = "model.layers.{layer}."
    is_ignored: Callable[[str, Config], bool] = _is_frequency
