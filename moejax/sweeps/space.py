"""Spaces: iterables of the points that a sweep trains.

A point is a dict of dotted config keys to values: what an arm overrides in the recipe. A space is
an iterable of points that can be iterated again; a list of points can stand for one. Axes are
spaces of one key (`axes.py` makes them); `combinations.py` makes spaces of other spaces. A range
holds infinitely many points, so it cannot be iterated: a search draws values from it.
"""

import abc
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LOOKED_AT = 10_000  # points, to see which keys vary

Point = dict[str, Any]
"""What an arm overrides: values by dotted key, such as `{"moe.num_experts": 16}`."""


class SpaceError(ValueError):
    """A space that has no points, or that cannot be what was meant."""


class Space(abc.ABC):
    """An iterable of points that can be iterated again."""

    @property
    def axes(self) -> "tuple[Axis, ...] | None":
        """The axes of which it holds every combination that it `allows`.

        None for a space that is no product of axes.
        """
        return None

    @property
    def is_filtered(self) -> bool:
        """Whether it contains a `where`, so that `allows` may leave points out."""
        return False

    @property
    def size(self) -> int | None:
        """The number of its points; None where only iterating over them tells."""
        return None

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Point]:
        """Yields the points, in order.

        Raises:
          SpaceError: its points cannot be listed.
        """

    def allows(self, point: Mapping[str, Any]) -> bool:
        """Whether a combination of values of all axes is in the space: no `where` excludes it."""
        return True


@dataclasses.dataclass(frozen=True)
class Choice(Space):
    """An axis of listed values."""

    key: str
    values: tuple[Any, ...]

    def __iter__(self) -> Iterator[Point]:
        """Yields one point for each value."""
        return ({self.key: value} for value in self.values)

    @property
    def axes(self) -> "tuple[Axis, ...]":
        """The axis itself."""
        return (self,)

    @property
    def size(self) -> int:
        """The number of its values."""
        return len(self.values)


@dataclasses.dataclass(frozen=True)
class Range(Space):
    """An axis of all numbers between two, ends included, for a search to draw from.

    Attributes:
      key: of a leaf that is a float.
      low: the smallest.
      high: the largest.
      is_log: whether draws are uniform in the logarithm.
    """

    key: str
    low: float
    high: float
    is_log: bool

    def __iter__(self) -> Iterator[Point]:
        """Raises `SpaceError`: the points of a range cannot be listed."""
        kind = "log" if self.is_log else "lin"
        as_grid = f"{self.key}={kind}:{self.low:g}..{self.high:g}:5"
        raise SpaceError(
            f"{self.key} is a range from {self.low:g} to {self.high:g}, "
            "which has no list of points; give the number of values of a grid "
            f"(num=5, on the command line {as_grid}), "
            "or let a search draw from it (--search=random)"
        )

    @property
    def axes(self) -> "tuple[Axis, ...]":
        """The axis itself."""
        return (self,)


Axis = Choice | Range
"""A space of one key."""


def varied_keys(space: Iterable[Mapping[str, Any]]) -> set[str]:
    """Returns the keys that a space's points set.

    Where it is no product of axes, the first `LOOKED_AT` points are looked at.
    """
    axes = space.axes if isinstance(space, Space) else None
    if axes is not None:
        return {axis.key for axis in axes}
    keys: set[str] = set()
    for point in itertools.islice(space, LOOKED_AT):
        keys.update(map(str, point))
    return keys
