"""Ways to damage a file, for tests of how a damaged run or data folder is answered."""

import os
import shutil
from pathlib import Path

import numpy as np

WAYS = (
    "bit",
    "first byte",
    "half",
    "emptied",
    "removed",
    "folder",
    "random",
    "extended",
    "unreadable",
)
"""What `damage` can do to a file; the last has no effect on a superuser, see `ways`."""


def ways() -> tuple[str, ...]:
    """Returns the ways that have an effect for this user; nothing is unreadable to a superuser."""
    return WAYS[:-1] if os.geteuid() == 0 else WAYS


def damage(path: Path, how: str, rng: np.random.Generator) -> bool:
    """Damages a file in one of `WAYS`.

    Args:
      path: an ordinary file.
      how: one of `WAYS`.
      rng: chooses the bit, and the bytes that replace or follow the file's own.

    Returns:
      Whether anything is different: an empty file has no bit to flip.
    """
    content = path.read_bytes()
    if how == "unreadable":
        path.chmod(0)
        return True
    if how in ("removed", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        return True
    damaged = _damaged(content, how, rng)
    path.write_bytes(damaged)
    return damaged != content


def _damaged(content: bytes, how: str, rng: np.random.Generator) -> bytes:
    if how == "emptied" or (not content and how != "extended"):
        return b""
    if how == "bit":
        changed = bytearray(content)
        place = rng.integers(len(changed))
        changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if how == "first byte":
        return bytes([content[0] ^ 0xFF]) + content[1:]
    if how == "half":
        return content[: len(content) // 2]
    if how == "random":
        return rng.bytes(len(content))
    if how == "extended":
        return content + rng.bytes(100)
    raise ValueError(f"how={how!r} must be one of {', '.join(WAYS)}")


def copy_run(source: Path, target: Path) -> Path:
    """Copies a run directory in the place of what was there."""
    if target.exists():
        shutil.rmtree(target)
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns(".lock"))


def kind_of(path: Path, folder: Path) -> str:
    """Returns the kind of a run's file: its path, with `*` for what differs within the kind."""
    parts = path.relative_to(folder).parts
    named = ["*" if part.isdigit() or len(part) == 32 else part for part in parts]
    if named[0] == "tensorboard":
        return "tensorboard/*"
    if named[-1].endswith(".npz"):
        named[-1] = "*.npz"
    return "/".join(named)
