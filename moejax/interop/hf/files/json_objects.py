"""JSON in the files of a released model, in which no key may stand twice.

Parsers take the last of two values without a word; others may take the first.
"""

import json
from collections.abc import Sequence
from typing import Any

from moejax.interop.hf.errors import HfError


def read_json(content: str | bytes) -> Any:
    """Returns a JSON document; raises `HfError` for a key that stands twice, with two values."""
    return json.loads(content, object_pairs_hook=_without_repetition)


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise HfError(f"{repeated} stands twice; keep the one that is meant")
    return content
