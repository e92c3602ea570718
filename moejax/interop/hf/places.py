"""Where the arrays of each layer are in a model whose layers are stacked."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moejax.config import Config


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
