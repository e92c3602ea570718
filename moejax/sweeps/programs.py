"""Compiled programs that outlive a process: for packs that have them in common, and for processes that start again.

They are machine code, which jax runs as it finds it. So they are in a folder of the user's own, and not in a sweep's
directory, of which nothing is executed, whoever it comes from.
"""

import logging
import os
import tempfile
from pathlib import Path

import jax

log = logging.getLogger("moejax")


def programs_folder() -> Path:
    """`moejax/compiled` in the user's cache folder: `$XDG_CACHE_HOME`, or `~/.cache` where that is no absolute path.

    Raises:
      RuntimeError: the user has no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "moejax" / "compiled"


def keep_programs() -> None:
    """Has jax keep what it compiles in `programs_folder`; where that cannot be written, everything is compiled anew."""
    try:
        folder = programs_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:
        log.warning("compiled programs are not kept (%s): set XDG_CACHE_HOME to a folder that can be written", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
