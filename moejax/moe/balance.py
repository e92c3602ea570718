"""Auxiliary losses and routing metrics: pure functions of `RoutingStats` summed over their whole scope.

Every function takes statistics stacked by layer, with arrays `[N, ...]` over the N MoE layers, and returns one value
per layer, so that the number of loss terms equals the number of MoE layers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.moe.stats import RoutingStats


def balance_loss(stats: RoutingStats, top_k: int) -> Float[Array, "N"]:
    """The load-balancing loss of GShard and Switch, 1 at perfect balance and at most E/K.

    E * sum_e f_e P_e with f_e the fraction of choices that fell on expert e, a constant for the gradient, and P_e the
    mean probability the router gave it, over all tokens of the global batch.

    Args:
      stats: sums over the global batch, stacked by layer.
      top_k: experts per token, K.

    Source: Fedus et al. 2021, equations 4 to 6; normalised as in Megatron-Core and OLMo-core. Hugging Face's Mixtral
    and MaxText report K times this value.
    """
    load_NE = jax.lax.stop_gradient(load_fractions(stats, top_k))
    probs_NE = stats.probs_E / _tokens(stats)[:, None]
    return load_NE.shape[-1] * jnp.sum(load_NE * probs_NE, axis=-1)


def z_loss(stats: RoutingStats) -> Float[Array, "N"]:
    """Mean over tokens of logsumexp(logits)^2, which keeps router logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.
    """
    return stats.z / _tokens(stats)


def load_fractions(stats: RoutingStats, top_k: int) -> Float[Array, "N E"]:
    """Fraction of all choices that fell on each expert, before dropping; rows sum to 1."""
    return stats.assignments_E.astype(jnp.float32) / (top_k * _tokens(stats)[:, None])


def routing_metrics(stats: RoutingStats, top_k: int) -> dict[str, Float[Array, "N"]]:
    """Metrics of each layer.

    Returns:
      `max_violation`: highest load over the mean load, minus 1 (0 is perfect balance, E - 1 collapse).
      `load_cv`: coefficient of variation of the load.
      `load_entropy`: entropy of the load, nats (log E is perfect balance).
      `entropy`: mean entropy of the router's distribution, nats.
      `idle_experts`: experts that no token of this batch chose.
      `dropped`: fraction of choices that found no slot.
      `unserved`: fraction of tokens all of whose choices were dropped.
      `gate_mass`: mean sum of a token's combine weights.
      `top_prob`: mean of the highest probability.
      `logit_rms`: root mean square of the router logits.
    """
    load_NE = load_fractions(stats, top_k)
    num_experts = load_NE.shape[-1]
    tokens_N = _tokens(stats)
    log_load_NE = jnp.log(jnp.where(load_NE > 0, load_NE, 1.0))
    return {
        "max_violation": num_experts * load_NE.max(axis=-1) - 1,
        "load_cv": load_NE.std(axis=-1) * num_experts,
        "load_entropy": -jnp.sum(load_NE * log_load_NE, axis=-1),
        "entropy": stats.entropy / tokens_N,
        "idle_experts": jnp.sum(stats.assignments_E == 0, axis=-1).astype(jnp.float32),
        "dropped": stats.dropped / (top_k * tokens_N),
        "unserved": stats.unserved / tokens_N,
        "gate_mass": stats.gate_mass / tokens_N,
        "top_prob": stats.top_prob / tokens_N,
        "logit_rms": jnp.sqrt(stats.logit_square / (num_experts * tokens_N)),
    }


def _tokens(stats: RoutingStats) -> Float[Array, "N"]:
    """Token counts, at least 1, so that an empty batch gives zeros."""
    return jnp.maximum(stats.num_tokens, 1.0)
