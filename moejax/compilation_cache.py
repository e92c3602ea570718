"""Compiled programs that outlive a process: for processes that start again, and for packs that have them in common.

They are machine code, which jax runs as it finds it. So they are in a folder that nobody but the
user can write, and not in a run's or a sweep's directory, of which nothing is executed, whoever
it comes from.
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
    """The folder of compiled programs is not the user's alone."""


def compilation_cache_folder() -> Path:
    """`moejax/compiled` in the user's cache folder: `$XDG_CACHE_HOME`, or `~/.cache` where that is no absolute path.

    Raises:
      RuntimeError: the user has no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "moejax" / "compiled"


def keep_compilation_cache() -> None:
    """Has jax keep what it compiles in `compilation_cache_folder`, or where `JAX_COMPILATION_CACHE_DIR` says.

    Where that cannot be, everything is compiled again, and the log says why: a folder that cannot
    be written, or one that others could put their programs in.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = compilation_cache_folder()
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(
            mode=0o700, exist_ok=True
        )  # each by itself: `parents` leaves theirs to the umask
        check_is_own(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError, CompilationCacheError) as error:
        log.warning(
            "compiled programs are not kept (%s): set XDG_CACHE_HOME to a folder that you alone write",
            error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING_S)


def check_is_own(folder: Path) -> None:
    """Raises `CompilationCacheError` if another user owns the folder or the one it is in, or may write to one of them.

    Where users have no numbers (Windows), nothing is known and nothing raised.
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
