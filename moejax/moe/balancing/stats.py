"""What a MoE layer reports: sums over tokens, which add up over microbatches and devices.

Losses and metrics are functions of these sums, computed once they cover the whole global batch
(`losses.py`, `metrics.py`). That is what makes them independent of mesh, accumulation and number
of processes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moejax.config import ROUTER_RULES, MoeConfig
from moejax.moe.balancing.sums import (
    balance_of_scopes,
    count_assignments,
    count_ties,
    expected_load,
    expected_load_vmoe,
    quantile_margins,
    sum_by_expert,
    sum_of_margins,
    unbiased_choices,
)
from moejax.moe.dispatch.capacity import CombineWeights
from moejax.moe.router.routing import Routing, SlotRouting, SoftRouting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStats:
    """Sums over the real tokens of a batch.

    Stacked by layer, every array has a leading axis of MoE layers.

    Attributes:
      num_tokens: real tokens, float32 scalar.
      assignments_E: choices of each expert before dropping, int32 [E]; no gradient.
      probs_E: sums of the router's probabilities, float32 [E].
      importance_E: sums of the combine weights, before dropping, float32 [E].
      z: sum of logsumexp(logits)^2.
      entropy: sum of the entropies of the router's distributions, nats.
      gate_mass: sum of the combine weights, after dropping.
      top_prob: sum of each token's highest probability.
      margin: sum over tokens of the K-th largest probability minus the next one.
      ties: tokens whose last expert ranks exactly as high as one that was not selected.
      logit_square: sum over tokens and experts of squared logits.
      logit_max: largest magnitude of a logit; the one array that is a maximum, not a sum.
      dropped: choices that found no slot.
      moved: choices that went to another expert for want of a slot.
      dropped_out: choices whose output expert dropout drops.
      unserved: tokens that no expert serves, for want of a slot.
      buffer_overflow: choices that a buffer of expert parallelism had no room for and that took a
        slower way; the one sum that depends on the mesh.
      first_assignments_E: first choices of each expert, int32 [E]; for
        balance_convention="first_choice".
      scope_balance: sum over scopes (sequences, devices, microbatches) of the balance loss of each,
        and the number of scopes that have a token, [2]; unless the scope is the global batch.
      first_scope_balance: the same of first choices only; for balance_convention="first_choice".
      sequence_balance: the same for DeepSeek-V3's loss within sequences, [2].
      load_E: expected load under the routing noise (Shazeer).
      vmoe_load_E: V-MoE's estimate of it.
      quantile_margins_TE: for quantile balancing, each logit minus the least that its token
        accepts; -inf at padding. Not a sum: the step concatenates microbatches.
      attention: the statistics of the router of attention in the same layer, if it has one.
      routing: the token-level decisions, only when a trace was asked for.

    Those with a default are None unless the configuration needs them.
    """

    num_tokens: jax.Array
    assignments_E: jax.Array
    probs_E: jax.Array
    importance_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    gate_mass: jax.Array
    top_prob: jax.Array
    margin: jax.Array
    ties: jax.Array
    logit_square: jax.Array
    logit_max: jax.Array
    dropped: jax.Array
    moved: jax.Array
    dropped_out: jax.Array
    unserved: jax.Array
    buffer_overflow: jax.Array
    first_assignments_E: Any = None
    scope_balance: Any = None
    first_scope_balance: Any = None
    sequence_balance: Any = None
    load_E: Any = None
    vmoe_load_E: Any = None
    quantile_margins_TE: Any = None
    attention: Any = None
    routing: Any = None


def add_stats(first: RoutingStats, second: RoutingStats) -> RoutingStats:
    """The statistics of two batches together; token-level arrays must be absent."""
    total = jax.tree.map(jnp.add, first, second)
    logit_max = jnp.maximum(first.logit_max, second.logit_max)
    attention = first.attention and add_stats(first.attention, second.attention)
    return dataclasses.replace(total, logit_max=logit_max, attention=attention)


def join(groups: Sequence[RoutingStats]) -> RoutingStats | None:
    """Joins the statistics of all groups of MoE layers, by layer in the order of the model.

    Sums that only some groups have are left out, and so is token-level routing. None without
    groups.
    """
    if not groups:
        return None
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(RoutingStats):
        name = field.name
        parts = [getattr(stats, name) for stats in groups]
        is_sum = name not in ("quantile_margins_TE", "attention", "routing")
        has_all = all(part is not None for part in parts)
        if name == "attention" and has_all:
            joined[name] = join(parts)
        if is_sum and has_all:
            joined[name] = jnp.concatenate(parts)
    return RoutingStats(**joined)


def collect(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    combined: CombineWeights,
    config: MoeConfig,
    *,
    length: int,
    buffer_overflow: jax.Array | float = 0.0,
    num_devices: int = 1,
    trace: bool = False,
) -> RoutingStats:
    """Sums up one layer's routing where tokens choose.

    Args:
      routing: the router's decisions, before capacity.
      mask_T: False where a token is padding: it enters no sum.
      combined: the choices after capacity.
      config: which sums are needed.
      length: tokens of a sequence.
      buffer_overflow: choices that a buffer of expert parallelism had no room for.
      num_devices: into how many equal parts the mesh splits the tokens.
      trace: keep the routing itself next to the sums.
    """
    experts_TK = routing.experts_TK
    probs_TE = routing.probs_TE
    num_choices = probs_TE.shape[1]
    is_unserved_T = _is_unserved(combined, mask_T)
    num_ties = jnp.float32(0)
    if not ROUTER_RULES[config.router].is_fixed:
        num_ties = count_ties(routing, mask_T)
    parts = _Parts.of_tokens(probs_TE.shape[0], length, num_devices)
    return RoutingStats(
        **_sums_of_logits(routing.logits_TE, probs_TE, mask_T),
        **_first_choice_sums(routing, config, parts),
        **_scope_sums(routing, mask_T, config, parts),
        **_loss_sums(routing, mask_T, config, length),
        assignments_E=count_assignments(experts_TK, num_choices, num_devices),
        importance_E=sum_by_expert(experts_TK, routing.weights_TK, num_choices),
        gate_mass=combined.weights_TK.sum(),
        margin=sum_of_margins(probs_TE, mask_T, config.top_k),
        ties=num_ties,
        dropped=_count(combined.is_dropped_TK),
        moved=_count(combined.is_moved_TK),
        dropped_out=_count_dropped_out(combined, experts_TK < num_choices),
        unserved=_count(is_unserved_T),
        buffer_overflow=jnp.float32(buffer_overflow),
        routing=routing if trace else None,
    )


class _Parts(NamedTuple):
    """Into how many equal parts the tokens of a batch fall."""

    num_devices: int
    num_sequences: int

    @classmethod
    def of_tokens(cls, num_tokens: int, length: int, num_devices: int) -> "_Parts":
        """Returns the parts of that many tokens in sequences of this length."""
        return cls(num_devices, num_tokens // length)

    def num_scopes(self, balance_scope: str) -> int:
        """Returns how many scopes a balance loss has."""
        num_scopes_of = {
            "microbatch": 1,
            "device": self.num_devices,
            "sequence": self.num_sequences,
        }
        return num_scopes_of[balance_scope]


def _first_choice_sums(
    routing: Routing,
    config: MoeConfig,
    parts: _Parts,
) -> dict[str, jax.Array]:
    """Returns the counts of first choices, where the balance loss is of those."""
    if config.balance_convention != "first_choice":
        return {}
    first_T1 = routing.experts_TK[:, :1]
    num_choices = routing.probs_TE.shape[1]
    counts_E = count_assignments(first_T1, num_choices, parts.num_devices)
    return {"first_assignments_E": counts_E}


def _scope_sums(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    config: MoeConfig,
    parts: _Parts,
) -> dict[str, jax.Array]:
    """Returns the balance within scopes, where a loss has any but the global batch."""
    probs_TE = routing.probs_TE

    def balance_of(experts_TK: jax.Array, num_scopes: int) -> jax.Array:
        return balance_of_scopes(experts_TK, probs_TE, mask_T, num_scopes)

    sums = {}
    if config.balance_scope != "global":
        num_scopes = parts.num_scopes(config.balance_scope)
        sums["scope_balance"] = balance_of(routing.experts_TK, num_scopes)
        if config.balance_convention == "first_choice":
            first_T1 = routing.experts_TK[:, :1]
            sums["first_scope_balance"] = balance_of(first_T1, num_scopes)
    return sums


def _loss_sums(
    routing: Routing, mask_T: Bool[Array, "T"], config: MoeConfig, length: int
) -> dict[str, jax.Array]:
    """Returns the statistics of the losses that have a weight, and of routing by quantiles."""
    has_noise = routing.noisy_TE is not None and routing.noise_scale_TE is not None
    sums = {}
    for spec in config.weighted_losses.values():
        if spec.statistic and (has_noise or not spec.estimates_load):
            collect_statistic = STATISTICS[spec.statistic]
            sums[spec.statistic] = collect_statistic(routing, mask_T, config, length)
    if config.router == "quantile":
        sums["quantile_margins_TE"] = quantile_margins(routing, mask_T, config.top_k)
    return sums


def _is_unserved(combined: CombineWeights, mask_T: jax.Array) -> jax.Array:
    """Whether no expert serves a token."""
    mask_T1 = mask_T[:, None]
    is_kept_TK = mask_T1 & ~combined.is_dropped_TK
    has_weight_TK = combined.weights_TK != 0
    is_served_TK = is_kept_TK & has_weight_TK
    is_served_T = is_served_TK.any(axis=1)
    return mask_T & ~is_served_T


def _sequence_balance(
    routing: Routing, mask_T: Bool[Array, "T"], config: MoeConfig, length: int
) -> jax.Array:
    unbiased_TK = unbiased_choices(routing, mask_T, config)
    num_sequences = len(mask_T) // length
    return balance_of_scopes(unbiased_TK, routing.probs_TE, mask_T, num_sequences)


def _expected_load(
    routing: Routing, mask_T: Bool[Array, "T"], config: MoeConfig, length: int
) -> jax.Array:
    return expected_load(routing, mask_T, config.top_k)


def _expected_load_vmoe(
    routing: Routing, mask_T: Bool[Array, "T"], config: MoeConfig, length: int
) -> jax.Array:
    return expected_load_vmoe(routing, mask_T, config.top_k)


STATISTICS: dict[str, Callable[[Routing, jax.Array, MoeConfig, int], jax.Array]] = {
    "sequence_balance": _sequence_balance,
    "load_E": _expected_load,
    "vmoe_load_E": _expected_load_vmoe,
}
"""How the statistic of a loss is collected, by its field: a function of a layer's routing, the mask
of its tokens, the configuration, and the length of a sequence."""


def collect_expert_choice(
    routing: SlotRouting,
    mask_BL: Bool[Array, "B L"],
    *,
    trace: bool = False,
) -> RoutingStats:
    """Sums up one layer's routing where experts choose."""
    batch, length = mask_BL.shape
    is_filled_BEC = routing.positions_BEC < length
    row_B = jnp.arange(batch)
    row_B11 = row_B[:, None, None]
    none_BL = jnp.zeros(mask_BL.shape, bool)
    is_served_BL = none_BL.at[row_B11, routing.positions_BEC].set(True, mode="drop")
    return RoutingStats(
        **_sums_of_logits(routing.logits_TE, routing.probs_TE, mask_BL.reshape(-1)),
        **_zero_counts(),
        assignments_E=is_filled_BEC.sum(axis=(0, 2), dtype=jnp.int32),
        importance_E=routing.weights_BEC.sum(axis=(0, 2)),
        gate_mass=routing.weights_BEC.sum(),
        unserved=_count(mask_BL & ~is_served_BL),
        routing=routing if trace else None,
    )


