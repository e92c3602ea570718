"""Whether what was read of a sweep is what moejax writes: its definition, and the records of its arms.

A file may be damaged or another's. Everything that a page or a table uses is checked where it is
read, so that they meet no value of another kind.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from moejax.sweeps.store.record_files import RecordError
from moejax.sweeps.tables import MATCHED, OVERRIDE, TEXTS, is_number

STATUSES = ("done", "stopped", "failed", "pruned")
ARM_ID = "[0-9a-f]{10}"


def check_row(row: Any, where: str, remedy: str) -> None:
    """Raises `RecordError` if a record is none.

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
        kind, is_right = _kind_of(name)
        if not is_right(value):
            raise RecordError(f"{where}: {name}={_shown(value)} must be {kind}; {remedy}")


def _kind_of(name: str) -> tuple[str, Callable[[Any], bool]]:
    """What a column holds, in words and as a predicate."""
    of_json: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "alarm_rules": ("a list of names, as JSON text", _is_list_of_texts),
        "evaluations": ("a list of evaluations, as JSON text", _is_list_of_evaluations),
        "versions": (
            "names and versions, as JSON text",
            lambda value: isinstance(_parsed(value), dict),
        ),
    }
    if name in of_json:
        return of_json[name]
    if name in TEXTS:
        return "text", lambda value: isinstance(value, str)
    return (
        "a number",
        lambda value: isinstance(value, bool) or is_number(value) or isinstance(value, float),
    )


def _parsed(value: Any) -> Any:
    """JSON in a text; None where it is none."""
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None


def _is_list_of_texts(value: Any) -> bool:
    found = _parsed(value)
    return isinstance(found, list) and all(isinstance(item, str) for item in found)


def _is_list_of_evaluations(value: Any) -> bool:
    """Of fraction, step, loss and, in newer records, bits per byte: the step is known, all else may be null."""
    found = _parsed(value)
    return isinstance(found, list) and all(map(_is_evaluation, found))


def _is_evaluation(item: Any) -> bool:
    if not isinstance(item, list) or not 3 <= len(item) <= 4 or item[1] is None:
        return False
    return all(number is None or is_number(number) for number in item)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def check_definition(definition: Any, where: str, remedy: str) -> None:
    """Raises `RecordError` if what a sweep is to run is not what `moejax sweep` writes."""
    if not isinstance(definition, Mapping) or not isinstance(definition.get("arms"), list):
        raise RecordError(f"{where} must be a JSON object with a list of arms; {remedy}")
    kinds = {
        "recipe": str,
        "command": str,
        "match": str,
        "git_commit": str,
        "versions": dict,
        "is_search": bool,
    }
    for key, kind in kinds.items():
        value = definition.get(key)
        if value is not None and not isinstance(value, kind):
            raise RecordError(
                f"{where}: {key}={_shown(value)} must be a JSON {_json_name(kind)}; {remedy}"
            )
    for number, entry in enumerate(definition["arms"]):
        try:
            check_entry(entry, f"{where}: arm {number}")
        except RecordError as error:
            raise RecordError(f"{error}; {remedy}") from error
    ids = [entry["id"] for entry in definition["arms"]]
    if len(set(ids)) < len(ids):
        twice = next(arm_id for arm_id in ids if ids.count(arm_id) > 1)
        raise RecordError(f"{where}: arm {twice} is there twice; {remedy}")
    packs = definition.get("packs") or []
    if not isinstance(packs, list) or not all(map(_is_pack, packs)):
        raise RecordError(f"{where}: packs must be lists of arms; {remedy}")


def _is_pack(pack: Any) -> bool:
    return isinstance(pack, list) and all(isinstance(arm_id, str) for arm_id in pack)


def check_entry(entry: Any, where: str) -> None:
    """Raises `RecordError` if an entry of `arms` lacks what every row needs, or its id is none: it names a folder."""
    kinds = {"id": str, "config_hash": str, "overrides": dict, "matched": dict, "config": dict}
    for key, kind in kinds.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind):
            raise RecordError(f"{where} must have {key}, a JSON {_json_name(kind)}")
    if not re.fullmatch(ARM_ID, entry["id"]):
        raise RecordError(
            f"{where}: id {_shown(entry['id'])} must be ten hexadecimal digits in lower case"
        )


def _json_name(kind: type) -> str:
    return {str: "string", bool: "true or false"}.get(kind, "object")
