"""How the tests compile, and where they keep compiled programs: in the user's cache folder."""

import atexit
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

KEPT_DAYS = 30
"""After that many days a compiled program is compiled again."""


def cache_folder() -> Path:
    """Returns the folder of compiled programs, which outlives the session.

    It depends on the versions and on the processor, whose machine code the programs are. A folder
    that others own or can write is not used, for what is in it is executed.
    """
    versions = "-".join(importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else [platform.machine()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    digest = hashlib.sha256("\n".join(features).encode()).hexdigest()[:8]
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    parent = given if given.is_absolute() else Path.home() / ".cache"
    folder = parent / "moejax" / f"tests-{versions}-{digest}"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise OSError(f"{folder} can be written by others")
    return folder


def remove_old(folder: Path) -> None:
    """Removes programs that were compiled long ago; another process may remove them, too."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                path.unlink()


def compilation_cache_folder() -> str:
    """Returns where jax, which must not be imported yet, is to keep what it compiles."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return os.environ["JAX_COMPILATION_CACHE_DIR"]
    try:
        folder = cache_folder()
        remove_old(folder)
    except (OSError, RuntimeError):
        folder = Path(tempfile.mkdtemp(prefix="moejax-tests-compiled-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def compiler_settings() -> dict[str, str]:
    """Returns variables by which this process and those that tests start compile fast.

    Not in the process that tests/moe/test_optimized.py starts: its programs are as users run them.
    """
    is_fast = "MOEJAX_TESTS_OPTIMIZED" not in os.environ
    flags = [os.environ.get("XLA_FLAGS", "")]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones may abort on a flag
        # Eight devices on two busy cores may wait for each other longer than the 40 s after which
        # XLA ends the process.
        flags.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")
        if is_fast:
            # A small train step compiles twice as fast without these emitters, and a tenth faster
            # in one piece than in up to 32.
            flags.append("--xla_cpu_use_fusion_emitters=false")
            flags.append("--xla_cpu_parallel_codegen_split_count=1")
    settings = {}
    if any(flags):  # XLA takes a blank for the name of a file, and exits without a word
        settings["XLA_FLAGS"] = " ".join(flags).strip()
    if is_fast:  # three times faster; shapes here are tiny
        settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return settings
