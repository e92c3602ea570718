"""Tables of the tensors of a checkpoint, and how each is laid out in ours.

A layout is two patterns of axis names, as einops has them: `"(H A) D"` of theirs and `"D H A"` of
ours. In ours a number or `{expert}` is an index, so that one array of ours is made of several
tensors: gate and up projections of each expert are parts of one array.
"""

import dataclasses
import re
from collections.abc import Container, Iterator, Mapping, Sequence

import einops
import numpy as np

from moejax.interop.hf.errors import HfError

INDEX = re.compile(r"\d+|\{\w+\}")


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
    """

    theirs: str
    their_axes: str
    ours: str
    our_axes: str
    only_with: str = ""
    only_without: str = ""

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

    def place(self) -> tuple[int | slice, ...]:
        """Returns which part of our array it is."""
        return tuple(int(axis) if axis.isdigit() else slice(None) for axis in self._our_names())

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the tensor as the part of our array.

        Args:
          tensor: theirs.
          sizes: of our axes by name.

        Raises:
          HfError: a tensor of another shape.
        """
        expected = self.their_shape(sizes)
        if tensor.shape != expected:
            raise HfError(
                f"{self.theirs} has shape {tensor.shape}; by config.json it must be {expected}"
            )
        pattern = f"{self.their_axes} -> {self._free_axes()}"
        return einops.rearrange(tensor, pattern, **self._named(sizes))

    def to_theirs(self, part: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Returns the part of our array as their tensor."""
        pattern = f"{self._free_axes()} -> {self.their_axes}"
        return einops.rearrange(part, pattern, **self._named(sizes))

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of their tensor."""
        sizes = {"1": 1, **sizes}
        shape = []
        for group in re.findall(r"\([^)]*\)|\S+", self.their_axes):
            names = group.strip("()").split()
            shape.append(int(np.prod([sizes[name] for name in names])))
        return tuple(shape)

    def sizes_in(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Returns the sizes of our axes by name, from the shape of our array."""
        pairs = zip(self._our_names(), shape, strict=True)
        return {name: size for name, size in pairs if not INDEX.fullmatch(name)}

    def _our_names(self) -> list[str]:
        return self.our_axes.split()

    def _free_axes(self) -> str:
        return " ".join(name for name in self._our_names() if not INDEX.fullmatch(name))

    def _named(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Returns the sizes of the axes that the patterns name."""
        names = set(re.findall(r"[A-Za-z]+", self.their_axes))
        return {name: sizes[name] for name in names}


def expand(tensors: Sequence[Tensor], num_experts: int) -> Iterator[Tensor]:
    """Yields the tensors of a layer one by one, those of experts for each of them."""
    for tensor in tensors:
        if not tensor.is_per_expert:
            yield tensor
            continue
        for expert in range(num_experts):
            yield tensor.of_expert(expert)


def only_with(ours: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns tensors that are there only with an array of ours."""
    return tuple(dataclasses.replace(tensor, only_with=ours) for tensor in tensors)


class Target:
    """An array of ours that is filled from tensors.

    Args:
      name: for messages.
      array: in which a part for each tensor is filled.
    """

    def __init__(self, name: str, array: np.ndarray):
        self.name = name
        self._array = array
        self._num_filled = 0

    def fill(self, tensor: Tensor, values: np.ndarray) -> None:
        """Fills the part of the array that a tensor is."""
        sizes = tensor.sizes_in(self._array.shape)
        part = tensor.to_ours(values, sizes)
        self._array[tensor.place()] = part
        self._num_filled += part.size

    def check_filled(self) -> None:
        """Raises `HfError` unless as many numbers were filled as there are."""
        if self._num_filled != self._array.size:
            raise HfError(
                f"{self.name} was filled with {self._num_filled} of {self._array.size} numbers: "
                "the family's table of tensors does not cover it once"
            )
