"""Grouped matrix product: rows sorted by group, each group multiplied by its own matrix.

It is the only heavy product of a dropless MoE layer. Every implementation has the same signature
and the same guarantees: rows beyond `sum(group_sizes)` are not read and come back as zeros,
and an empty group has exactly zero gradient.

    implementation  where it is fast       how
    tiled           CPU                    loops over experts and blocks of rows, own VJP
    ragged          TPU                    `jax.lax.ragged_dot` (a kernel of XLA:TPU)
    tokamax         GPU, TPU               Triton and Mosaic kernels of the optional package tokamax
    padded          GPU without tokamax    batched products over equal slots, repeated as needed
    dense           nowhere                every row by every matrix: the reference
"""

import functools
import logging
from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy
from moejax.kernels.device import platform
from moejax.kernels.grouped_matmul.padded import grouped_matmul_padded
from moejax.kernels.grouped_matmul.ragged import grouped_matmul_ragged, needs_megablox
from moejax.kernels.grouped_matmul.reference import grouped_matmul_dense
from moejax.kernels.grouped_matmul.tiled import block_rows, grouped_matmul_tiled
from moejax.kernels.grouped_matmul.tokamax import grouped_matmul_tokamax, why_unavailable
from moejax.kernels.vma import unify_vma

IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]] = {
    "tiled": grouped_matmul_tiled,
    "ragged": grouped_matmul_ragged,
    "tokamax": grouped_matmul_tokamax,
    "padded": grouped_matmul_padded,
    "dense": grouped_matmul_dense,
}

BEST = {
    "cpu": ("tiled", "moejax's own loops over tiles"),
    "gpu": ("tokamax", "its kernels multiply a group's rows by the group's matrix alone"),
    "tpu": ("ragged", "XLA:TPU has a grouped kernel"),
}
"""By platform: what "auto" stands for where it is available, and why."""

ANYWHERE = "padded"
"""What runs where nothing better does.

On most platforms XLA multiplies all rows by all matrices in `ragged_dot`.
"""


@takes_numpy
def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    *,
    implementation: str = "auto",
    padding_rows: int = 0,
) -> Float[Array, "R F"]:
    """Multiplies each group of consecutive rows by its own matrix.

    Args:
      x_RD: rows sorted by group, float32 or bfloat16. Rows from `sum(group_sizes_E)` on may hold
        anything, NaN too.
      w_EDF: one matrix per group, of the dtype of `x_RD`.
      group_sizes_E: rows of each group; their sum is at most R.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the platform's best; see
        `resolve_implementation`.
      padding_rows: this many last rows belong to no group, whatever the group sizes;
        `padding_rows_for` says how many save the tiled implementation its copies of `x_RD` and of
        the result.

    Returns:
      The products, in the dtype of `x_RD` with float32 accumulation; zeros in the rows that belong
      to no group.

    Raises:
      ValueError: an unknown implementation.
    """
    name = resolve_implementation(implementation)
    x_RD, w_EDF, group_sizes_E = unify_vma(x_RD, w_EDF, group_sizes_E)
    return IMPLEMENTATIONS[name](x_RD, w_EDF, group_sizes_E, padding_rows)


def padding_rows_for(num_rows: int, num_groups: int, implementation: str = "auto") -> int:
    """Returns how many rows to append to `num_rows` rows so that `grouped_matmul` copies nothing.

    They are its `padding_rows`.
    """
    if resolve_implementation(implementation) != "tiled":
        return 0
    return block_rows(num_rows, num_groups)


def resolve_implementation(implementation: str) -> str:
    """Returns the implementation to run: "auto" and unavailable ones are replaced.

    The platform is that of the mesh in context, or of jax's default device.

    Args:
      implementation: a key of `IMPLEMENTATIONS`, or "auto".

    Returns:
      A key of `IMPLEMENTATIONS`. The first time that it is not what was asked for, a line of the
      log says why.

    Raises:
      ValueError: another name.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"grouped_matmul implementation {implementation!r} must be auto or one of "
            f"{[*IMPLEMENTATIONS]}"
        )
    missing = tuple(unavailable().items())
    return _choose(implementation, platform(), missing)


def unavailable() -> dict[str, str]:
    """Returns the implementations that cannot run on the platform at hand, and why."""
    why = why_unavailable()
    if why is None:
        return {}
    return {"tokamax": why}


def can_check_vma(implementation: str) -> bool:
    """Whether `shard_map` can check what varies over devices.

    It cannot for Pallas kernels, which do not declare it of their results.
    """
    name = resolve_implementation(implementation)
    if name == "ragged":
        return not needs_megablox()
    return name != "tokamax"


@functools.cache
def _choose(wanted: str, platform: str, missing: tuple[tuple[str, str], ...]) -> str:
    """Chooses an implementation; cached, so that every choice is logged once."""
    log = logging.getLogger("moejax")
    why_missing = dict(missing)
    best, why = BEST.get(platform, (ANYWHERE, "it runs anywhere"))
    if best in why_missing:
        best, why = ANYWHERE, why_missing[best]
    if wanted in why_missing:
        log.warning(
            "grouped_matmul: %s instead of %s on %s (%s)",
            best,
            wanted,
            platform,
            why_missing[wanted],
        )
        return best
    if wanted == "auto":
        log.info("grouped_matmul: %s on %s (%s)", best, platform, why)
        return best
    return wanted
