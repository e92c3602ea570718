"""Soft mixtures of experts: slots mix all tokens of a sequence. Not causal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.kernels.arrays import takes_numpy
from moejax.moe.router.routing import SoftRouting


@takes_numpy
def route_soft(logits_BLS: Float[Array, "B L S"], mask_BL: Bool[Array, "B L"]) -> SoftRouting:
    """Each slot is a mixture of all tokens of its sequence, each token's output a mixture of all slots.

    Source: Puigcerver et al. 2023 (Soft MoE), section 2.1.
    """
    is_token_BL1 = mask_BL[..., None]
    masked_BLS = jnp.where(is_token_BL1, logits_BLS, -1e30)  # finite: a row of padding gives no NaN
    return SoftRouting(
        logits_BLS=logits_BLS,
        dispatch_BLS=jnp.where(is_token_BL1, jax.nn.softmax(masked_BLS, axis=1), 0.0),
        combine_BLS=jnp.where(is_token_BL1, jax.nn.softmax(logits_BLS, axis=2), 0.0),
    )
