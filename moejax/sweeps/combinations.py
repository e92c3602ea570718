"""Spaces that are made of other spaces: `product`, `zip_`, `chain` and `where`."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moejax.sweeps.space import Point, Space, SpaceError


def product(*spaces: Any) -> Space:
    """Returns every combination of the points of several spaces; the rightmost changes fastest.

    Raises:
      SpaceError: a key is in several of them: at once where they are axes, else when the product
        is iterated.
    """
    return _Product(_as_spaces("product", spaces))


def zip_(*spaces: Any) -> Space:
    """Returns the first points of all spaces joined, then the second ones, and so on.

    Raises:
      SpaceError: when it is iterated, if the spaces differ in length or share a key.
    """
    return _Zip(_as_spaces("zip_", spaces))


def chain(*spaces: Any) -> Space:
    """Returns all points of the first space, then those of the second, and so on.

    The spaces may have different keys.
    """
    return _Chain(_as_spaces("chain", spaces))


def where(space: Any, predicate: Callable[[Point], bool]) -> Space:
    """Returns the points for which `predicate(point)` holds, found when they are iterated.

    Raises:
      SpaceError: when it is iterated, if the predicate raises.
    """
    return _Where(_as_space("where", space), predicate)


@dataclasses.dataclass(frozen=True)
class _Listed(Space):
    points: tuple[Point, ...]

    @property
    def size(self):
        return len(self.points)

    def __iter__(self):
        return iter(self.points)


class _Product(Space):
    def __init__(self, spaces: Sequence[Space]):
        self.spaces = spaces
        keys = [key for space in spaces for key in _axis_keys(space)]
        for key in keys:
            if keys.count(key) > 1:
                raise _key_twice("product", key)

    @property
    def axes(self):
        known = [space.axes for space in self.spaces if space.axes is not None]
        if len(known) < len(self.spaces):
            return None
        return tuple(itertools.chain.from_iterable(known))

    @property
    def is_filtered(self):
        return any(space.is_filtered for space in self.spaces)

    @property
    def size(self):
        known = [space.size for space in self.spaces if space.size is not None]
        return math.prod(known) if len(known) == len(self.spaces) else None

    def allows(self, point):
        for space in self.spaces:
            own_point = {key: point[key] for key in _axis_keys(space)}
            if not space.allows(own_point):
                return False
        return True

    def __iter__(self):
        if not self.spaces:
            yield {}
            return
        first, *others = self.spaces
        rest = _Product(others)
        for point in first:
            for other in rest:
                yield _join("product", point, other)


@dataclasses.dataclass(frozen=True)
class _Zip(Space):
    spaces: Sequence[Space]

    def __iter__(self):
        columns = [list(space) for space in self.spaces]
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            shown = ", ".join(map(str, lengths))
            raise SpaceError(f"zip_: its spaces have {shown} points; give each the same number")
        for points in zip(*columns, strict=True):
            joined: Point = {}
            for point in points:
                joined = _join("zip_", joined, point)
            yield joined


@dataclasses.dataclass(frozen=True)
class _Chain(Space):
    spaces: Sequence[Space]

    def __iter__(self):
        return itertools.chain.from_iterable(self.spaces)


@dataclasses.dataclass(frozen=True)
class _Where(Space):
    space: Space
    predicate: Callable[[Point], bool]

    @property
    def axes(self):
        return self.space.axes

    @property
    def is_filtered(self):
        return True

    def allows(self, point):
        return self.space.allows(point) and self._holds(point)

    def __iter__(self):
        return (point for point in self.space if self._holds(point))

    def _holds(self, point: Mapping[str, Any]) -> bool:
        try:
            return bool(self.predicate(dict(point)))
        except Exception as error:  # the predicate is the recipe's: it may raise anything
            code = getattr(self.predicate, "__code__", None)
            place = f"of {code.co_filename}, line {code.co_firstlineno}, " if code else ""
            raise SpaceError(
                f"where: the predicate {place}raised {type(error).__name__}: {error}, "
                f"for the point {dict(point)}"
            ) from error


def _axis_keys(space: Space) -> list[str]:
    """Returns the keys of a space's axes; none for a space that is no product of axes."""
    return [axis.key for axis in space.axes or ()]


def _as_spaces(name: str, spaces: Iterable[Any]) -> tuple[Space, ...]:
    return tuple(_as_space(name, space) for space in spaces)


def _as_space(name: str, space: Any) -> Space:
    """Returns a space as it is, and points as a space of them.

    A generator, which can be iterated only once, becomes a list.

    Args:
      name: of the caller, for errors.
      space: a space, or an iterable of points.
    """
    if isinstance(space, Space):
        return space
    points: tuple[Any, ...] = ()
    if isinstance(space, Iterable) and not isinstance(space, (Mapping, str)):
        points = tuple(space)
    if not points or not all(isinstance(point, Mapping) for point in points):
        raise SpaceError(
            f"{name}: {space!r} is no space; give axes such as choice('moe.top_k', 1, 2), "
            "or a list of points such as [{'moe.top_k': 1}]"
        )
    return _Listed(points)


def _join(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Point:
    for key in first:
        if key in second:
            raise _key_twice(name, key)
    return {**first, **second}


def _key_twice(name: str, key: str) -> SpaceError:
    return SpaceError(
        f"{name}: {key} is in several of its spaces; leave all but one out, or chain them"
    )
