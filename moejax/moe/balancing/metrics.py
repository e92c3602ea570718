"""Metrics of routing: pure functions of `RoutingStats`, one value per layer."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.kernels.arrays import takes_numpy
from moejax.moe.balancing.load import cv_squared, load_fractions, token_counts
from moejax.moe.balancing.stats import RoutingStats


@takes_numpy
def routing_metrics(stats: RoutingStats) -> dict[str, Float[Array, "N"]]:
    """Returns the metrics of each layer.

    Returns:
      `max_violation`: highest load over the mean load, minus 1 (0 is perfect balance, E -
        1 collapse).
      `load_cv`: coefficient of variation of the load; `importance_cv`: of the sums of weights.
      `load_entropy`: entropy of the load, nats (log E is perfect balance).
      `entropy`: mean entropy of the router's distribution, nats.
      `idle_experts`: experts that no token of this batch chose.
      `dropped`: fraction of choices that found no slot; `moved`: of those that another expert took;
        `dropped_out`: of those whose output expert dropout dropped.
      `unserved`: fraction of tokens that no expert serves.
      `buffer_overflow`: fraction of choices that a buffer of expert parallelism had no room for and
        that took a slower way.
      `gate_mass`: mean sum of a token's combine weights, after dropping.
      `top_prob`: mean of the highest probability; `margin`: of the K-th highest minus the next.
      `ties`: fraction of tokens whose last expert ranks exactly as high as one that was
        not selected.
      `logit_rms`, `logit_max`: root mean square and largest magnitude of the router logits.
    """
    load_NE = load_fractions(stats)
    num_experts = load_NE.shape[-1]
    tokens_N = token_counts(stats)
    choices_N = stats.assignments_E.sum(axis=-1)
    choices_N = jnp.maximum(choices_N, 1)
    safe_load_NE = jnp.where(load_NE > 0, load_NE, 1.0)
    log_load_NE = jnp.log(safe_load_NE)
    return {
        "max_violation": num_experts * load_NE.max(axis=-1) - 1,
        "load_cv": load_NE.std(axis=-1) * num_experts,
        "importance_cv": jnp.sqrt(cv_squared(stats.importance_E)),
        "load_entropy": -jnp.sum(load_NE * log_load_NE, axis=-1),
        "entropy": stats.entropy / tokens_N,
        "idle_experts": _count_idle(stats),
        "dropped": stats.dropped / choices_N,
        "moved": stats.moved / choices_N,
        "dropped_out": stats.dropped_out / choices_N,
        "unserved": stats.unserved / tokens_N,
        "buffer_overflow": stats.buffer_overflow / choices_N,
        "gate_mass": stats.gate_mass / tokens_N,
        "top_prob": stats.top_prob / tokens_N,
        "margin": stats.margin / tokens_N,
        "ties": stats.ties / tokens_N,
        "logit_rms": jnp.sqrt(stats.logit_square / (num_experts * tokens_N)),
        "logit_max": stats.logit_max,
    }


def _count_idle(stats: RoutingStats) -> Float[Array, "N"]:
    """Returns how many experts no token chose."""
    is_idle_NE = stats.assignments_E == 0
    num_idle_N = jnp.sum(is_idle_NE, axis=-1)
    return num_idle_N.astype(jnp.float32)
