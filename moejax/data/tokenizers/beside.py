"""The small files beside a tokenizer of a released model, which say what its file does not.

`tokenizer_config.json` and `special_tokens_map.json` name the tokens that begin and end a document,
`tokenizer_config.json` and `added_tokens.json` list tokens beside the vocabulary, and where no name
is given `generation_config.json` and `config.json` have ids.
"""

import dataclasses
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.data.errors import DataError, first_line, os_reason
from moejax.paths import resolve_path

SETTINGS_FILE = "tokenizer_config.json"
NAMES_FILES = ("special_tokens_map.json", SETTINGS_FILE)  # the later one counts
ADDED_FILE = "added_tokens.json"
IDS_FILES = ("config.json", "generation_config.json")

LARGEST_FILE = 256 * 2**20
"""Bytes; the largest vocabularies that are published have a tenth of it."""

REMEDY = "take it again from where the model came from"


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary that the file was trained with.

    Attributes:
      text: what is written for it.
      id: its id.
      is_special: it is no text: decoding skips it, and text that looks like it is not taken for it.
      strips_left: white space before it belongs to it.
      strips_right: white space after it belongs to it.
    """

    text: str
    id: int
    is_special: bool = True
    strips_left: bool = False
    strips_right: bool = False


@dataclasses.dataclass(frozen=True)
class Beside:
    """What the files beside a tokenizer say.

    Attributes:
      folder: in which they are.
      names: texts of `bos_token`, `eos_token` and `pad_token`; None where a file says that there
        is none; absent where no file says anything.
      ids: `bos_token_id` and others, for those that are not named.
      adds_bos: `add_bos_token`; None where no file says.
      is_legacy: whether sentencepiece puts a space before each part of a text with special tokens.
      added: tokens beside the vocabulary.
    """

    folder: Path
    names: Mapping[str, str | None]
    ids: Mapping[str, int]
    adds_bos: bool | None
    is_legacy: bool
    added: tuple[AddedToken, ...]


def read_beside(folder: Path) -> Beside:
    """Returns what the files in a folder say; each may be absent.

    Raises:
      DataError: one of them is damaged.
    """
    names: dict[str, str | None] = {}
    for file in NAMES_FILES:
        names |= _names(folder / file)
    settings = read_json(folder / SETTINGS_FILE)
    adds_bos = settings.get("add_bos_token")
    return Beside(
        folder=folder,
        names=names,
        ids=_ids(folder),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        is_legacy=settings.get("legacy") is not False,
        added=_added(folder, settings),
    )


def locate(given: str | Path, name: str = "") -> Path:
    """Returns the absolute path of a file, in the folder in which it was given.

    Caches keep each file as a link in the folder of its model: what is beside the link counts.

    Args:
      given: as written; `~` stands for the home folder.
      name: what it was given as, for errors.

    Raises:
      PathError: it can be no path of this machine.
    """
    resolve_path(given, name)  # only to refuse what is no path
    path = Path(given).expanduser()
    return resolve_path(path.parent, name) / path.name


def read_bounded(path: Path, shown: str = "") -> bytes:
    """Returns the content of a file that may be linked to, but is an ordinary one of a usual size.

    Args:
      path: of the file.
      shown: what errors call it; its path by default.

    Raises:
      DataError: it is none.
    """
    shown = shown or str(path)
    try:
        # O_NONBLOCK: opening a named pipe must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{shown} is no ordinary file; name one")
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {os_reason(error)}; name another file") from error
    if len(content) > LARGEST_FILE:
        raise DataError(f"{shown} is larger than {LARGEST_FILE} bytes; name a tokenizer's file")
    return content


def read_json(path: Path) -> Mapping[str, Any]:
    """Returns the object in a JSON file; empty if there is no such file.

    Raises:
      DataError: it is damaged.
    """
    if not path.exists():
        return {}
    content = read_bounded(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {first_line(error)}; {REMEDY}") from error
    if not isinstance(found, Mapping):
        raise DataError(f"{path} is damaged: it must be one JSON object; {REMEDY}")
    return found


def text_of(path: Path, key: str, value: Any) -> str | None:
    """Returns the text of a token, which files write as text or as an object with `content`.

    Raises:
      DataError: it is neither.
    """
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is None or isinstance(text, str):
        return text
    raise DataError(f"{path}: {key}={value!r} must be the text of a token; {REMEDY}")


def _names(path: Path) -> dict[str, str | None]:
    found = read_json(path)
    keys = [key for key in ("bos_token", "eos_token", "pad_token") if key in found]
    return {key: text_of(path, key, found[key]) for key in keys}


def _ids(folder: Path) -> dict[str, int]:
    """Returns the ids of special tokens; of several that end a document, the first."""
    ids = {}
    for file in IDS_FILES:
        found = read_json(folder / file)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = found.get(key)
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int:
                ids[key] = first
    return ids


def _added(folder: Path, settings: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    by_id = {}
    path = folder / ADDED_FILE
    for text, id in read_json(path).items():
        if type(id) is not int or id < 0:
            raise DataError(f"{path}: {text!r} has the id {id!r}; {REMEDY}")
        by_id[id] = AddedToken(text, id)
    described = settings.get("added_tokens_decoder", {})
    if not isinstance(described, Mapping):
        raise DataError(f"{folder / SETTINGS_FILE}: added_tokens_decoder is damaged; {REMEDY}")
    for key, value in described.items():
        token = _added_token(folder / SETTINGS_FILE, key, value)
        by_id[token.id] = token
    return tuple(by_id[id] for id in sorted(by_id))


def _added_token(path: Path, key: str, value: Any) -> AddedToken:
    text = text_of(path, f"added_tokens_decoder[{key}]", value)
    if not text or not key.isascii() or not key.isdigit():
        raise DataError(f"{path}: added_tokens_decoder[{key}] is damaged; {REMEDY}")
    flags = value if isinstance(value, Mapping) else {}
    return AddedToken(
        text,
        int(key),
        is_special=flags.get("special") is True,
        strips_left=flags.get("lstrip") is True,
        strips_right=flags.get("rstrip") is True,
    )
