"""A signature that only this user can make: tells what was recorded here from what came with a foreign folder.

The key is in the user's own folder of state and never leaves it. Without a key nothing is signed,
and what is not signed is not believed.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

KEY_BYTES = 32


def key_path() -> Path:
    """`moejax/key` in `$XDG_STATE_HOME`, or in `~/.local/state` where that is no absolute path.

    Raises:
      RuntimeError: the user has no home folder.
    """
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".local" / "state") / "moejax" / "key"


def sign(content: Any) -> str:
    """The signature of a JSON value; a key is made at the first call. Empty where the user can keep no key."""
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
    return hmac.compare_digest(_signature(key, content).encode(), signature.encode())


def _signature(key: bytes, content: Any) -> str:
    return hmac.new(key, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _read_key() -> bytes:
    """The key; empty if there is none that nobody else can know."""
    try:
        with key_path().open("rb") as file:
            about = os.fstat(file.fileno())
            is_private = about.st_uid == os.geteuid() and not stat.S_IMODE(about.st_mode) & 0o077
            key = file.read(KEY_BYTES + 1)
    except (OSError, RuntimeError):
        return b""
    return key if is_private and len(key) == KEY_BYTES else b""


def _make_key(path: Path) -> None:
    """Writes a new key, whole or not at all; of two processes at it, the first one's stays."""
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
