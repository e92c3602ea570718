"""How a configuration is refused."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN_CHARACTERS = 60
"""Of a value in a message; longer ones are cut."""

LISTED_DIVISORS = 12


class ConfigError(ValueError):
    """A configuration that cannot work: the message names the key, the value, the constraint and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def divisors(number: int, near: int | None = None) -> str:
    """The divisors of `number`, for error messages: "1, 2, 4".

    Args:
      number: at least 1.
      near: of many divisors, those that are closest to it are listed; without it the smallest.
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    found = sorted({*small, *(number // d for d in small)})
    if len(found) > LISTED_DIVISORS:
        wanted = near or 1
        found = sorted(sorted(found, key=lambda d: abs(d - wanted))[:LISTED_DIVISORS])
    return ", ".join(map(str, found))


def nearest(wrong: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """The name that was most likely meant.

    Args:
      wrong: what was written.
      known: the names that there are.
      aliases: what others call them.
    """
    aliases = aliases or {}
    written = wrong.strip().lower()
    if written in aliases:
        return aliases[written]
    return difflib.get_close_matches(wrong, [*known], n=1, cutoff=0.0)[0]


def format_value(value: Any) -> str:
    """A value as a message shows it: at most so many characters of it, in one line."""
    try:
        text = str(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"an integer of {value.bit_length():,} bits"
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
