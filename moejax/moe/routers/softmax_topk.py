"""Softmax over all experts, then the top K of it: GShard, Switch, Mixtral, OLMoE, Qwen-MoE."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from moejax.moe.routers.routing import Routing

SAVED_NAMES = ("routing_experts", "routing_weights")
"""Names under which selection and weights are saved by remat, so that a recomputation can never route differently."""


def route_softmax_top_k(
    logits_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], *, top_k: int, renormalize: bool
) -> Routing:
    """Sends each token to the K experts of highest probability.

    With p = softmax(logits), the weights are the selected p (OLMoE), or those divided by their sum (Mixtral), which
    equals the softmax over the selected logits. Ties go to the lowest index; hence float32 logits.

    Args:
      logits_TE: router logits, float32.
      mask_T: False where a token is padding: it is sent to no expert.
      top_k: experts per token, K.
      renormalize: make the weights of a token sum to 1.

    Returns:
      The `Routing`.

    Source: Shazeer et al. 2017 (section 2), Jiang et al. 2024 (Mixtral, section 2.1), Muennighoff et al. 2024 (OLMoE).
    """
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    _, experts_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), top_k)
    experts_TK = checkpoint_name(experts_TK.astype(jnp.int32), "routing_experts")
    weights_TK = jnp.take_along_axis(probs_TE, experts_TK, axis=-1)
    if renormalize:
        # The largest of K probabilities is at least 1/E: the sum cannot vanish.
        weights_TK = weights_TK / weights_TK.sum(axis=-1, keepdims=True)
    weights_TK = checkpoint_name(weights_TK, "routing_weights")
    is_token_T1 = mask_T[:, None]
    return Routing(
        logits_TE=logits_TE,
        probs_TE=probs_TE,
        experts_TK=jnp.where(is_token_T1, experts_TK, logits_TE.shape[-1]),
        weights_TK=jnp.where(is_token_T1, weights_TK, 0.0),
    )


def route_switch(logits_TE: Float[Array, "T E"], mask_T: Bool[Array, "T"], *, top_k: int, renormalize: bool) -> Routing:
    """Sends each token to its one most probable expert, weighted by that probability.

    `top_k` must be 1 and `renormalize` False: a renormalised single weight is always 1, and the router would learn
    nothing from the task. `config.validate` refuses other values.

    Source: Fedus et al. 2021 (Switch Transformer, equation 2).
    """
    return route_softmax_top_k(logits_TE, mask_T, top_k=top_k, renormalize=renormalize)
