"""Suppresses what orbax and tensorstore print about reads that fail together with another one.

The error of one read is raised and reported; those of the others would repeat it, without context.
"""

import contextlib
import functools
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet_reads() -> Iterator[None]:
    """Within it, only the error of one failed read is reported: the one that is raised."""
    _ignore_failed_reads()
    try:
        yield
    except Exception:
        # Coroutines that have begun are not awaited any more, and warn when they are collected.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        gc.collect()
        raise


def _ignore_failed_reads() -> None:
    """Ignores, from now on, orbax's reads that fail or end after the first failure.

    Some of them end much later, so that this is never undone.
    """
    logger = logging.getLogger("asyncio")
    if _is_logged not in logger.filters:
        logger.addFilter(_is_logged)
        sys.unraisablehook = functools.partial(_pass_on_others, sys.unraisablehook)


def _is_logged(record: logging.LogRecord) -> bool:
    """Whether a record of asyncio is about anything but a failed read."""
    text = record.getMessage()
    is_read = "orbax" in text or "tensorstore" in text
    return not is_read or "exception was never retrieved" not in text


def _pass_on_others(previous: Callable[[Any], object], unraisable: Any) -> None:
    """Calls the previous hook, except for reads of orbax."""
    code = getattr(unraisable.object, "cr_code", None)
    is_read = code is not None and "orbax" in Path(code.co_filename).parts
    error = unraisable.exc_value
    is_late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not is_read and not is_late:
        previous(unraisable)
