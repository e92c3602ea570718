"""What orbax and tensorstore would tell of reads that failed beside the one whose error is passed on."""

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
    """Keeps asyncio and tensorstore from telling of every read that failed with the one whose error is passed on."""
    _leave_out_failed_reads()
    try:
        yield
    except Exception:
        warnings.filterwarnings(
            "ignore", "coroutine .* was never awaited", RuntimeWarning
        )  # nor will they be
        gc.collect()  # what was begun and is not awaited any more tells when it is collected
        raise


def _leave_out_failed_reads() -> None:
    """Says nothing, from now on, of orbax's reads that fail or end after the first failure: some end much later."""
    logger = logging.getLogger("asyncio")
    if _is_told not in logger.filters:
        logger.addFilter(_is_told)
        sys.unraisablehook = functools.partial(_tell_of_others, sys.unraisablehook)


def _is_told(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "exception was never retrieved" not in text or (
        "orbax" not in text and "tensorstore" not in text
    )


def _tell_of_others(previous: Callable[[Any], object], unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)
    is_read = code is not None and "orbax" in Path(code.co_filename).parts
    error = unraisable.exc_value
    is_late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    if not is_read and not is_late:
        previous(unraisable)
