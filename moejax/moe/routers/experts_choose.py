"""Routers in which experts choose tokens, or mix all of them. Not causal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.config import MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.routers.routing import RouterInputs, SlotRouting, SoftRouting
from moejax.moe.routers.selection import named


def route_expert_choice(inputs: RouterInputs, config: MoeConfig, slots: int) -> SlotRouting:
    """Each expert takes the `slots` tokens of a sequence that give it the highest probability.

    The weight is that probability, not normalised. A slot is empty where a sequence has too few tokens; a token may be
    taken by no expert.

    Source: Zhou et al. 2022, section 3; they choose among the tokens of a batch, here it is those of a sequence, so
    that a sequence does not depend on the others.
    """
    num_experts = inputs.logits_TE.shape[-1]
    probs_TE = jax.nn.softmax(inputs.logits_TE, axis=-1)
    probs_BEL = probs_TE.reshape(-1, inputs.length, num_experts).swapaxes(1, 2)
    mask_B1L = inputs.mask_T.reshape(-1, 1, inputs.length)
    ranking_BEL = jnp.where(mask_B1L, jax.lax.stop_gradient(probs_BEL), -1.0)
    values_BEC, positions_BEC = jax.lax.top_k(ranking_BEL, slots)
    positions_BEC = jnp.where(values_BEC >= 0, positions_BEC, inputs.length)
    batch = positions_BEC.shape[0]
    positions_BEC = named(positions_BEC.astype(jnp.int32).reshape(batch, -1)).reshape(positions_BEC.shape)
    taken_BEC = jnp.take_along_axis(probs_BEL, jnp.minimum(positions_BEC, inputs.length - 1), axis=-1)
    weights_BEC = jnp.where(positions_BEC < inputs.length, taken_BEC * config.route_scale, 0.0)
    return SlotRouting(inputs.logits_TE, probs_TE, positions_BEC, weights_BEC)


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
