"""Expert choice: each expert takes the tokens that want it most. Not causal."""

import jax
import jax.numpy as jnp

from moejax.config import MoeConfig
from moejax.moe.router.routing import RouterInputs, SlotRouting
from moejax.moe.router.selection import save_for_remat


def route_expert_choice(inputs: RouterInputs, config: MoeConfig, slots: int) -> SlotRouting:
    """Gives each expert the `slots` tokens of a sequence with the highest probability for it.

    The weight is that probability, not normalised. A slot is empty where a sequence has too few
    tokens; a token may be taken by no expert.

    Source: Zhou et al. 2022, section 3; they choose among the tokens of a batch, here it is those
    of a sequence, so that a sequence does not depend on the others.
    """
    num_experts = inputs.logits_TE.shape[-1]
    probs_TE = jax.nn.softmax(inputs.logits_TE, axis=-1)
    probs_BLE = probs_TE.reshape(-1, inputs.length, num_experts)
    probs_BEL = probs_BLE.swapaxes(1, 2)
    mask_B1L = inputs.mask_T.reshape(-1, 1, inputs.length)
    ranking_BEL = jax.lax.stop_gradient(probs_BEL)
    ranking_BEL = jnp.where(mask_B1L, ranking_BEL, -1.0)
    values_BEC, positions_BEC = jax.lax.top_k(ranking_BEL, slots)
    positions_BEC = jnp.where(values_BEC >= 0, positions_BEC, inputs.length)
    shape = positions_BEC.shape
    positions_BX = positions_BEC.astype(jnp.int32).reshape(shape[0], -1)
    positions_BEC = save_for_remat(positions_BX).reshape(shape)
    in_range_BEC = jnp.minimum(positions_BEC, inputs.length - 1)
    probs_BEC = jnp.take_along_axis(probs_BEL, in_range_BEC, axis=-1)
    is_filled_BEC = positions_BEC < inputs.length
    weights_BEC = jnp.where(is_filled_BEC, probs_BEC * config.route_scale, 0.0)
    return SlotRouting(inputs.logits_TE, probs_TE, positions_BEC, weights_BEC)
