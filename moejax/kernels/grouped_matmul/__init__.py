"""Grouped matrix product: rows sorted by group, each group multiplied by its own matrix.

It is the only heavy product of a dropless MoE layer. Every implementation has the same signature and the same
guarantees: rows beyond `sum(group_sizes)` are read by nobody and come back as zeros, and an empty group has exactly
zero gradient.

    implementation  where it is fast       how
    tiled           CPU                    loops over experts and blocks of rows, own VJP
    ragged          TPU                    `jax.lax.ragged_dot` (XLA:TPU lowers it to a native grouped kernel)
    padded          GPU                    batched products over equal slots, as often as the largest group needs
    dense           nowhere                every row by every matrix: the reference
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.grouped_matmul.dense import grouped_matmul_dense
from moejax.kernels.grouped_matmul.padded import grouped_matmul_padded
from moejax.kernels.grouped_matmul.ragged import grouped_matmul_ragged
from moejax.kernels.grouped_matmul.tiled import block_rows, grouped_matmul_tiled
from moejax.kernels.varying import vary_alike

IMPLEMENTATIONS: dict[str, Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]] = {
    "tiled": grouped_matmul_tiled,
    "ragged": grouped_matmul_ragged,
    "padded": grouped_matmul_padded,
    "dense": grouped_matmul_dense,
}

BEST = {
    "cpu": ("tiled", "moejax's own loops over tiles"),
    "tpu": ("ragged", "XLA:TPU has a grouped kernel"),
}
"""By platform: what "auto" stands for, and why; others have `padded`."""


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int[Array, "E"],
    *,
    implementation: str = "auto",
    spare_rows: int = 0,
) -> Float[Array, "R F"]:
    """Multiplies each group of consecutive rows by its own matrix.

    Args:
      x_RD: rows sorted by group, float32 or bfloat16. Rows from `sum(group_sizes_E)` on may hold anything, NaN too.
      w_EDF: one matrix per group, of the dtype of `x_RD`.
      group_sizes_E: rows of each group; their sum is at most R.
      implementation: a key of `IMPLEMENTATIONS`, or "auto" for the platform's best.
      spare_rows: so many last rows belong to no group, whatever the group sizes; `spare_rows_for` says how many spare
        the tiled implementation its copies of `x_RD` and of the result.

    Returns:
      The products, in the dtype of `x_RD` with float32 accumulation; zeros in the rows that belong to no group.

    Raises:
      ValueError: an unknown implementation.
    """
    name = resolve_implementation(implementation)
    x_RD, w_EDF, group_sizes_E = vary_alike(jnp.asarray(x_RD), jnp.asarray(w_EDF), jnp.asarray(group_sizes_E))
    return IMPLEMENTATIONS[name](x_RD, w_EDF, group_sizes_E, spare_rows)


def spare_rows_for(num_rows: int, num_groups: int, implementation: str = "auto") -> int:
    """Rows to append to `num_rows` rows of content, so that `grouped_matmul` copies nothing; see `spare_rows`."""
    return block_rows(num_rows, num_groups) if resolve_implementation(implementation) == "tiled" else 0


def resolve_implementation(implementation: str) -> str:
    """The implementation that "auto" stands for on the default backend; other names pass if they exist."""
    if implementation == "auto":
        return _choose(jax.default_backend())
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped_matmul implementation {implementation!r} must be auto or one of {[*IMPLEMENTATIONS]}"
        )
    return implementation


@functools.cache
def _choose(platform: str) -> str:
    chosen, why = BEST.get(platform, ("padded", "XLA multiplies all rows by all matrices in ragged_dot there"))
    logging.getLogger("moejax").info("grouped_matmul: %s on %s (%s)", chosen, platform, why)
    return chosen
