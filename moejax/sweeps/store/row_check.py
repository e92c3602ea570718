"""Checks that a sweep's definition and the records of its arms are what moejax writes.

A file may be damaged, or come from someone else. Everything that a page or a table uses is checked
where it is read, so that they meet no value of another kind.
"""

import collections
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from moejax.sweeps.store.record_files import RecordError
from moejax.sweeps.tables import MATCHED, OVERRIDE, TEXTS, is_number

STATUSES = ("done", "stopped", "failed", "pruned")
ARM_ID = "[0-9a-f]{10}"

DEFINITION_TYPES = {
    "recipe": str,
    "command": str,
    "match": str,
    "git_commit": str,
    "versions": dict,
    "is_search": bool,
}
"""The types of what `sweep.json` holds next to arms and packs; null stands for any of them."""

ENTRY_TYPES = {"id": str, "config_hash": str, "overrides": dict, "matched": dict, "config": dict}
"""The types of what every entry of `arms` holds."""


def check_row(row: Any, where: str, remedy: str) -> None:
    """Raises `RecordError` unless `row` is the record of an arm.

    Args:
      row: as read.
      where: names it in the message.
      remedy: ends the message.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"{where} must be a JSON object with an arm and a status; {remedy}")
    if not isinstance(row.get("arm"), str) or row.get("status") not in STATUSES:
        raise RecordError(f"{where} has no arm or no status; {remedy}")
    for name, value in row.items():
        if value is None or name.startswith((OVERRIDE, MATCHED)):
            continue
        kind, is_right = _column_check(name)
        if not is_right(value):
            raise RecordError(f"{where}: {name}={_shorten(value)} must be {kind}; {remedy}")


def _column_check(name: str) -> tuple[str, Callable[[Any], bool]]:
    """Returns what a column holds, in words and as a predicate."""
    if name in JSON_TEXTS:
        return JSON_TEXTS[name]
    if name in TEXTS:
        return "text", _is_text
    return "a number", _is_any_number


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_any_number(value: Any) -> bool:
    """Whether a value is a number in JSON as Python reads it: true, NaN and infinities, too."""
    return is_number(value) or isinstance(value, bool | float)


def _parse_json_text(value: Any) -> Any:
    """Returns what a JSON text holds; None if `value` is no such text."""
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def _is_dict(value: Any) -> bool:
    return isinstance(_parse_json_text(value), dict)


def _is_list_of_texts(value: Any) -> bool:
    items = _parse_json_text(value)
    return isinstance(items, list) and all(isinstance(item, str) for item in items)


def _is_list_of_evaluations(value: Any) -> bool:
    items = _parse_json_text(value)
    return isinstance(items, list) and all(map(_is_evaluation, items))


def _is_evaluation(item: Any) -> bool:
    """Whether a list has a fraction, a step, a loss and, in newer records, bits per byte.

    The step is known, all others may be null.
    """
    if not isinstance(item, list) or not 3 <= len(item) <= 4 or item[1] is None:
        return False
    return all(number is None or is_number(number) for number in item)


JSON_TEXTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alarm_rules": ("a list of names, as JSON text", _is_list_of_texts),
    "evaluations": ("a list of evaluations, as JSON text", _is_list_of_evaluations),
    "versions": ("names and versions, as JSON text", _is_dict),
}
"""Columns that hold JSON text: what it holds, in words and as a predicate."""


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def check_definition(definition: Any, where: str, remedy: str) -> None:
    """Raises `RecordError` unless `definition` is what `moejax sweep` writes.

    Args:
      definition: as read.
      where: names it in the message.
      remedy: ends the message.
    """
    if not isinstance(definition, Mapping) or not isinstance(definition.get("arms"), list):
        raise RecordError(f"{where} must be a JSON object with a list of arms; {remedy}")
    for key, kind in DEFINITION_TYPES.items():
        value = definition.get(key)
        if value is not None and not isinstance(value, kind):
            raise RecordError(
                f"{where}: {key}={_shorten(value)} must be a JSON {_json_name(kind)}; {remedy}"
            )
    for number, entry in enumerate(definition["arms"]):
        try:
            check_entry(entry, f"{where}: arm {number}")
        except RecordError as error:
            raise RecordError(f"{error}; {remedy}") from error
    counts = collections.Counter(entry["id"] for entry in definition["arms"])
    for arm_id, number in counts.items():
        if number > 1:
            raise RecordError(f"{where}: arm {arm_id} is there twice; {remedy}")
    packs = definition.get("packs") or []
    if not isinstance(packs, list) or not all(map(_is_pack, packs)):
        raise RecordError(f"{where}: packs must be lists of arms; {remedy}")


def _is_pack(pack: Any) -> bool:
    return isinstance(pack, list) and all(isinstance(arm_id, str) for arm_id in pack)


def check_entry(entry: Any, where: str) -> None:
    """Raises `RecordError` unless an entry of `arms` has what every row needs.

    Its id must be one: it names a folder.
    """
    for key, kind in ENTRY_TYPES.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind):
            raise RecordError(f"{where} must have {key}, a JSON {_json_name(kind)}")
    if not re.fullmatch(ARM_ID, entry["id"]):
        raise RecordError(
            f"{where}: id {_shorten(entry['id'])} must be ten hexadecimal digits in lower case"
        )


def _json_name(kind: type) -> str:
    return {str: "string", bool: "true or false"}.get(kind, "object")
