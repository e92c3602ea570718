"""JSON that every parser reads: NaN and infinities, which JSON lacks, become null, and a warning says which."""

import json
import logging
import math
from typing import Any

SHOWN = 3
"""Places that a warning names; more are counted."""

log = logging.getLogger("moejax")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Returns one JSON document, in ASCII alone: any terminal and any file can hold it.

    Args:
      value: dicts, lists, text, numbers, booleans and None.
      indent: spaces a level; None gives one line.
    """
    places: list[str] = []
    finite = _finite(value, "", places)
    if places:
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        log.warning("not finite, and null in the JSON: %s%s", ", ".join(places[:SHOWN]), more)
    return json.dumps(finite, indent=indent, allow_nan=False)


def _finite(value: Any, place: str, places: list[str]) -> Any:
    """The same value with null for numbers that are not finite, whose places are added to `places`."""
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place or "the value")
        return None
    if isinstance(value, dict):
        return {
            key: _finite(item, f"{place}.{key}" if place else str(key), places)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_finite(item, f"{place}[{i}]", places) for i, item in enumerate(value)]
    return value
