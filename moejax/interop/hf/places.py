"""Where the arrays of each layer are in a model whose layers are stacked."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import Config
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.tensors import Tensor, expand

Arrays = dict[str, np.ndarray]
"""Arrays of a model by path, such as `stacks/0/block/mixer/query`."""


@dataclasses.dataclass(frozen=True)
class LayerPlace:
    """Where the arrays of a layer are.

    Attributes:
      prefix: of their paths.
      index: of the layer on the leading axes of its stack.
      num_experts: of the layer; 0 where it is dense.
    """

    prefix: str
    index: tuple[int, ...]
    num_experts: int

    def arrays_of(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns views of the layer's part of each array, by the path within the layer."""
        views = {}
        for name, array in arrays.items():
            if name.startswith(self.prefix):
                views[name.removeprefix(self.prefix)] = array[self.index]
        return views


def layer_places(config: Config) -> Iterator[LayerPlace]:
    """Yields the place of each layer, in the order of the model."""
    for number, group in enumerate(config.layer_groups):
        stack = f"stacks/{number}/block/"
        num_dense = len(group.kinds) - 1
        num_experts = 0 if group.moe is None else group.moe.num_experts
        for block in range(group.num):
            for layer in range(num_dense):
                yield LayerPlace(f"{stack}dense/block/", (block, layer), 0)
            last = f"{stack}moe_block/" if num_dense else stack
            yield LayerPlace(last, (block,), num_experts)


def named_arrays(state: Any) -> Arrays:
    """Returns the arrays of a model's state by path, in the order of its leaves."""
    arrays = {}
    for path, array in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        arrays[name.removesuffix("/value")] = array
    return arrays


def arrays_with_tensors(
    config: Config, family: Family, arrays: Arrays
) -> Iterator[tuple[str, np.ndarray, list[Tensor]]]:
    """Yields each array of a model, layer by layer: its path, a view, and its tensors.

    Args:
      config: of the model.
      family: whose tables say which tensors.
      arrays: of the model, by path.
    """
    yield from _with_tensors(family.outer, 0, arrays, "")
    for layer, place in enumerate(layer_places(config)):
        prefix = family.prefix.format(layer=layer)
        tensors = (*family.layer, *(family.moe if place.num_experts else family.dense))
        named = [dataclasses.replace(each, theirs=prefix + each.theirs) for each in tensors]
        yield from _with_tensors(named, place.num_experts, place.arrays_of(arrays), place.prefix)


def _with_tensors(
    tensors: Sequence[Tensor], num_experts: int, arrays: Arrays, prefix: str
) -> Iterator[tuple[str, np.ndarray, list[Tensor]]]:
    by_array: dict[str, list[Tensor]] = {}
    present = [tensor for tensor in tensors if tensor.is_among(arrays)]
    for tensor in expand(present, num_experts):
        by_array.setdefault(tensor.ours, []).append(tensor)
    for name, parts in by_array.items():
        if name not in arrays:
            raise HfError(f"the model has no array {prefix}{name} for {parts[0].theirs}")
        yield prefix + name, arrays[name], parts
