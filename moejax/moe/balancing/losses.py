"""Auxiliary losses: pure functions of `RoutingStats` over all of their scope.

Every function takes statistics stacked by layer, with arrays `[N, ...]` over the N MoE layers, and
returns one value per layer, so that the number of loss terms equals the number of MoE layers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.config import LOSS_SPECS, MoeConfig
from moejax.kernels.arrays import takes_numpy
from moejax.moe.balancing.load import cv_squared, fractions, load_fractions, token_counts
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
    """Returns the losses of a configuration by name.

    Those that are always logged are among them, and the others where their weight is above 0.
    """
    losses = {}
    weighted = config.weighted_losses
    for name, spec in LOSS_SPECS.items():
        if spec.is_always_logged or name in weighted:
            value_N = LOSSES[name](stats)
            losses[name] = AuxiliaryLoss(value_N, value_N)
    # Of the balance loss alone, codebases have several conventions.
    balance_N = losses["balance"].value_N
    term_N = in_convention(balance_N, stats, config.balance_convention)
    losses["balance"] = AuxiliaryLoss(balance_N, term_N)
    return losses


@takes_numpy
def balance_loss(stats: RoutingStats) -> Float[Array, "N"]:
    """Returns the load-balancing loss of GShard and Switch, 1 at perfect balance and at most E/K.

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
    """Returns a balance loss as another codebase counts it, so that its coefficient can be reused.

    Args:
      balance_N: normalised to 1 at perfect balance.
      stats: sums over the global batch, stacked by layer.
      convention: "normalized"; "times_k" (K at balance: MaxText, flaxformer, Hugging Face's
        Mixtral); "over_k" (1/K: levanter); "first_choice" (1, but f counts first choices only:
        GShard, V-MoE, praxis).
    """
    top_k_N = stats.assignments_E.sum(axis=-1) / token_counts(stats)
    if convention == "first_choice" and stats.first_scope_balance is not None:
        return _mean_over_scopes(stats.first_scope_balance)
    if convention == "first_choice":
        return _balance(fractions(stats.first_assignments_E), stats)
    factors = {
        "normalized": jnp.ones_like(top_k_N),
        "times_k": top_k_N,
        "over_k": 1 / jnp.maximum(top_k_N, 1e-9),
    }
    return balance_N * factors[convention]


@takes_numpy
def z_loss(stats: RoutingStats) -> Float[Array, "N"]:
    """Returns the mean over tokens of logsumexp(logits)^2, which keeps router logits small.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.
    """
    return stats.z / token_counts(stats)


def _sequence_balance(stats: RoutingStats) -> jax.Array:
    """Returns the mean over sequences of the balance loss of each, of unbiased scores.

    Source: DeepSeek-V3, equations 17 to 20.
    """
    return _mean_over_scopes(stats.sequence_balance)


def _importance(stats: RoutingStats) -> jax.Array:
    """Returns the variation of the sums of combine weights over experts.

    Source: Shazeer et al. 2017, equations 6 and 7.
    """
    return cv_squared(stats.importance_E)


def _vmoe_importance(stats: RoutingStats) -> jax.Array:
    """Returns the variation of the sums of all probabilities, selected or not, over experts.

    Source: Riquelme et al. 2021 (V-MoE), appendix A.
    """
    return cv_squared(stats.probs_E)


def _load(stats: RoutingStats) -> jax.Array:
    """Returns the variation of the expected load over experts.

    Source: Shazeer et al. 2017, equations 8 to 11.
    """
    return cv_squared(stats.load_E)


def _vmoe_load(stats: RoutingStats) -> jax.Array:
    """Returns the variation of V-MoE's estimate of the load over experts.

    Source: Riquelme et al. 2021 (V-MoE), section A.2.
    """
    return cv_squared(stats.vmoe_load_E)


LOSSES: dict[str, Callable[[RoutingStats], jax.Array]] = {
    "balance": balance_loss,
    "sequence_balance": _sequence_balance,
    "importance": _importance,
    "vmoe_importance": _vmoe_importance,
    "load": _load,
    "vmoe_load": _vmoe_load,
    "z": z_loss,
}
"""The function of each loss of `moejax.config.LOSS_SPECS`."""


def _balance(load_NE, stats: RoutingStats) -> jax.Array:
    load_NE = jax.lax.stop_gradient(load_NE)
    products_N = jnp.sum(load_NE * stats.probs_E, axis=-1)
    num_choices = load_NE.shape[-1]
    return num_choices * products_N / token_counts(stats)


def _mean_over_scopes(sums_N2) -> jax.Array:
    return sums_N2[:, 0] / jnp.maximum(sums_N2[:, 1], 1.0)
