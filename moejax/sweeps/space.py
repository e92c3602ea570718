"""What a sweep varies: points, and spaces that are made of axes.

A point is a dict of dotted config keys to values: what an arm overrides in the recipe. A space is
an iterable of points that can be iterated again; a list of points can stand for one. Axes are
spaces of one key, and functions put spaces together: `product`, `zip_`, `chain`, `where`. Ranges
have no points to go through; a search draws values from them.
"""

import abc
import csv
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moejax.config import ConfigError, check_key, leaves, read_value

LOOKED_AT = 10_000  # points, to see which keys vary

Point = dict[str, Any]
"""What an arm overrides: values by dotted key, such as `{"moe.num_experts": 16}`."""

SIGNIFICANT_DIGITS = 6  # of values of a grid, so that they read well and give the same arm anywhere


class SpaceError(ValueError):
    """A space that has no points, or another one than was meant."""


class Space(abc.ABC):
    """An iterable of points that can be iterated again."""

    @property
    def axes(self) -> "tuple[Axis, ...] | None":
        """Of which it holds every combination that it `allows`; None where it is no product of axes."""
        return None

    @property
    def is_filtered(self) -> bool:
        """Whether `where` is in it: `allows` may leave points out."""
        return False

    @property
    def size(self) -> int | None:
        """The number of its points; None where only going through them tells."""
        return None

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Point]:
        """The points, in order.

        Raises:
          SpaceError: it cannot be gone through.
        """

    def allows(self, point: Mapping[str, Any]) -> bool:
        """Whether a combination of values of all axes is in the space; False if `where` left it out."""
        return True


@dataclasses.dataclass(frozen=True)
class Choice(Space):
    """An axis of listed values."""

    key: str
    values: tuple[Any, ...]

    def __iter__(self) -> Iterator[Point]:
        """One point for each value."""
        return ({self.key: value} for value in self.values)

    @property
    def axes(self) -> "tuple[Axis, ...]":
        """Itself."""
        return (self,)

    @property
    def size(self) -> int:
        """One for each value."""
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
        """Always an error."""
        raise SpaceError(
            f"{self.key} is a range from {self.low:g} to {self.high:g}, which cannot be gone through; give the number "
            f"of values of a grid (num=5, on the command line {self.key}={'log' if self.is_log else 'lin'}:"
            f"{self.low:g}..{self.high:g}:5), or let a search draw from it (--search=random)"
        )

    @property
    def axes(self) -> "tuple[Axis, ...]":
        """Itself."""
        return (self,)


Axis = Choice | Range
"""A space of one key."""


def choice(key: str, *values: Any) -> Choice:
    """An axis of listed values.

    Raises:
      ConfigError: `key` is no leaf.
      SpaceError: there are no values.
    """
    check_key(key)
    if not values:
        raise SpaceError(
            f"{key} has no values to choose from; give some, as in choice({key!r}, 1, 2)"
        )
    return Choice(key, values)


def log_uniform(key: str, low: float, high: float, num: int | None = None) -> Axis:
    """An axis of numbers in equal ratios: a grid of `num` values, ends included, or without `num` a range to search.

    Raises:
      ConfigError: `key` is no leaf.
      SpaceError: the leaf is no float, or the numbers make no range.
    """
    return _interval(key, low, high, num, is_log=True)


def uniform(key: str, low: float, high: float, num: int | None = None) -> Axis:
    """As `log_uniform`, in equal steps."""
    return _interval(key, low, high, num, is_log=False)


def seeds(number: int) -> Choice:
    """`train.seed` from 0 on.

    Raises:
      SpaceError: none at all.
    """
    if number < 1:
        raise SpaceError(f"seeds({number}) has no seeds; use 1 or more")
    return choice("train.seed", *range(number))


def product(*spaces: Any) -> Space:
    """Every combination of their points; the rightmost changes fastest.

    Raises:
      SpaceError: a key is in several of them: at once where they are axes, else when they are
        gone through.
    """
    return _Product(_spaces("product", spaces))


def zip_(*spaces: Any) -> Space:
    """The first points of all together, then the second ones, and so on.

    Raises:
      SpaceError: when they are gone through, if they differ in length or share a key.
    """
    return _Zip(_spaces("zip_", spaces))


def chain(*spaces: Any) -> Space:
    """All points of the first, then those of the second, and so on; they may have different keys."""
    return _Chain(_spaces("chain", spaces))


def where(space: Any, predicate: Callable[[Point], bool]) -> Space:
    """The points for which `predicate(point)` holds, found while they are gone through.

    Raises:
      SpaceError: then, if the predicate raises.
    """
    return _Where(_space("where", space), predicate)


def varied_keys(space: Iterable[Mapping[str, Any]]) -> set[str]:
    """The keys that a space's points set; the first points are gone through where it is no product of axes."""
    axes = space.axes if isinstance(space, Space) else None
    if axes is not None:
        return {axis.key for axis in axes}
    return {str(key) for point in itertools.islice(space, LOOKED_AT) for key in point}


