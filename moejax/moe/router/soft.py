"""Soft mixtures of experts: slots mix all tokens of a sequence. Not causal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.kernels.arrays import takes_numpy
from moejax.moe.router.routing import SoftRouting


@takes_numpy
def route_soft(logits_BLS: Float[Array, "B L S"], mask_BL: Bool[Array, "B L"]) -> SoftRouting:
    """Mixes all tokens of a sequence in each slot, and all slots in each token's output.

    Source: Puigcerver et al. 2023 (Soft MoE), section 2.1.
    """
    is_token_BL1 = mask_BL[..., None]
    # Finite, so that a row of padding gives no NaN.
    masked_BLS = jnp.where(is_token_BL1, logits_BLS, -1e30)
    over_tokens_BLS = jax.nn.softmax(masked_BLS, axis=1)
    dispatch_BLS = jnp.where(is_token_BL1, over_tokens_BLS, 0.0)
    over_slots_BLS = jax.nn.softmax(logits_BLS, axis=2)
    combine_BLS = jnp.where(is_token_BL1, over_slots_BLS, 0.0)
    return SoftRouting(logits_BLS, dispatch_BLS, combine_BLS)
