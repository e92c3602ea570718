"""Where tokens meet experts on a mesh: the only file with collectives.

The batch is split over `data`, `fsdp` and `expert`. So far there is one strategy, `gather`: expert weights are
all-gathered over `fsdp` and `expert` where they are used, and each device sends its own tokens through all experts. The
hidden width of the experts is split over `tensor`, whose partial outputs are added up.
"""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from moejax.sharding import BATCH_AXES

LocalExperts = Callable[..., tuple[jax.Array, jax.Array]]


def exchange(
    run_local: LocalExperts,
    x_BLD: jax.Array,
    experts_BLK: jax.Array,
    weights_BLK: jax.Array,
    gate_up_ED2F: jax.Array,
    down_EFD: jax.Array,
    limit: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs dispatch, experts and combine on each device's part of the batch.

    Args:
      run_local: `(x_bLD, experts_bLK, weights_bLK, gate_up_ED2f, down_EfD, limit) -> (y_bLD, kept_bLK)` on one device.
      x_BLD: tokens.
      experts_BLK: selected experts.
      weights_BLK: their combine weights.
      gate_up_ED2F: the experts' gate and up projections.
      down_EFD: the experts' down projections.
      limit: slots that may be used per expert and sequence (capacity dispatch).

    Returns:
      The combined outputs, and whether each choice was given a row.
    """
    mesh = jax.sharding.get_abstract_mesh()
    arguments = (x_BLD, experts_BLK, weights_BLK, gate_up_ED2F, down_EFD, limit)
    if mesh.empty:
        return run_local(*arguments)

    def on_device(*local):
        y_bLD, kept_bLK = run_local(*local)
        return jax.lax.psum(y_bLD, "tensor"), kept_bLK

    batch = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        on_device,
        in_specs=(
            batch,
            batch,
            batch,
            PartitionSpec(None, None, None, "tensor"),
            PartitionSpec(None, "tensor"),
            PartitionSpec(),
        ),
        out_specs=(batch, batch),
    )(*arguments)
