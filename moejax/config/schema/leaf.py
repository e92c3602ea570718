"""What is declared at each leaf: its meaning, its range, and what must hold so that anything reads it."""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np

from moejax.config.errors import ConfigError, format_value, nearest
from moejax.config.schema.needs import Need

LARGEST_INT = 2**31 - 1
"""Of int32, in which arrays count."""

LARGEST_FLOAT = 1e30
"""Whose products with other leaves are finite in float32."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is declared of a leaf beside its name, type and default.

    Attributes:
      meaning: one line.
      at_least, above, at_most, below: bounds of a number; floats are compared as float32, in which
        they are used.
      also: values outside of the bounds that mean something of their own.
      choices: what a text may be, where its type does not say so; a table that grows is looked
        up each time.
      aliases: what others call the choices.
      needs: what must hold so that anything reads the leaf; None where something always does.
      may_rest: whether a recipe may set it although nothing reads it, since what it needs is chosen
        at the start of a run (devices), or only watches it. Typed on the command line, or varied by
        a sweep, it is refused all the same.
    """

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[Any, ...] = ()
    choices: Collection[str] = ()
    aliases: Mapping[str, str] | None = None
    needs: Need | None = None
    may_rest: bool = False


def leaf(default: Any, meaning: str, **declared: Any) -> Any:
    """A dataclass field with a `Leaf`, whose other attributes are keywords."""
    return dataclasses.field(default=default, metadata={"leaf": Leaf(meaning, **declared)})


def leaf_of(field: dataclasses.Field[Any]) -> Leaf:
    """What is declared of a field made by `leaf`."""
    return field.metadata["leaf"]


# Types
# --------------------------------------------------------------------------------------------------------------

TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
}
"""What messages call the types of leaves."""


def choices_of(declared: Leaf, annotation: Any) -> tuple[str, ...]:
    """The values that a leaf of text may have; none where it may have any."""
    is_literal = typing.get_origin(annotation) is Literal
    return typing.get_args(annotation) if is_literal else tuple(declared.choices)


def type_text(declared: Leaf, annotation: Any) -> str:
    """What kind of value a leaf takes: "a whole number"."""
    choices = choices_of(declared, annotation)
    return f"one of {', '.join(choices)}" if choices else TYPE_NAMES[annotation]


def check_value(key: str, value: Any, declared: Leaf, annotation: Any) -> Any:
    """The value of a leaf, of its type and within its range.

    Raises:
      ConfigError: another type, another choice, or a number out of range.
    """
    choices = choices_of(declared, annotation)
    if choices:
        return _check_choice(key, value, choices, declared.aliases)
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
    """Reads the value of a leaf from text; its range is not checked.

    Raises:
      ConfigError: text that is no value of its type.
    """
    choices = choices_of(declared, annotation)
    if choices:
        return _check_choice(key, text.strip(), choices, declared.aliases)
    if annotation is str:
        return text
    readers: dict[Any, Callable[[str], Any]] = {bool: _read_bool, int: _read_int, float: float}
    try:
        return readers[annotation](text.strip())
    except ValueError as error:
        raise ConfigError(
            f"{key}={format_value(text)!r} must be {TYPE_NAMES[annotation]}"
        ) from error


def _check_choice(
    key: str, value: Any, choices: tuple[str, ...], aliases: Mapping[str, str] | None
) -> str:
    if value in choices:
        return value
    near = nearest(str(value), choices, aliases)
    raise ConfigError(
        f"{key}={format_value(repr(value))} must be one of {', '.join(choices)}; the nearest is {near}"
    )


def _to_float(key: str, value: int, declared: Leaf) -> float:
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
    return int(text, 16) if text.lower().startswith("0x") else int(text)


# Ranges
# -------------------------------------------------------------------------------------------------------------


def check_range(key: str, value: float, declared: Leaf) -> None:
    """Raises `ConfigError` for a number out of the range of its leaf, NaN and infinity among them."""
    if value in declared.also or _is_within(value, declared):
        return
    rounded = _rounding(value, declared)
    raise ConfigError(f"{key}={format_value(value)} must be {_range_for(value, declared)}{rounded}")


def range_text(declared: Leaf, annotation: Any) -> str:
    """The range of a number in words, such as "at least 0 and below 1"; "" where it has no bound of its own."""
    if annotation not in (int, float):
        return ""
    return _bounds(declared, declared.at_most)


def _largest(value: float, declared: Leaf) -> float:
    if declared.at_most is not None:
        return declared.at_most
    return LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT


def _is_within(value: float, declared: Leaf) -> bool:
    bounds = declared.at_least, declared.above, _largest(value, declared), declared.below
    if isinstance(value, int):
        return _fits(value, *bounds)
    # Both ways: 1 - 1e-9 is 1 in float32, and a number a little above a bound is that bound.
    with np.errstate(over="ignore", under="ignore"):
        in_float32 = [None if bound is None else np.float32(bound) for bound in bounds]
        return (
            math.isfinite(value) and _fits(value, *bounds) and _fits(np.float32(value), *in_float32)
        )


def _fits(value: Any, at_least: Any, above: Any, at_most: Any, below: Any) -> bool:
    return bool(
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )


def _range_for(value: float, declared: Leaf) -> str:
    """The range; the bound that all leaves have is named only where it is the one that is exceeded."""
    largest = _largest(value, declared)
    text = _bounds(declared, largest if value > largest else declared.at_most)
    is_nan = isinstance(value, float) and math.isnan(value)
    return f"{text} and finite" if is_nan else text


def _rounding(value: float, declared: Leaf) -> str:
    """What a bound has to do with a number that seems to be within it."""
    bounds = declared.at_least, declared.above, _largest(value, declared), declared.below
    if isinstance(value, int) or not math.isfinite(value) or not _fits(value, *bounds):
        return ""
    return f", and is {np.float32(value):g} in float32"


def _bounds(declared: Leaf, at_most: float | None) -> str:
    named = (
        ("at least", declared.at_least),
        ("above", declared.above),
        ("at most", at_most),
        ("below", declared.below),
    )
    text = " and ".join(f"{word} {_number(bound)}" for word, bound in named if bound is not None)
    others = ", ".join(map(str, declared.also))
    return f"{text}, or {others}" if others else text


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) and abs(bound) < 1e12 else f"{bound:g}"
