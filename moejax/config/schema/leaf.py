"""What is declared at each leaf: its meaning, its range, and what makes anything read it."""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from moejax.config.errors import ConfigError, format_value, nearest
from moejax.config.schema.needs import Need

LARGEST_INT = 2**31 - 1
"""The largest int32, in which arrays count."""

LARGEST_FLOAT = 1e30
"""A number whose products with other leaves are finite in float32."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is declared of a leaf in addition to its name, type and default.

    Attributes:
      meaning: one line.
      at_least, above, at_most, below: bounds of a number; floats are compared as float32, in which
        they are used.
      also: values outside of the bounds that have a meaning of their own.
      choices: what a text may be, if its type does not say so; a table that grows is looked up each
        time.
      or_file: whether the name of a file, which has a dot or a slash, may be given instead.
      aliases: other names that people use for the choices.
      needs: what must hold so that anything reads the leaf; None if something always does.
      may_be_unread: whether a recipe may set it although nothing reads it, since what it needs is
        chosen at the start of a run (devices), or only watches it. If it is typed on the command
        line, or varied by a sweep, it is refused nevertheless.
    """

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[Any, ...] = ()
    choices: Collection[str] = ()
    or_file: bool = False
    aliases: Mapping[str, str] | None = None
    needs: Need | None = None
    may_be_unread: bool = False


def leaf(default: Any, meaning: str, **declared: Any) -> Any:
    """Returns a dataclass field with a `Leaf`, whose other attributes are keywords."""
    return dataclasses.field(default=default, metadata={"leaf": Leaf(meaning, **declared)})


def leaf_of(field: dataclasses.Field[Any]) -> Leaf:
    """Returns what is declared of a field made by `leaf`."""
    return field.metadata["leaf"]


# Types
# -------------------------------------------------------------------------------------------------

TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
}
"""What messages call the types of leaves."""