def collect_soft_slots(
    routing: SoftRouting,
    mask_BL: Bool[Array, "B L"],
    num_experts: int,
    *,
    trace: bool = False,
) -> RoutingStats:
    """Sums up one layer's soft routing.

    Each slot counts as one assignment of each sequence that has a token.
    """
    batch, length, num_slots = routing.logits_BLS.shape
    slots_per_expert = num_slots // num_experts
    weights_BLES = routing.combine_BLS.reshape(batch, length, num_experts, slots_per_expert)
    probs_BLE = weights_BLES.sum(axis=-1)
    probs_TE = probs_BLE.reshape(-1, num_experts)
    logits_TS = routing.logits_BLS.reshape(batch * length, num_slots)
    mask_T = mask_BL.reshape(-1)
    sums = _sums_of_logits(logits_TS, probs_TE, mask_T)
    has_token_B = mask_BL.any(axis=1)
    num_sequences = has_token_B.sum(dtype=jnp.int32)
    assignments_per_expert = num_sequences * slots_per_expert
    return RoutingStats(
        **sums,
        **_zero_counts(),
        assignments_E=jnp.full(num_experts, assignments_per_expert),
        importance_E=sums["probs_E"],
        gate_mass=probs_TE.sum(),
        unserved=jnp.float32(0),
        routing=routing if trace else None,
    )


