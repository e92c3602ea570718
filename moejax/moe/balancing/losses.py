"""Auxiliary losses, routing metrics, updates of router state: pure functions of `RoutingStats` over their whole scope.

Every function takes statistics stacked by layer, with arrays `[N, ...]` over the N MoE layers, and
returns one value per layer, so that the number of loss terms equals the number of MoE layers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.balancing.stats import RoutingStats


@dataclasses.dataclass(frozen=True)
class AuxiliaryLoss:
    """One auxiliary loss of every MoE layer.

    Attributes:
      value_N: normalised to 1 at perfect balance where that has a meaning: what logs show.
      term_N: what the knob `NAME_weight` multiplies in the total: `value_N`, or its value under
        another convention.
    """

    value_N: jax.Array
    term_N: jax.Array


@takes_numpy
def auxiliary_losses(stats: RoutingStats, config: MoeConfig) -> dict[str, AuxiliaryLoss]:
    """The losses of a configuration by name: `balance` and `z` always, the others where their weight is above 0."""
    found = {}
    for name, loss in LOSSES.items():
        if name in ("balance", "z") or getattr(config, f"{name}_weight") > 0:
            value_N = loss(stats)
            found[name] = AuxiliaryLoss(value_N, value_N)
    balance_N = found["balance"].value_N
    found["balance"] = AuxiliaryLoss(
        balance_N, in_convention(balance_N, stats, config.balance_convention)
    )
    return found


@takes_numpy
def balance_loss(stats: RoutingStats) -> Float[Array, "N"]:
    """The load-balancing loss of GShard and Switch, 1 at perfect balance and at most E/K.

    E * sum_e f_e P_e with f_e the fraction of choices that fell on expert e, a constant for the
    gradient, and P_e the mean probability the router gave it, over all tokens of the global batch.
    With another `moe.balance_scope`, the mean over scopes of the product of each scope's means.

    Source: Fedus et al. 2021, equations 4 to 6; normalised as in Megatron-Core and OLMo-core.
    """
    if stats.scope_balance is not None:
        return _mean_over_scopes(stats.scope_balance)
    return _balance(load_fractions(stats), stats)


@takes_numpy
def in_convention(
    balance_N: Float[Array, "N"], stats: RoutingStats, convention: str
) -> Float[Array, "N"]:
    """A balance loss as another codebase counts it, so that its coefficient can be carried over.

    Args:
      balance_N: normalised to 1 at perfect balance.
      stats: sums over the global batch, stacked by layer.
      convention: "normalized"; "times_k" (K at balance: MaxText, flaxformer, Hugging Face's
        Mixtral); "over_k" (1/K: levanter); "first_choice" (1, but f counts first choices only:
        GShard, V-MoE, praxis).
    """
    top_k_N = stats.assignments_E.sum(axis=-1) / _tokens(stats)
    if convention == "first_choice" and stats.first_scope_balance is not None:
        return _mean_over_scopes(stats.first_scope_balance)
    if convention == "first_choice":
        return _balance(_fractions(stats.first_assignments_E), stats)
    factors = {
        "normalized": jnp.ones_like(top_k_N),
        "times_k": top_k_N,
        "over_k": 1 / jnp.maximum(top_k_N, 1e-9),
    }
    return balance_N * factors[convention]


@takes_numpy
def cv_squared(values_NE: Float[Array, "N E"]) -> Float[Array, "N"]:
    """Squared coefficient of variation over experts, whatever their scale; 0 where all are 0.

    Source: Shazeer et al. 2017, equation 7.
    """
    # In units of the largest, where nothing underflows: a small constant in the denominator would
    # let a router lower its loss by lowering all its weights.
    largest_N1 = jax.lax.stop_gradient(values_NE.max(axis=-1, keepdims=True))
    values_NE /= jnp.where(largest_N1 > 0, largest_N1, 1.0)
    mean_N = values_NE.mean(axis=-1)
    return values_NE.var(axis=-1) / jnp.where(mean_N > 0, mean_N, 1.0) ** 2


@takes_numpy
def z_loss(stats: RoutingStats) -> Float[Array, "N"]:
    """Mean over tokens of logsumexp(logits)^2, which keeps router logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.
    """
    return stats.z / _tokens(stats)


@takes_numpy
def load_fractions(stats: RoutingStats) -> Float[Array, "N E"]:
    """Fraction of all choices that fell on each expert, before dropping; rows sum to 1."""
    return _fractions(stats.assignments_E)


@takes_numpy
def routing_metrics(stats: RoutingStats) -> dict[str, Float[Array, "N"]]:
    """Metrics of each layer.

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
      `buffer_overflow`: fraction of choices that a buffer of the exchange had no room for, and which took
        a slower way.
      `gate_mass`: mean sum of a token's combine weights, after dropping.
      `top_prob`: mean of the highest probability; `margin`: of the K-th highest minus the next.
      `ties`: fraction of tokens whose last expert ranks exactly as high as one that was
        not selected.
      `logit_rms`, `logit_max`: root mean square and largest magnitude of the router logits.
    """
    load_NE = load_fractions(stats)
    num_experts = load_NE.shape[-1]
    tokens_N = _tokens(stats)
    choices_N = jnp.maximum(stats.assignments_E.sum(axis=-1), 1)
    log_load_NE = jnp.log(jnp.where(load_NE > 0, load_NE, 1.0))
    return {
        "max_violation": num_experts * load_NE.max(axis=-1) - 1,
        "load_cv": load_NE.std(axis=-1) * num_experts,
        "importance_cv": jnp.sqrt(cv_squared(stats.importance_E)),
        "load_entropy": -jnp.sum(load_NE * log_load_NE, axis=-1),
        "entropy": stats.entropy / tokens_N,
        "idle_experts": jnp.sum(stats.assignments_E == 0, axis=-1).astype(jnp.float32),
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


LOSSES: dict[str, Callable[[RoutingStats], jax.Array]] = {
    "balance": balance_loss,
    "sequence_balance": lambda stats: _mean_over_scopes(stats.sequence_balance),
    "importance": lambda stats: cv_squared(stats.importance_E),
    "vmoe_importance": lambda stats: cv_squared(stats.probs_E),
    "load": lambda stats: cv_squared(stats.load_E),
    "vmoe_load": lambda stats: cv_squared(stats.vmoe_load_E),
    "z": z_loss,
}
"""Each auxiliary loss; its weight is the knob, and the leaf of `moe`, of its name and `_weight`."""


@takes_numpy
def update_bias(
    bias_NE: Float[Array, "N E"],
    assignments_NE: Int[Array, "N E"],
    rate: Float[Array, ""],
    *,
    is_centered: bool,
) -> Float[Array, "N E"]:
    """One step of the selection bias: up for experts with less than the mean load, down for those with more.

    Args:
      bias_NE: before the step.
      assignments_NE: choices over the whole global batch, before dropping.
      rate: size of the step.
      is_centered: subtract the mean afterwards.

    Source: Wang et al. 2024 (auxiliary-loss-free balancing), algorithm 1; DeepSeek-V3,
    section 2.1.2.
    """
    counts_NE = assignments_NE.astype(jnp.float32)
    bias_NE += rate * jnp.sign(counts_NE.mean(axis=-1, keepdims=True) - counts_NE)
    return bias_NE - bias_NE.mean(axis=-1, keepdims=True) if is_centered else bias_NE


@takes_numpy
def update_quantiles(
    offers_NTE: Float[Array, "N T E"], num_tokens_N: Float[Array, "N"], top_k: int
) -> Float[Array, "N E"]:
    """The selection bias with which each expert would have been chosen by its share of the tokens: minus beta, centred.

    beta_e is the (T K / E + 1)-th largest offer to expert e among the T real tokens. It is found
    bit by bit from counts, so that tokens may lie on any number of devices and none has to move.

    Args:
      offers_NTE: of the whole global batch, from `estimates.quantile_margins`; -inf at padding. What is not a
        number concerns its own expert alone.
      num_tokens_N: how many of the tokens are no padding; the same for every layer.
      top_k: experts per token, K.

    Source: quantile balancing, 2026.
    """
    num_experts = offers_NTE.shape[-1]
    rank_N1 = (num_tokens_N.astype(jnp.int32) * top_k // num_experts + 1)[:, None]
    # Floats in the order of unsigned integers: flip all bits of negative ones, the sign bit of
    # the others.
    bits_NTE = jax.lax.bitcast_convert_type(offers_NTE, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys_NTE = jnp.where(bits_NTE >= sign, ~bits_NTE, bits_NTE | sign)

    def set_bit(i, found_NE):
        candidate_NE = found_NE | (sign >> i.astype(jnp.uint32))
        is_enough_NE = (keys_NTE >= candidate_NE[:, None]).sum(axis=1) >= rank_N1
        return jnp.where(is_enough_NE, candidate_NE, found_NE)

    found_NE = jax.lax.fori_loop(
        0, 32, set_bit, jnp.zeros((offers_NTE.shape[0], num_experts), jnp.uint32)
    )
    beta_bits_NE = jnp.where(found_NE >= sign, found_NE ^ sign, ~found_NE)
    beta_NE = jax.lax.bitcast_convert_type(beta_bits_NE, jnp.float32)
    beta_NE = jnp.where(jnp.isfinite(beta_NE), beta_NE, 0.0)
    return beta_NE.mean(axis=-1, keepdims=True) - beta_NE


@takes_numpy
def update_idle_steps(
    idle_NE: Int[Array, "N E"], assignments_NE: Int[Array, "N E"]
) -> Int[Array, "N E"]:
    """Steps since each expert was last chosen."""
    return jnp.where(assignments_NE > 0, 0, idle_NE + 1)


def _balance(load_NE, stats: RoutingStats) -> jax.Array:
    load_NE = jax.lax.stop_gradient(load_NE)
    return load_NE.shape[-1] * jnp.sum(load_NE * stats.probs_E, axis=-1) / _tokens(stats)


def _fractions(assignments_NE) -> jax.Array:
    assignments_NE = assignments_NE.astype(jnp.float32)
    return assignments_NE / jnp.maximum(assignments_NE.sum(axis=-1, keepdims=True), 1.0)


def _mean_over_scopes(sums_N2) -> jax.Array:
    return sums_N2[:, 0] / jnp.maximum(sums_N2[:, 1], 1.0)


def _tokens(stats: RoutingStats) -> Float[Array, "N"]:
    """Token counts, at least 1, so that an empty batch gives zeros."""
    return jnp.maximum(stats.num_tokens, 1.0)
