"""Updates of what routers carry besides parameters.

They are made once per step, from sums over the global batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.kernels.arrays import takes_numpy


@takes_numpy
def update_bias(
    bias_NE: Float[Array, "N E"],
    assignments_NE: Int[Array, "N E"],
    rate: Float[Array, ""],
    *,
    is_centered: bool,
) -> Float[Array, "N E"]:
    """Takes one step of the selection bias.

    It goes up for experts with less than the mean load, and down for those with more.

    Args:
      bias_NE: before the step.
      assignments_NE: choices over the global batch, before dropping.
      rate: size of the step.
      is_centered: subtract the mean afterwards.

    Source: Wang et al. 2024 (auxiliary-loss-free balancing), algorithm 1; DeepSeek-V3,
    section 2.1.2.
    """
    counts_NE = assignments_NE.astype(jnp.float32)
    mean_N1 = counts_NE.mean(axis=-1, keepdims=True)
    direction_NE = jnp.sign(mean_N1 - counts_NE)
    bias_NE += rate * direction_NE
    if not is_centered:
        return bias_NE
    mean_bias_N1 = bias_NE.mean(axis=-1, keepdims=True)
    return bias_NE - mean_bias_N1


@takes_numpy
def update_quantiles(
    margins_NTE: Float[Array, "N T E"],
    num_tokens_N: Float[Array, "N"],
    top_k: int,
) -> Float[Array, "N E"]:
    """Returns the selection bias with which each expert would have had an equal share of tokens.

    It is minus beta, centred; beta_e is the (T K / E + 1)-th largest margin of expert e among the T
    real tokens. It is found bit by bit from counts, so that tokens may be on any number of devices
    and none has to move.

    Args:
      margins_NTE: of the global batch, from `sums.quantile_margins`; -inf at padding. NaN affects
        its own expert only.
      num_tokens_N: how many of the tokens are not padding; the same for every layer.
      top_k: experts per token, K.

    Source: quantile balancing, 2026.
    """
    num_experts = margins_NTE.shape[-1]
    num_tokens_N = num_tokens_N.astype(jnp.int32)
    share_N = num_tokens_N * top_k // num_experts
    rank_N = share_N + 1
    rank_N1 = rank_N[:, None]
    beta_NE = _find_by_rank(margins_NTE, rank_N1)
    beta_NE = jnp.where(jnp.isfinite(beta_NE), beta_NE, 0.0)
    mean_N1 = beta_NE.mean(axis=-1, keepdims=True)
    return mean_N1 - beta_NE


def _find_by_rank(values_NTE: jax.Array, rank_N1: jax.Array) -> jax.Array:
    """Returns the value of each expert with this rank from above, found bit by bit."""
    num_layers, _, num_experts = values_NTE.shape
    keys_NTE, sign = _to_ordered_integers(values_NTE)

    def set_bit(i, found_NE):
        """Sets the next bit where as many values as the rank are not below the result."""
        bit = sign >> i.astype(jnp.uint32)
        candidate_NE = found_NE | bit
        is_above_NTE = keys_NTE >= candidate_NE[:, None]
        num_above_NE = is_above_NTE.sum(axis=1)
        is_enough_NE = num_above_NE >= rank_N1
        return jnp.where(is_enough_NE, candidate_NE, found_NE)

    zeros_NE = jnp.zeros((num_layers, num_experts), jnp.uint32)
    found_NE = jax.lax.fori_loop(0, 32, set_bit, zeros_NE)
    # Back from the integers to the floats.
    bits_NE = jnp.where(found_NE >= sign, found_NE ^ sign, ~found_NE)
    return jax.lax.bitcast_convert_type(bits_NE, jnp.float32)


def _to_ordered_integers(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns unsigned integers that are ordered as the floats are, and the sign bit.

    All bits of negative ones are flipped, and the sign bit of the others.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    is_negative = bits >= sign
    keys = jnp.where(is_negative, ~bits, bits | sign)
    return keys, sign


@takes_numpy
def update_idle_steps(
    idle_NE: Int[Array, "N E"],
    assignments_NE: Int[Array, "N E"],
) -> Int[Array, "N E"]:
    """Returns the steps since each expert was last chosen."""
    return jnp.where(assignments_NE > 0, 0, idle_NE + 1)
