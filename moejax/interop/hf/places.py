"""Where the arrays of each layer are in a model whose layers are stacked."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import Config
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.tensors import Tensor, expand, share_rows

Arrays = dict[str, np.ndarray]
"""Arrays of a model by path, such as `stacks/0/block/mixer/query`."""

Shapes = dict[str, tuple[int, ...]]
"""Their shapes."""


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

    def shapes_of(self, shapes: Shapes) -> Shapes:
        """Returns the shape of the layer's part of each array, by the path within the layer."""
        own = {}
        for name, shape in shapes.items():
            if name.startswith(self.prefix):
                own[name.removeprefix(self.prefix)] = shape[len(self.index) :]
        return own


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of an array that belongs to one layer, or an array outside of the layers.

    Attributes:
      array: the path of the array.
      index: of the layer on the leading axes.
      shape: of the part.
      tensors: that it is published as, by their complete names.
    """

    array: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    tensors: Sequence[Tensor]


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


def named_arrays(state: Any) -> dict[str, Any]:
    """Returns the arrays of a model's state by path, in the order of its leaves."""
    arrays = {}
    for path, array in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        arrays[name.removesuffix("/value")] = array
    return arrays


def shapes_of(arrays: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of arrays, which may be abstract."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def parts_of(config: Config, family: Family, shapes: Shapes) -> Iterator[Part]:
    """Yields each array of a model that has tensors, layer by layer.

    Args:
      config: of the model.
      family: whose tables say which tensors.
      shapes: of the model's arrays, by path.

    Raises:
      HfError: a tensor to which no array belongs.
    """
    outside = LayerPlace("", (), 0)
    yield from _parts_in(outside, family.outer, shapes)
    for layer, place in enumerate(layer_places(config)):
        prefix = family.prefix.format(layer=layer)
        tensors = (*family.layer, *(family.moe if place.num_experts else family.dense))
        named = [dataclasses.replace(each, theirs=prefix + each.theirs) for each in tensors]
        yield from _parts_in(place, named, place.shapes_of(shapes))


def _parts_in(place: LayerPlace, tensors: Sequence[Tensor], shapes: Shapes) -> Iterator[Part]:
    by_array: dict[str, list[Tensor]] = {}
    present = [tensor for tensor in tensors if tensor.is_among(shapes)]
    expanded = expand(present, place.num_experts)
    for tensor in share_rows([*expanded], shapes):
        by_array.setdefault(tensor.ours, []).append(tensor)
    for name, own in by_array.items():
        if name not in shapes:
            raise HfError(f"the model has no array {place.prefix}{name} for {own[0].theirs}")
        yield Part(place.prefix + name, place.index, shapes[name], own)
