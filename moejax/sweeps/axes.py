"""Axes: spaces of one key, in Python or as text from the command line."""

import csv
import math
import re
from typing import Any

from moejax.config import ConfigError, check_key, leaves, read_value
from moejax.sweeps.space import Axis, Choice, Range, SpaceError

SIGNIFICANT_DIGITS = 6
"""Of the values of a grid, so that they are easy to read and give the same arm on any machine."""

KINDS = {int: "a whole number", bool: "True or False"}
"""What a leaf holds, in words; text otherwise."""

INTERVAL = re.compile(r"(log|lin):(.+?)\.\.([^:]+)(?::(.+))?")
"""Such as `log:1e-4..1e-1:5`: the spacing, both ends, and the number of values if there is one."""


def choice(key: str, *values: Any) -> Choice:
    """Returns an axis of listed values.

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
    """Returns an axis of numbers in equal ratios.

    Args:
      key: of a leaf that is a float.
      low: the smallest, above 0.
      high: the largest.
      num: of values of a grid, ends included; None gives a range for a search.

    Raises:
      ConfigError: `key` is no leaf.
      SpaceError: the leaf is no float, or the numbers make no range.
    """
    return _interval(key, low, high, num, is_log=True)


def uniform(key: str, low: float, high: float, num: int | None = None) -> Axis:
    """Returns an axis as `log_uniform` does, in equal steps."""
    return _interval(key, low, high, num, is_log=False)


def seeds(number: int) -> Choice:
    """Returns an axis of `train.seed` from 0 to `number - 1`.

    Raises:
      SpaceError: `number` is less than 1.
    """
    if number < 1:
        raise SpaceError(f"seeds({number}) has no seeds; use 1 or more")
    return choice("train.seed", *range(number))


def parse_axis(text: str) -> Axis:
    """Returns an axis that was given on the command line.

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
    is_text = dict(leaves())[key] is str
    if not is_text and values.strip().startswith(("log:", "lin:")):
        return _parse_interval(text, key, values.strip())
    return choice(key, *(_parse_value(text, key, value) for value in _split_values(text, values)))


def _split_values(text: str, values: str) -> list[str]:
    """Splits values at commas as a line of CSV; no text at all is one empty value."""
    try:
        return next(csv.reader([values], strict=True), []) or [""]
    except csv.Error as error:
        raise SpaceError(
            f'{text!r}: {error}; quote values that hold commas as in CSV: "0,1: router=hash",""'
        ) from error


def _interval(key: str, low: float, high: float, num: int | None, *, is_log: bool) -> Axis:
    check_key(key)
    _check_interval(key, low, high, is_log)
    if num is None:
        return Range(key, float(low), float(high), is_log)
    if num < 2:
        raise SpaceError(f"num={num} of {key} must be at least 2, for a grid has both ends")
    values = [float(low)]
    for i in range(1, num - 1):
        part = i / (num - 1)
        value = low * (high / low) ** part if is_log else low + (high - low) * part
        rounded = f"{value:.{SIGNIFICANT_DIGITS}g}"
        values.append(float(rounded))
    values.append(float(high))
    return Choice(key, tuple(values))


def _check_interval(key: str, low: float, high: float, is_log: bool) -> None:
    """Raises `SpaceError` unless the leaf is a float and the numbers make a range of it."""
    annotation = dict(leaves())[key]
    if annotation is not float:
        kind = KINDS.get(annotation, "text")
        raise SpaceError(
            f"{key} is {kind}, and ranges are for leaves that may be any number; "
            f"list its values, as in choice({key!r}, ...) or {key}=A,B on the command line"
        )
    is_finite = math.isfinite(low) and math.isfinite(high)
    is_positive = low > 0 or not is_log
    if not (is_finite and low < high and is_positive):
        above = ", the lower above 0," if is_log else ""
        raise SpaceError(
            f"{key} from {low:g} to {high:g} is no range; give two finite numbers{above} rising"
        )


def _parse_interval(text: str, key: str, values: str) -> Axis:
    found = INTERVAL.fullmatch(values)
    try:
        if not found:
            raise ValueError
        kind, low_text, high_text, num_text = found.groups()
        low = float(low_text)
        high = float(high_text)
        num = None if num_text is None else int(num_text)
    except ValueError as error:
        raise SpaceError(
            f"{text!r} must have the form {key}={values[:4]}1e-4..1e-1:5, from..to:number"
        ) from error
    if dict(leaves()).get(key, float) is not float:
        raise SpaceError(
            f"{text}: a range is of fractions, and {key} has none; list values, as in {key}=4,8,16"
        )
    make_axis = log_uniform if kind == "log" else uniform
    return make_axis(key, low, high, num)


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
