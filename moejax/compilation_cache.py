"""The compilation cache: compiled programs that are kept when a process ends.

It saves compiling again in processes that start again, and in packs that run the same programs.

Compiled programs are machine code, which jax runs as it finds it. So they are in a folder that only
the user can write, and not in the directory of a run or a sweep: nothing in those is executed,
whoever they come from.
"""

import logging
import os
import stat
import tempfile
from pathlib import Path

import jax

log = logging.getLogger("moejax")

WORTH_KEEPING_S = 0.2
"""Seconds of compilation from which on a program is kept."""


class CompilationCacheError(ValueError):
    """The folder of the compilation cache is not the user's alone."""


def compilation_cache_folder() -> Path:
    """Returns `moejax/compiled` in the user's cache folder.

    That is `$XDG_CACHE_HOME`, or `~/.cache` where the variable holds no absolute path.

    Raises:
      RuntimeError: the user has no home folder.
    """
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not user_cache.is_absolute():
        user_cache = Path.home() / ".cache"
    return user_cache / "moejax" / "compiled"


def keep_compilation_cache() -> None:
    """Has jax keep what it compiles in `compilation_cache_folder`.

    If `JAX_COMPILATION_CACHE_DIR` is set, jax keeps it there, and nothing is changed. If the folder
    cannot be written, or if others could put programs in it, everything is compiled again, and the
    log says why.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = compilation_cache_folder()
        # One `mkdir` for each of the two: `parents` would leave the parent's mode to the umask.
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        check_is_own(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError, CompilationCacheError) as error:
        log.warning(
            "compiled programs are not kept (%s): "
            "set XDG_CACHE_HOME to a folder that you alone write",
            error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING_S)


def check_is_own(folder: Path) -> None:
    """Raises `CompilationCacheError` unless the folder and the one that holds it are the user's.

    Both must belong to the user, and no other may have the right to write to them. Where users have
    no numbers (Windows), nothing is known and nothing is raised.
    """
    if not hasattr(os, "getuid"):
        return
    for one in (folder, folder.parent):
        found = one.stat()
        if found.st_uid != os.getuid():
            raise CompilationCacheError(
                f"{one} belongs to user {found.st_uid}, who could put programs there"
            )
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(found.st_mode)
            raise CompilationCacheError(
                f"others may write to {one}, mode {mode:o}: chmod 700 {one}"
            )
