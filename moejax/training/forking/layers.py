"""Arrays of a model by layer, whatever stacks hold them."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stack holds the arrays of some layers.

    Attributes:
      prefix: the beginning of their paths, such as `stacks/0/block`.
      layers: numbers of the layers, in the shape of the leading axes of the arrays.
      is_moe: whether they are MoE layers.
    """

    prefix: str
    layers: np.ndarray
    is_moe: bool


def places_of(config: Config) -> list[Place]:
    """Returns the places of a model's layers."""
    places = []
    first = 0
    for stack, group in enumerate(config.layer_groups):
        num_kinds = len(group.kinds)
        layers = first + np.arange(group.num * num_kinds).reshape(group.num, num_kinds)
        first += layers.size
        is_moe = group.moe is not None
        if num_kinds == 1:
            places.append(Place(f"stacks/{stack}/block", layers[:, 0], is_moe))
            continue
        places.append(Place(f"stacks/{stack}/block/dense/block", layers[:, :-1], False))
        places.append(Place(f"stacks/{stack}/block/moe_block", layers[:, -1], is_moe))
    return places


def split_path(path: str, places: list[Place]) -> tuple[Place | None, str]:
    """Returns the place of an array and its path within a layer; None outside of layers."""
    # The longest prefix: that of an interleaved block begins like the stack's own.
    for place in sorted(places, key=lambda place: -len(place.prefix)):
        if path.startswith(f"{place.prefix}/"):
            return place, path.removeprefix(f"{place.prefix}/")
    return None, path


class ByLayer:
    """The arrays of a model, to be read by layer.

    Args:
      arrays: by path.
      config: of the model.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], config: Config):
        self._rows: dict[str, list[np.ndarray]] = {}
        self._parts: dict[str, list[jax.Array]] = {}
        places = places_of(config)
        for path, array in arrays.items():
            place, own = split_path(path, places)
            if place is not None:
                num_axes = place.layers.ndim
                flat = array.reshape(-1, *array.shape[num_axes:])
                self._rows.setdefault(own, []).append(place.layers.reshape(-1))
                self._parts.setdefault(own, []).append(flat)

    def read(self, own: str, layers: np.ndarray) -> jax.Array | None:
        """Returns an array of some layers, with leading axes of the shape of their numbers.

        None if one of them has no array of that path.
        """
        if own not in self._rows:
            return None
        rows = np.concatenate(self._rows[own])
        if not np.isin(layers, rows).all():
            return None
        order = np.argsort(rows)
        wanted = order[np.searchsorted(rows, layers.reshape(-1), sorter=order)]
        parts = self._parts[own]
        joined = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return joined[wanted].reshape(*layers.shape, *joined.shape[1:])