def _zero_counts() -> dict[str, jax.Array]:
    """Returns the counts that are always 0 where tokens do not choose."""
    names = ("margin", "ties", "dropped", "moved", "dropped_out", "buffer_overflow")
    return dict.fromkeys(names, jnp.float32(0))


def _count(is_counted: jax.Array) -> jax.Array:
    return is_counted.sum(dtype=jnp.float32)


def _count_dropped_out(combined: CombineWeights, is_choice_TK: jax.Array) -> jax.Array:
    if combined.dropout_TK is None:
        return jnp.float32(0)
    is_kept_TK = is_choice_TK & ~combined.is_dropped_TK
    is_dropped_out_TK = combined.dropout_TK == 0
    return _count(is_kept_TK & is_dropped_out_TK)


def _sums_of_logits(
    logits_TX: jax.Array,
    probs_TE: jax.Array,
    mask_T: jax.Array,
) -> dict[str, Any]:
    """Returns the sums that every kind of router has."""
    is_token_T1 = mask_T[:, None]
    logits_TX = jnp.where(is_token_T1, logits_TX, 0.0)
    probs_TE = jnp.where(is_token_T1, probs_TE, 0.0)
    logsumexp_T = jax.nn.logsumexp(logits_TX, axis=-1)
    logsumexp_T = jnp.where(mask_T, logsumexp_T, 0.0)
    safe_probs_TE = jnp.where(probs_TE > 0, probs_TE, 1.0)
    log_probs_TE = jnp.log(safe_probs_TE)
    # Where a router has several logits for an expert, squares count as if it had one.
    num_logits = logits_TX.shape[-1]
    experts_per_logit = probs_TE.shape[-1] / num_logits
    return {
        "num_tokens": mask_T.sum(dtype=jnp.float32),
        "probs_E": probs_TE.sum(axis=0),
        "z": jnp.sum(logsumexp_T**2),
        "entropy": -jnp.sum(probs_TE * log_probs_TE),
        "top_prob": probs_TE.max(axis=-1).sum(),
        "logit_square": jnp.sum(logits_TX**2) * experts_per_logit,
        "logit_max": jnp.abs(jax.lax.stop_gradient(logits_TX)).max(),
    }
