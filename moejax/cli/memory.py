"""Explains too little memory: limits that make libraries crash, and allocations that fail."""

import logging
import resource

ENOUGH_BYTES = 4 * 10**9
"""Of address space.

The smallest recipe trained with 3 GB, and crashed with less than 1.5 (jax 0.10.2 on CPU).
"""

DEVICE_ERROR = "JaxRuntimeError"
"""The type of jax's errors; a full disk is RESOURCE_EXHAUSTED too, in errors of others."""

log = logging.getLogger("moejax")


def warn_of_small_limit() -> None:
    """Logs a line if this process may use so little address space that jax crashes."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_BYTES:
        log.warning(
            "this process may use %.1f GB of address space (ulimit -v %d), and moejax needs about "
            "%.0f GB or more: it may end by a segmentation fault; run `ulimit -v unlimited` first",
            soft / 1e9,
            soft // 1024,
            ENOUGH_BYTES / 1e9,
        )


def explain_memory(error: BaseException) -> str | None:
    """Returns a line about an allocation that failed; None for any other error."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError):
        where = "the host"
    elif "RESOURCE_EXHAUSTED" in reason and type(error).__name__ == DEVICE_ERROR:
        where = "a device"
    else:
        return None
    return (
        f"there is no more memory on {where} ({reason}); lower train.batch_size, raise "
        "train.accumulation or the size of the mesh, or free memory that other processes hold"
    )
