"""How a configuration is refused."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

MAX_VALUE_CHARACTERS = 60
"""Longer values are cut in messages."""

MAX_LISTED_DIVISORS = 12


class ConfigError(ValueError):
    """A configuration that cannot work.

    The message names the key, the value, the constraint and the remedy.
    """


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def divisors(number: int, near: int | None = None) -> str:
    """Returns the divisors of `number` as text for error messages: "1, 2, 4".

    Args:
      number: at least 1.
      near: if there are many divisors, those closest to it are listed; the smallest by default.
    """
    found = _all_divisors(number)
    if len(found) > MAX_LISTED_DIVISORS:
        target = near or 1
        by_distance = sorted(found, key=lambda divisor: abs(divisor - target))
        found = sorted(by_distance[:MAX_LISTED_DIVISORS])
    return ", ".join(map(str, found))


def _all_divisors(number: int) -> list[int]:
    """Returns the divisors in ascending order; of each pair, the smaller is at most the root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    large = [number // d for d in small]
    return sorted({*small, *large})


def nearest(wrong: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """Returns the known name that was most likely meant.

    Args:
      wrong: what was written.
      known: the names that exist.
      aliases: other names that people use for them.
    """
    written = wrong.strip().lower()
    if aliases and written in aliases:
        return aliases[written]
    # A cutoff of 0 always leaves one match.
    matches = difflib.get_close_matches(wrong, [*known], n=1, cutoff=0.0)
    return matches[0]


def format_value(value: Any) -> str:
    """Returns a value as messages show it: one line of at most `MAX_VALUE_CHARACTERS`."""
    try:
        text = str(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"an integer of {value.bit_length():,} bits"
    text = " ".join(text.split())
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return f"{text[: MAX_VALUE_CHARACTERS - 3]}..."
