"""How evenly experts are loaded: shares and their variation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy
from moejax.moe.balancing.stats import RoutingStats


@takes_numpy
def load_fractions(stats: RoutingStats) -> Float[Array, "N E"]:
    """Returns the fraction of all choices that fell on each expert, before dropping."""
    return fractions(stats.assignments_E)


@takes_numpy
def fractions(assignments_NE: Int[Array, "N E"]) -> Float[Array, "N E"]:
    """Returns the share of each expert in a layer's choices; zeros where there are none."""
    counts_NE = assignments_NE.astype(jnp.float32)
    total_N1 = counts_NE.sum(axis=-1, keepdims=True)
    safe_total_N1 = jnp.maximum(total_N1, 1.0)
    return counts_NE / safe_total_N1


@takes_numpy
def cv_squared(values_NE: Float[Array, "N E"]) -> Float[Array, "N"]:
    """Returns the squared coefficient of variation over experts; 0 where all values are 0.

    Source: Shazeer et al. 2017, equation 7.
    """
    # In units of the largest, where nothing underflows: a small constant in the denominator would
    # let a router lower its loss by lowering all its weights.
    largest_N1 = values_NE.max(axis=-1, keepdims=True)
    largest_N1 = jax.lax.stop_gradient(largest_N1)
    unit_N1 = jnp.where(largest_N1 > 0, largest_N1, 1.0)
    values_NE /= unit_N1
    mean_N = values_NE.mean(axis=-1)
    variance_N = values_NE.var(axis=-1)
    safe_mean_N = jnp.where(mean_N > 0, mean_N, 1.0)
    return variance_N / safe_mean_N**2


def token_counts(stats: RoutingStats) -> Float[Array, "N"]:
    """Returns the number of tokens, at least 1, so that means over an empty batch are zeros."""
    return jnp.maximum(stats.num_tokens, 1.0)
