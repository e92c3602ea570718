"""The gradient of the matrices on TPU, by the Pallas kernel that jax ships as megablox.

Its tiles start at multiples of their height, wherever groups do: a group pays for the tiles
that it touches.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def outer_products_megablox(
    x_RD: Float[Array, "R D"],
    dy_RF: Float[Array, "R F"],
    group_sizes_E: Int[Array, "E"],
    dtype: DTypeLike = jnp.float32,
    *,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """Returns for each group the sum over its rows of the outer products of `x` and `dy`.

    Args:
      x_RD: rows sorted by group, float32 or bfloat16; those from `sum(group_sizes_E)` on may
        hold anything.
      dy_RF: rows in the same order.
      group_sizes_E: rows of each group.
      dtype: of the result, which is accumulated in float32.
      interpret: run the kernel on any platform, slowly.

    Returns:
      The sums; zeros for a group without rows.
    """
    # Imports Pallas, which takes time.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    num_rows = x_RD.shape[0]
    num_groups = group_sizes_E.shape[0]
    height = 128 if num_rows < 512 * num_groups else 512
    num_missing = -num_rows % height
    padding = ((0, num_missing), (0, 0))
    x_RD = jnp.pad(x_RD, padding)
    dy_RF = jnp.pad(dy_RF, padding)
    # Larger tiles do not fit the memory of a core.
    width_D = min(512, x_RD.shape[1])
    width_F = min(512, dy_RF.shape[1])
    return tgmm(
        x_RD.T,
        dy_RF,
        group_sizes_E.astype(jnp.int32),
        jnp.dtype(dtype),
        (height, width_D, width_F),
        interpret=interpret,
    )
