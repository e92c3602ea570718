"""Tables of the tensors of a checkpoint, and how each is laid out in ours.

A layout is two patterns of axis names, as einops has them: `"(H A) D"` of theirs and `"D H A"` of
ours. In ours a number or `{expert}` is an index, so that one array of ours is made of several
tensors: gate and up projections of each expert are parts of one array. Tensors of one name are the
rows of one tensor, in the order of the table: queries, keys and values may be stored together.
"""

import dataclasses
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence

import einops
import numpy as np

from moejax.interop.hf.errors import HfError

INDEX = re.compile(r"\d+|\{\w+\}")

CACHE_LINE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a layer, or several of one form.

    Attributes:
      theirs: its name; `{expert}` stands for each expert.
      their_axes: its axes.
      ours: the path of our array, within a layer or the model.
      our_axes: its axes, of which some may be indices.
      only_with: the path of an array of ours without which there is no such tensor.
      only_without: the path of one with which there is none.
      first_row: of theirs, where it is some rows of a tensor.
      num_rows: of that tensor; 0 where it is all of it.
    """

    theirs: str
    their_axes: str
    ours: str
    our_axes: str
    only_with: str = ""
    only_without: str = ""
    first_row: int = 0
    num_rows: int = 0

    def is_among(self, ours: Container[str]) -> bool:
        """Whether there is such a tensor next to these arrays of ours."""
        if self.only_with and self.only_with not in ours:
            return False
        return not self.only_without or self.only_without not in ours

    @property
    def is_per_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.theirs

    def of_expert(self, expert: int) -> "Tensor":
        """Returns the tensor of one expert."""
        return dataclasses.replace(
            self,
            theirs=self.theirs.format(expert=expert),
            our_axes=self.our_axes.replace("{expert}", str(expert)),
        )

    @property
    def expert(self) -> int | None:
        """The expert of whose part of our array it is; None if it is one of all."""
        first = self._our_names()[0]
        return int(first) if first.isdigit() else None

    def place(self) -> tuple[int | slice, ...]:
        """Returns which part of our array it is."""
        return tuple(int(axis) if axis.isdigit() else slice(None) for axis in self._our_names())

    def check_shape(self, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
        """Raises `HfError` for a tensor of another shape.

        Args:
          shape: of theirs.
          sizes: of our axes by name.
        """
        num_rows, *others = self.their_shape(sizes)
        expected = (self.num_rows or num_rows, *others)
        if shape != expected:
            raise HfError(f"{self.theirs} has shape {shape}; by config.json it must be {expected}")

    def rows_of_first(self, sizes: Mapping[str, int]) -> int:
        """Returns how many of their rows belong to an index of our first axis.

        Returns:
          0 where rows are in another order than ours.
        """
        first, *others = self._their_groups()[0]
        if first != self._our_names()[0]:
            return 0
        return math.prod(sizes[name] for name in others)

    def to_ours(self, tensor: np.ndarray, part: np.ndarray, sizes: Mapping[str, int]) -> None:
        """Fills a part of our array with the tensor.

        Args:
          tensor: theirs, of their shape.
          part: of our array.
          sizes: of our axes by name.
        """
        copy_in_blocks(part, self._in_our_order(tensor.astype(part.dtype, copy=False), sizes))

    def to_theirs(self, part: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the part of our array as their tensor."""
        tensor = np.empty(self.their_shape(sizes), part.dtype)
        copy_in_blocks(self._in_our_order(tensor, sizes), part)
        return tensor

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of their tensor."""
        sizes = {"1": 1, **sizes}
        shape = []
        for names in self._their_groups():
            shape.append(math.prod(sizes[name] for name in names))
        return tuple(shape)

    def sizes_in(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Returns the sizes of our axes by name, from the shape of our array."""
        pairs = zip(self._our_names(), shape, strict=True)
        return {name: size for name, size in pairs if not INDEX.fullmatch(name)}

    def _in_our_order(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Returns a view of their tensor, with our axes."""
        pattern = f"{self.their_axes} -> {self._free_axes()}"
        return einops.rearrange(tensor, pattern, **self._named(sizes))

    def _their_groups(self) -> list[list[str]]:
        """Returns the names that make each of their axes."""
        groups = re.findall(r"\([^)]*\)|\S+", self.their_axes)
        return [group.strip("()").split() for group in groups]

    def _our_names(self) -> list[str]:
        return self.our_axes.split()

    def _free_axes(self) -> str:
        return " ".join(name for name in self._our_names() if not INDEX.fullmatch(name))

    def _named(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Returns the sizes of the axes that the patterns name."""
        names = set(re.findall(r"[A-Za-z]+", self.their_axes))
        return {name: sizes[name] for name in names}


def copy_in_blocks(target: np.ndarray, source: np.ndarray) -> None:
    """Copies an array into another of its shape, whose axes may lie in another order in memory.

    What is copied at once is a line of the processor's cache wide. NumPy by itself would go along
    whole rows of one of the two and use each line of the other for one element, then fetch it
    again: eight times as long for a matrix of 2,048 rows.
    """
    axis = int(np.argmin(target.strides)) if target.ndim else 0
    step = CACHE_LINE_BYTES // target.itemsize
    if not target.ndim or source.strides[axis] == source.itemsize:
        target[...] = source
        return
    targets, sources = np.moveaxis(target, axis, 0), np.moveaxis(source, axis, 0)
    for start in range(0, len(targets), step):
        targets[start : start + step] = sources[start : start + step]


def expand(tensors: Sequence[Tensor], num_experts: int) -> Iterator[Tensor]:
    """Yields the tensors of a layer one by one, those of experts for each of them."""
    for tensor in tensors:
        if not tensor.is_per_expert:
            yield tensor
            continue
        for expert in range(num_experts):
            yield tensor.of_expert(expert)


def share_rows(tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Returns tensors in which those of one name know their rows.

    Args:
      tensors: of a layer.
      shapes: of our arrays by path, of which some may be absent.
    """
    by_name: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_name.setdefault(tensor.theirs, []).append(tensor)
    found = []
    for parts in by_name.values():
        found += parts if len(parts) == 1 else _rows_of(parts, shapes)
    return found


def _rows_of(parts: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Returns the parts of one tensor with their rows."""
    sizes = []
    for part in parts:
        shape = part.their_shape(part.sizes_in(shapes[part.ours]))
        sizes.append(shape[0])
    with_rows = []
    for number, part in enumerate(parts):
        first = sum(sizes[:number])
        with_rows.append(dataclasses.replace(part, first_row=first, num_rows=sum(sizes)))
    return with_rows


def only_with(ours: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns tensors that are there only with an array of ours."""
    return tuple(dataclasses.replace(tensor, only_with=ours) for tensor in tensors)