def parse_axis(text: str) -> Axis:
    """An axis from the command line.

        moe.num_experts=4,8,16              listed values, in the leaf's type
        moe.router_bias=true,false
        moe.per_layer="","0,1: router=hash" text with commas in it, quoted as in CSV
        moe.balance_weight=log:1e-4..1e-1:5 5 values in equal ratios
        moe.z_weight=lin:0..1e-2:3          3 values in equal steps
        moe.balance_weight=log:1e-4..1e-1   a range for a search

    Raises:
      ConfigError: an unknown key; the nearest is named.
      SpaceError: values that cannot be read.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    if not equals:
        raise SpaceError(f"{text!r} must have the form KEY=VALUES, such as moe.num_experts=4,8,16")
    check_key(key)
    annotation = dict(leaves())[key]
    if annotation is not str and values.strip().startswith(("log:", "lin:")):
        return _parse_interval(text, key, values.strip())
    try:
        texts = next(csv.reader([values], strict=True), []) or [""]
    except csv.Error as error:
        raise SpaceError(
            f'{text!r}: {error}; quote values that hold commas as in CSV: "0,1: router=hash",""'
        ) from error
    return choice(key, *(_parse_value(text, key, value) for value in texts))


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
        keys = [axis.key for space in spaces for axis in space.axes or ()]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise SpaceError(
                f"product: {twice[0]} is in several of its spaces; leave all but one out, or chain them"
            )

    @property
    def axes(self):
        each = [space.axes for space in self.spaces]
        known = [axes for axes in each if axes is not None]
        return tuple(itertools.chain.from_iterable(known)) if len(known) == len(each) else None

    @property
    def is_filtered(self):
        return any(space.is_filtered for space in self.spaces)

    @property
    def size(self):
        known = [space.size for space in self.spaces if space.size is not None]
        return math.prod(known) if len(known) == len(self.spaces) else None

    def allows(self, point):
        for space in self.spaces:
            keys = [axis.key for axis in space.axes or ()]
            if not space.allows({key: point[key] for key in keys}):
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
            raise SpaceError(
                f"zip_: its spaces have {', '.join(map(str, lengths))} points; give each as many"
            )
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
        except Exception as error:  # it is the recipe's: it may raise anything
            code = getattr(self.predicate, "__code__", None)
            place = f"of {code.co_filename}, line {code.co_firstlineno}, " if code else ""
            raise SpaceError(
                f"where: the predicate {place}raised {type(error).__name__}: {error}, for the point {dict(point)}"
            ) from error


def _spaces(name: str, spaces: Iterable[Any]) -> tuple[Space, ...]:
    return tuple(_space(name, space) for space in spaces)


def _space(name: str, space: Any) -> Space:
    """Lists of points as they are, and generators, which can be gone through once, as lists."""
    if isinstance(space, Space):
        return space
    points = (
        () if isinstance(space, (Mapping, str)) or not isinstance(space, Iterable) else tuple(space)
    )
    if not points or not all(isinstance(point, Mapping) for point in points):
        raise SpaceError(
            f"{name}: {space!r} is no space; give axes such as choice('moe.top_k', 1, 2), or a list of points such as "
            "[{'moe.top_k': 1}]"
        )
    return _Listed(points)


def _join(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Point:
    if both := [key for key in first if key in second]:
        raise SpaceError(
            f"{name}: {both[0]} is in several of its spaces; leave all but one out, or chain them"
        )
    return {**first, **second}


def _interval(key: str, low: float, high: float, num: int | None, *, is_log: bool) -> Axis:
    check_key(key)
    annotation = dict(leaves())[key]
    if annotation is not float:
        kind = {int: "a whole number", bool: "True or False"}.get(annotation, "text")
        raise SpaceError(
            f"{key} is {kind}, and ranges are for leaves that may be any number; list its values, as in "
            f"choice({key!r}, ...) or {key}=A,B on the command line"
        )
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not is_log)):
        above = ", the lower above 0," if is_log else ""
        raise SpaceError(
            f"{key} from {low:g} to {high:g} is no range; give two finite numbers{above} rising"
        )
    if num is None:
        return Range(key, float(low), float(high), is_log)
    if num < 2:
        raise SpaceError(f"num={num} of {key} must be at least 2, for a grid has both ends")
    parts = [i / (num - 1) for i in range(1, num - 1)]
    inner = [low * (high / low) ** part if is_log else low + (high - low) * part for part in parts]
    rounded = [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in inner]
    return Choice(key, (float(low), *rounded, float(high)))


def _parse_interval(text: str, key: str, values: str) -> Axis:
    found = re.fullmatch(r"(log|lin):(.+?)\.\.([^:]+)(?::(.+))?", values)
    try:
        if not found:
            raise ValueError
        kind, low, high, num = found.groups()
        numbers = float(low), float(high), None if num is None else int(num)
    except ValueError as error:
        raise SpaceError(
            f"{text!r} must have the form {key}={values[:4]}1e-4..1e-1:5, from..to:number"
        ) from error
    if dict(leaves()).get(key, float) is not float:
        raise SpaceError(
            f"{text}: a range is of fractions, and {key} has none; list values, as in {key}=4,8,16"
        )
    return (log_uniform if kind == "log" else uniform)(key, *numbers)


def _parse_value(text: str, key: str, value: str) -> Any:
    try:
        found = read_value(key, value)
    except ConfigError as error:
        raise SpaceError(f"{text!r}: {error}; separate values by commas") from error
    if isinstance(found, float) and not math.isfinite(found):
        raise SpaceError(
            f"{text!r}: {key}={value} must be a finite number; separate values by commas"
        )
    return found
