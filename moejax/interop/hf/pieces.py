"""A model in pieces: which tensors, or which rows of a tensor, fill which region of which array.

A piece is small: an expert's projections, a projection of a layer, or some rows of a large tensor.
So a model is read, written and converted piece by piece, in memory that does not grow with it.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from moejax.config import Config
from moejax.interop.hf.errors import HfError
from moejax.interop.hf.family import Family
from moejax.interop.hf.files.quantized import Source
from moejax.interop.hf.files.weights import Weights
from moejax.interop.hf.places import Part, Shapes, parts_of
from moejax.interop.hf.tensors import Tensor

PIECE_BYTES = 2**25
"""From which size on a tensor is read in several pieces, in bytes of float32."""

Place = tuple[int | slice, ...]
"""A region of an array."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A region of an array, and the tensors that fill it.

    Attributes:
      array: the path of the array.
      place: the region.
      shape: of the region.
      tensors: that it is made of.
      rows: of the only tensor of which the region is a part; None where tensors are complete.
    """

    array: str
    place: Place
    shape: tuple[int, ...]
    tensors: Sequence[Tensor]
    rows: slice | None = None

    def to_ours(self, sources: Mapping[str, Source], dtype: np.dtype) -> np.ndarray:
        """Reads the tensors; returns the values of the region.

        Args:
          sources: the tensors by name.
          dtype: of the array.

        Raises:
          HfError: a tensor cannot be read, or holds values that are not finite.
        """
        values = np.empty(self.shape, dtype)
        for tensor, place, sizes in self._tensors_in_place():
            theirs = sources[tensor.theirs].read(self.rows)
            tensor.to_ours(theirs, values[(*place, ...)], sizes)
        return values

    def to_theirs(self, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors that the values of the region are published as: names and values."""
        for tensor, place, sizes in self._tensors_in_place():
            yield tensor.theirs, tensor.to_theirs(values[(*place, ...)], sizes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors, by name."""
        return {
            tensor.theirs: tensor.their_shape(sizes)
            for tensor, _, sizes in self._tensors_in_place()
        }

    def _tensors_in_place(self) -> Iterator[tuple[Tensor, Place, dict[str, int]]]:
        """Yields each tensor, its place in the region, and the sizes of its axes."""
        for tensor in self.tensors:
            is_of_expert = tensor.expert is not None
            whole = (1, *self.shape) if is_of_expert else self.shape
            place = tensor.place()[1:] if is_of_expert else tensor.place()
            yield tensor, place, tensor.sizes_in(whole)


def pieces_of(
    config: Config, family: Family, shapes: Shapes, max_bytes: float = math.inf
) -> Iterator[Piece]:
    """Yields all pieces of a model, layer by layer.

    Args:
      config: of the model.
      family: whose tables say which tensors.
      shapes: of the model's arrays, by path.
      max_bytes: from which size on a tensor is divided by rows, in bytes of float32.

    Raises:
      HfError: a tensor to which no array belongs.
    """
    for part in parts_of(config, family, shapes):
        for expert, tensors in _by_expert(part.tensors).items():
            if expert is not None:
                place = (*part.index, expert)
                yield Piece(part.array, place, part.shape[1:], tensors)
            elif len(tensors) == 1:
                yield from _rows(part, tensors[0], max_bytes)
            else:
                yield Piece(part.array, part.index, part.shape, tensors)


def _by_expert(tensors: Iterable[Tensor]) -> dict[int | None, list[Tensor]]:
    by_expert: dict[int | None, list[Tensor]] = {}
    for tensor in tensors:
        by_expert.setdefault(tensor.expert, []).append(tensor)
    return by_expert


def _rows(part: Part, tensor: Tensor, max_bytes: float) -> Iterator[Piece]:
    """Yields pieces of a tensor, divided along our first axis if it is large."""
    num_bytes = 4 * math.prod(part.shape)
    sizes = tensor.sizes_in(part.shape)
    unit = tensor.rows_of_first(sizes)
    first = tensor.first_row
    if num_bytes <= max_bytes or not unit:
        own = slice(first, first + tensor.their_shape(sizes)[0])
        rows = own if tensor.num_rows else None
        yield Piece(part.array, part.index, part.shape, [tensor], rows)
        return
    size = part.shape[0]
    step = max(1, int(size * max_bytes // num_bytes))
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield Piece(
            part.array,
            (*part.index, slice(start, stop)),
            (stop - start, *part.shape[1:]),
            [tensor],
            slice(first + start * unit, first + stop * unit),
        )


def join_rows(
    named: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors by name, of which the rows may come in several arrays, one after the other."""
    for name, pairs in itertools.groupby(named, key=operator.itemgetter(0)):
        parts = [values for _, values in pairs]
        yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)


def claim_tensors(
    config: Config, family: Family, shapes: Shapes, weights: Weights
) -> dict[str, Source]:
    """Returns the tensors of a model by name, none of which is read yet.

    Raises:
      HfError: a tensor that is missing or has another shape, or an array that tensors do not fill
        completely.
    """
    sources: dict[str, Source] = {}
    num_filled: dict[str, int] = {}
    for part in parts_of(config, family, shapes):
        for tensor in part.tensors:
            if not tensor.first_row:  # others are further rows of one that was claimed
                sources[tensor.theirs] = weights.claim(tensor.theirs)
            sizes = tensor.sizes_in(part.shape)
            tensor.check_shape(sources[tensor.theirs].shape, sizes)
            num = num_filled.get(part.array, 0)
            num_filled[part.array] = num + math.prod(tensor.their_shape(sizes))
    for name, num in num_filled.items():
        size = math.prod(shapes[name])
        if num != size:
            raise HfError(
                f"{name} would be filled with {num} of {size} numbers: the family's table of "
                "tensors does not cover it once"
            )
    return sources


def filled_arrays(config: Config, family: Family, shapes: Shapes) -> set[str]:
    """Returns the paths of the arrays that tensors fill."""
    return {part.array for part in parts_of(config, family, shapes)}
