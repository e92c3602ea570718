"""What `config.json` records of where a run's text is, so that it is found from other folders.

The record is signed. Only this user can make the signature, which distinguishes what was recorded
here from what came with someone else's folder. The key is in the user's own folder of state and
never leaves it. Without a key nothing is signed, and what is not signed is not trusted.
"""

import glob
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.config import DataConfig

KEY_BYTES = 32


def record_text(data: DataConfig, corpus: str) -> dict[str, str]:
    """Returns what `config.json` records of a run's text.

    That is its places as absolute paths, and a signature of them and of the name of the rows.
    """
    places = {
        "directory": _absolute(data.directory),
        "files": _absolute_files(data.files),
        "source_dir": _absolute(data.source_dir) if data.source_dir else "",
    }
    return {**places, "signature": sign(signed_text(data, places, corpus))}


def signed_text(data: DataConfig, places: Mapping[str, Any], corpus: str) -> list[Any]:
    """Returns what the signature covers: all that decides which files are read and written."""
    return [
        data.source,
        data.name,
        data.text_field,
        places["directory"],
        places["files"],
        places["source_dir"],
        corpus,
    ]


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _absolute_files(files: str) -> str:
    """Returns the documents of `data.files` as absolute paths: one path, or globs with commas."""
    if not files:
        return ""
    if os.path.exists(os.path.expanduser(files)):
        return _absolute(files)
    items = [item.strip() for item in files.split(",")]
    return ",".join(_absolute_glob(item) for item in items if item)


def _absolute_glob(item: str) -> str:
    item = os.path.expanduser(item)
    if os.path.isabs(item) or os.path.exists(item):
        return os.path.abspath(item)
    # The glob is relative to a folder whose own name may have the letters of a glob.
    return os.path.join(glob.escape(os.getcwd()), item)


def key_path() -> Path:
    """Returns `moejax/key` in `$XDG_STATE_HOME`, or in `~/.local/state` if that is not absolute.

    Raises:
      RuntimeError: the user has no home folder.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        state = Path.home() / ".local" / "state"
    return state / "moejax" / "key"


def sign(content: Any) -> str:
    """Returns the signature of a JSON value; a key is made at the first call.

    Returns:
      An empty text where the user can keep no key.
    """
    try:
        path = key_path()
        if not path.exists():
            _make_key(path)
    except (OSError, RuntimeError):
        return ""
    key = _read_key()
    return _signature(key, content) if key else ""


def is_signed(content: Any, signature: Any) -> bool:
    """Whether `sign` gave this signature for this content to this user; writes nothing."""
    key = _read_key()
    if not key or not isinstance(signature, str):
        return False
    expected = _signature(key, content)
    return hmac.compare_digest(expected.encode(), signature.encode())


def _signature(key: bytes, content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _read_key() -> bytes:
    """Returns the key; empty if there is none that only this user can read."""
    try:
        with key_path().open("rb") as file:
            status = os.fstat(file.fileno())
            key = file.read(KEY_BYTES + 1)
    except (OSError, RuntimeError):
        return b""
    is_own = status.st_uid == os.geteuid()
    is_private = not stat.S_IMODE(status.st_mode) & 0o077
    return key if is_own and is_private and len(key) == KEY_BYTES else b""


def _make_key(path: Path) -> None:
    """Writes a new key in one step; if two processes do so, the first one's key stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"key-{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
