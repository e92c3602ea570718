"""JSON that every parser reads.

NaN and infinities, which JSON does not have, become null, and a warning says which.
"""

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
    finite = _replace_nonfinite(value, "", places)
    if places:
        shown = ", ".join(places[:SHOWN])
        if len(places) > SHOWN:
            shown += f" and {len(places) - SHOWN} more"
        log.warning("not finite, and null in the JSON: %s", shown)
    return json.dumps(finite, indent=indent, allow_nan=False)


def _replace_nonfinite(value: Any, place: str, places: list[str]) -> Any:
    """Returns `value` with null for numbers that are not finite, and adds their places to `places`.

    Args:
      value: a part of the document.
      place: where it is in the document, such as `rows[0].loss`; "" for the document itself.
      places: where numbers were replaced so far.
    """
    if isinstance(value, float) and not math.isfinite(value):
        places.append(place or "the value")
        return None
    if isinstance(value, dict):
        prefix = f"{place}." if place else ""
        return {
            key: _replace_nonfinite(item, f"{prefix}{key}", places) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item, f"{place}[{i}]", places) for i, item in enumerate(value)]
    return value