def choices_of(declared: Leaf, annotation: Any) -> tuple[str, ...]:
    """Returns the values that a leaf of text may have; none if it may have any."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(declared.choices)


def type_text(declared: Leaf, annotation: Any) -> str:
    """Returns the kind of value that a leaf takes, in words: "a whole number"."""
    choices = choices_of(declared, annotation)
    if not choices:
        return TYPE_NAMES[annotation]
    or_file = ", or the name of a file" if declared.or_file else ""
    return f"one of {', '.join(choices)}{or_file}"


def names_file(value: Any) -> bool:
    """Whether a value is the name of a file rather than a choice; nothing needs to be there."""
    return isinstance(value, str) and ("/" in value or "." in value)


def check_value(key: str, value: Any, declared: Leaf, annotation: Any) -> Any:
    """Returns the value of a leaf, of its type and within its range.

    Raises:
      ConfigError: another type, another choice, or a number out of range.
    """
    choices = choices_of(declared, annotation)
    if choices:
        return _check_choice(key, value, declared, annotation)
    if annotation is float and type(value) is int:
        value = _to_float(key, value, declared)
    if type(value) is not annotation:
        given = TYPE_NAMES.get(type(value), type(value).__name__)
        raise ConfigError(
            f"{key}={format_value(repr(value))} is {given}; it must be {TYPE_NAMES[annotation]}"
        )
    if annotation in (int, float):
        check_range(key, value, declared)
    return value


def parse_value(key: str, text: str, declared: Leaf, annotation: Any) -> Any:
    """Returns the value of a leaf from text; its range is not checked.

    Raises:
      ConfigError: text that is no value of its type.
    """
    choices = choices_of(declared, annotation)
    if choices:
        return _check_choice(key, text.strip(), declared, annotation)
    if annotation is str:
        return text
    readers: dict[Any, Callable[[str], Any]] = {bool: _read_bool, int: _read_int, float: float}
    read = readers[annotation]
    try:
        return read(text.strip())
    except ValueError as error:
        raise ConfigError(
            f"{key}={format_value(text)!r} must be {TYPE_NAMES[annotation]}"
        ) from error


def _check_choice(key: str, value: Any, declared: Leaf, annotation: Any) -> str:
    choices = choices_of(declared, annotation)
    if value in choices or (declared.or_file and names_file(value)):
        return value
    meant = nearest(str(value), choices, declared.aliases)
    raise ConfigError(
        f"{key}={format_value(repr(value))} must be {type_text(declared, annotation)}; "
        f"the nearest is {meant}"
    )


def _to_float(key: str, value: int, declared: Leaf) -> float:
    """Returns an integer as a float; one that is too large for that is out of range."""
    try:
        return float(value)
    except OverflowError as error:
        infinite = math.inf if value > 0 else -math.inf
        raise ConfigError(
            f"{key}={format_value(value)} must be {_range_for(infinite, declared)}"
        ) from error


def _read_bool(text: str) -> bool:
    known = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _read_int(text: str) -> int:
    is_hexadecimal = text.lower().startswith("0x")
    return int(text, 16) if is_hexadecimal else int(text)


# Ranges
# -------------------------------------------------------------------------------------------------


class _Bounds(typing.NamedTuple):
    """Limits of a number, each of which may be absent."""

    at_least: Any = None
    above: Any = None
    at_most: Any = None
    below: Any = None

    def hold(self, value: Any) -> bool:
        """Whether a number is within them; NaN is not."""
        if self.at_least is not None and not value >= self.at_least:
            return False
        if self.above is not None and not value > self.above:
            return False
        if self.at_most is not None and not value <= self.at_most:
            return False
        return self.below is None or bool(value < self.below)

    def in_float32(self) -> "_Bounds":
        return _Bounds(*[None if bound is None else np.float32(bound) for bound in self])


def check_range(key: str, value: float, declared: Leaf) -> None:
    """Raises `ConfigError` for a number out of the range of its leaf, NaN and infinity included."""
    if value in declared.also or _is_within(value, declared):
        return
    limits = _range_for(value, declared)
    rounded = _rounding(value, declared)
    raise ConfigError(f"{key}={format_value(value)} must be {limits}{rounded}")


def range_text(declared: Leaf, annotation: Any) -> str:
    """Returns the range of a number in words: "at least 0 and below 1".

    The text is "" for a leaf without bounds of its own.
    """
    if annotation not in (int, float):
        return ""
    return _bounds_text(declared, declared.at_most)


def _largest(value: float, declared: Leaf) -> float:
    """Returns the upper bound of a number: that of its leaf, or that of its type."""
    if declared.at_most is not None:
        return declared.at_most
    return LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT


def _bounds_for(value: float, declared: Leaf) -> _Bounds:
    return _Bounds(
        at_least=declared.at_least,
        above=declared.above,
        at_most=_largest(value, declared),
        below=declared.below,
    )


def _is_within(value: float, declared: Leaf) -> bool:
    bounds = _bounds_for(value, declared)
    if isinstance(value, int):
        return bounds.hold(value)
    if not math.isfinite(value):
        return False
    # A float must be within as it is written and as it is used: 1 - 1e-9 is 1 in float32, and a
    # number a little above a bound is that bound.
    with np.errstate(over="ignore", under="ignore"):
        in_float32 = bounds.in_float32()
        return bounds.hold(value) and in_float32.hold(np.float32(value))


def _range_for(value: float, declared: Leaf) -> str:
    """Returns the range that a number misses, in words.

    The bound that all leaves have is named only if it is the one that is exceeded.
    """
    largest = _largest(value, declared)
    at_most = largest if value > largest else declared.at_most
    text = _bounds_text(declared, at_most)
    is_nan = isinstance(value, float) and math.isnan(value)
    return f"{text} and finite" if is_nan else text


def _rounding(value: float, declared: Leaf) -> str:
    """Returns why a number that seems to be within its bounds is not; "" for others."""
    if isinstance(value, int) or not math.isfinite(value):
        return ""
    if not _bounds_for(value, declared).hold(value):
        return ""
    return f", and is {np.float32(value):g} in float32"


def _bounds_text(declared: Leaf, at_most: float | None) -> str:
    named = {
        "at least": declared.at_least,
        "above": declared.above,
        "at most": at_most,
        "below": declared.below,
    }
    limits = [f"{words} {_number(bound)}" for words, bound in named.items() if bound is not None]
    text = " and ".join(limits)
    others = ", ".join(map(str, declared.also))
    return f"{text}, or {others}" if others else text


def _number(bound: float) -> str:
    """Returns a bound in plain digits if it is a whole number that is not too long."""
    is_whole = bound == int(bound) and abs(bound) < 1e12
    return str(int(bound)) if is_whole else f"{bound:g}"
