"""What a MoE layer reports: sums over tokens, which add up over microbatches and devices.

Losses and metrics are functions of these sums, computed once they cover the whole global batch (`balance.py`). That is
what makes them independent of mesh, accumulation and process count.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moejax.moe.routers.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStats:
    """Sums over the real tokens of a batch; stacked by layer, every array has a leading axis of MoE layers.

    Attributes:
      num_tokens: real tokens, float32 scalar.
      assignments_E: choices of each expert before dropping, int32 [E]; no gradient.
      probs_E: sums of the router's probabilities, float32 [E].
      z: sum of logsumexp(logits)^2.
      entropy: sum of the entropies of the router's distributions, nats.
      gate_mass: sum of the combine weights.
      top_prob: sum of each token's highest probability.
      logit_square: sum over tokens and experts of squared logits.
      dropped: choices that found no slot.
      unserved: tokens all of whose choices were dropped.
      routing: the token-level decisions, only when a trace was asked for; None otherwise.
    """

    num_tokens: jax.Array
    assignments_E: jax.Array
    probs_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    gate_mass: jax.Array
    top_prob: jax.Array
    logit_square: jax.Array
    dropped: jax.Array
    unserved: jax.Array
    routing: Routing | None = None


def collect(
    routing: Routing, mask_T: Bool[Array, "T"], kept_TK: Bool[Array, "T K"], *, trace: bool = False
) -> RoutingStats:
    """Sums up one layer's routing.

    Args:
      routing: the router's decisions.
      mask_T: False where a token is padding: it enters no sum.
      kept_TK: whether the choice was given a row.
      trace: keep the routing itself beside the sums.
    """
    is_token_T1 = mask_T[:, None]
    logits_TE = jnp.where(is_token_T1, routing.logits_TE, 0.0)
    probs_TE = jnp.where(is_token_T1, routing.probs_TE, 0.0)
    lse_T = jnp.where(mask_T, jax.nn.logsumexp(logits_TE, axis=-1), 0.0)
    # -p log p = p (logsumexp - logit), finite even where p underflows.
    entropy = jnp.sum(lse_T) - jnp.sum(probs_TE * logits_TE)
    is_dropped_TK = is_token_T1 & ~kept_TK
    return RoutingStats(
        num_tokens=mask_T.sum(dtype=jnp.float32),
        assignments_E=count_assignments(routing.experts_TK, routing.logits_TE.shape[-1]),
        probs_E=probs_TE.sum(axis=0),
        z=jnp.sum(lse_T**2),
        entropy=entropy,
        gate_mass=routing.weights_TK.sum(),
        top_prob=probs_TE.max(axis=-1).sum(),
        logit_square=jnp.sum(logits_TE**2),
        dropped=is_dropped_TK.sum(dtype=jnp.float32),
        unserved=is_dropped_TK.all(axis=-1).sum(dtype=jnp.float32),
        routing=routing if trace else None,
    )


def count_assignments(experts_TK: Int[Array, "T K"], num_experts: int) -> Int[Array, "E"]:
    """How often each expert was chosen; ids outside [0, E) count nowhere."""
    # Comparing sorted ids with each boundary needs no [T, K, E] array and no scatter.
    sorted_R = jnp.sort(experts_TK.reshape(-1))
    ends_E = jnp.searchsorted(sorted_R, jnp.arange(num_experts), side="right").astype(jnp.int32)
    return jnp.diff(ends_E, prepend=0)
