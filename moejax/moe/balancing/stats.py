"""What a MoE layer reports: sums over tokens, which add up over microbatches and devices.

Losses and metrics are functions of these sums, computed once they cover the whole global batch
(`balance.py`). That is what makes them independent of mesh, accumulation and process count.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

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
from moejax.moe.router.routing import Routing, SlotRouting, SoftRouting


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStats:
    """Sums over the real tokens of a batch; stacked by layer, every array has a leading axis of MoE layers.

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
      buffer_overflow: choices for which a buffer of the exchange had no room, and which took a slower
        way; the one sum that depends on the mesh.
      first_assignments_E: first choices of each expert, int32 [E]; for
        balance_convention="first_choice".
      scope_balance: sum over scopes (sequences, devices, microbatches) of the balance loss of each,
        and the number of scopes that have a token, [2]; unless the scope is the global batch.
      first_scope_balance: the same of first choices only; for balance_convention="first_choice".
      sequence_balance: the same for DeepSeek-V3's loss within sequences, [2].
      load_E: expected load under the routing noise (Shazeer).
      vmoe_load_E: V-MoE's estimate of it.
      offers_TE: for quantile balancing, each logit minus the least that its token accepts; -inf at
        padding. Not a sum: the step concatenates microbatches.
      routing: the token-level decisions, only when a trace was asked for.

    The last eight are None unless the configuration needs them.
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
    offers_TE: Any = None
    routing: Any = None


def add_stats(first: RoutingStats, second: RoutingStats) -> RoutingStats:
    """The statistics of two batches together; token-level arrays must be absent."""
    total = jax.tree.map(jnp.add, first, second)
    return dataclasses.replace(total, logit_max=jnp.maximum(first.logit_max, second.logit_max))


def join(runs: Sequence[RoutingStats]) -> RoutingStats | None:
    """The statistics of all runs of MoE layers as one, by layer in the order of the model; None without any.

    Sums that only some runs have are left out, and so is token-level routing.
    """
    if not runs:
        return None
    whole = [dataclasses.replace(run, offers_TE=None, routing=None) for run in runs]
    arrays = [
        {field.name: getattr(run, field.name) for field in dataclasses.fields(run)} for run in whole
    ]
    everywhere = {name for name in arrays[0] if all(run[name] is not None for run in arrays)}
    return RoutingStats(
        **{name: jnp.concatenate([run[name] for run in arrays]) for name in sorted(everywhere)}
    )


@dataclasses.dataclass(frozen=True)
class CombineWeights:
    """What became of a layer's choices.

    Attributes:
      weights_TK: combine weights, 0 where a choice was dropped; before expert dropout.
      is_dropped_TK: choices that found no slot.
      is_moved_TK: choices that went to another expert.
      dropout_TK: factors on the experts' outputs by expert dropout, 0 where it drops one;
        None without it.
    """

    weights_TK: jax.Array
    is_dropped_TK: jax.Array
    is_moved_TK: jax.Array
    dropout_TK: Any = None


def collect(
    routing: Routing,
    mask_T: Bool[Array, "T"],
    service: CombineWeights,
    config: MoeConfig,
    *,
    length: int,
    buffer_overflow: jax.Array | float = 0.0,
    num_devices: int = 1,
    trace: bool = False,
) -> RoutingStats:
    """Sums up one layer's routing.

    Args:
      routing: the router's decisions, before capacity.
      mask_T: False where a token is padding: it enters no sum.
      service: what capacity made of them.
      config: which sums are needed.
      length: tokens of a sequence.
      buffer_overflow: choices that took a slower way to their experts.
      num_devices: into how many equal parts the mesh splits the tokens.
      trace: keep the routing itself beside the sums.
    """
    logits_TE, probs_TE = routing.logits_TE, routing.probs_TE
    num_tokens, num_choices = logits_TE.shape
    is_served_TK = mask_T[:, None] & ~service.is_dropped_TK & (service.weights_TK != 0)
    scopes = {"global": 0, "microbatch": 1, "device": num_devices, "sequence": num_tokens // length}
    has_noise = routing.noisy_TE is not None and routing.noise_scale_TE is not None
    return RoutingStats(
        **_sums_of_logits(logits_TE, probs_TE, mask_T),
        assignments_E=count_assignments(routing.experts_TK, num_choices, num_devices),
        importance_E=sum_by_expert(routing.experts_TK, routing.weights_TK, num_choices),
        gate_mass=service.weights_TK.sum(),
        margin=sum_of_margins(probs_TE, mask_T, config.top_k),
        ties=jnp.float32(0)
        if ROUTER_RULES[config.router].is_fixed
        else count_ties(routing, mask_T),
        dropped=service.is_dropped_TK.sum(dtype=jnp.float32),
        moved=service.is_moved_TK.sum(dtype=jnp.float32),
        dropped_out=_count_dropped_out(service, routing.experts_TK < num_choices),
        unserved=(mask_T & ~is_served_TK.any(axis=1)).sum(dtype=jnp.float32),
        buffer_overflow=jnp.float32(buffer_overflow),
        first_assignments_E=count_assignments(routing.experts_TK[:, :1], num_choices, num_devices)
        if config.balance_convention == "first_choice"
        else None,
        scope_balance=balance_of_scopes(
            routing.experts_TK, probs_TE, mask_T, scopes[config.balance_scope]
        )
        if config.balance_scope != "global"
        else None,
        first_scope_balance=balance_of_scopes(
            routing.experts_TK[:, :1], probs_TE, mask_T, scopes[config.balance_scope]
        )
        if config.balance_scope != "global" and config.balance_convention == "first_choice"
        else None,
        sequence_balance=balance_of_scopes(
            unbiased_choices(routing, mask_T, config), probs_TE, mask_T, scopes["sequence"]
        )
        if config.sequence_balance_weight > 0
        else None,
        load_E=expected_load(routing, mask_T, config.top_k)
        if config.load_weight > 0 and has_noise
        else None,
        vmoe_load_E=expected_load_vmoe(routing, mask_T, config.top_k)
        if config.vmoe_load_weight > 0 and has_noise
        else None,
        offers_TE=quantile_margins(routing, mask_T, config.top_k)
        if config.router == "quantile"
        else None,
        routing=routing if trace else None,
    )


def collect_slots(
    routing: SlotRouting, mask_BL: Bool[Array, "B L"], *, trace: bool = False
) -> RoutingStats:
    """Sums up one layer's routing where experts choose."""
    mask_T, length = mask_BL.reshape(-1), mask_BL.shape[1]
    is_filled_BEC = routing.positions_BEC < length
    batch = jnp.arange(mask_BL.shape[0])[:, None, None]
    served_BL = (
        jnp.zeros(mask_BL.shape, bool).at[batch, routing.positions_BEC].set(True, mode="drop")
    )
    zero = jnp.float32(0)
    return RoutingStats(
        **_sums_of_logits(routing.logits_TE, routing.probs_TE, mask_T),
        assignments_E=is_filled_BEC.sum(axis=(0, 2), dtype=jnp.int32),
        importance_E=routing.weights_BEC.sum(axis=(0, 2)),
        gate_mass=routing.weights_BEC.sum(),
        margin=zero,
        ties=zero,
        dropped=zero,
        moved=zero,
        dropped_out=zero,
        unserved=(mask_BL & ~served_BL).sum(dtype=jnp.float32),
        buffer_overflow=zero,
        routing=routing if trace else None,
    )


def collect_soft(
    routing: SoftRouting, mask_BL: Bool[Array, "B L"], num_experts: int, *, trace: bool = False
) -> RoutingStats:
    """Sums up one layer's soft routing: each slot counts as one assignment of each sequence that has a token."""
    batch, length, slots = routing.logits_BLS.shape
    per_expert = slots // num_experts
    probs_BLE = routing.combine_BLS.reshape(batch, length, num_experts, per_expert).sum(axis=-1)
    probs_TE = probs_BLE.reshape(-1, num_experts)
    mask_T = mask_BL.reshape(-1)
    sums = _sums_of_logits(routing.logits_BLS.reshape(batch * length, slots), probs_TE, mask_T)
    assignments = mask_BL.any(axis=1).sum(dtype=jnp.int32) * per_expert
    zero = jnp.float32(0)
    return RoutingStats(
        **sums,
        assignments_E=jnp.full(num_experts, assignments),
        importance_E=sums["probs_E"],
        gate_mass=probs_TE.sum(),
        margin=zero,
        ties=zero,
        dropped=zero,
        moved=zero,
        dropped_out=zero,
        unserved=zero,
        buffer_overflow=zero,
        routing=routing if trace else None,
    )


def _count_dropped_out(service: CombineWeights, is_choice_TK: jax.Array) -> jax.Array:
    if service.dropout_TK is None:
        return jnp.float32(0)
    return (is_choice_TK & ~service.is_dropped_TK & (service.dropout_TK == 0)).sum(
        dtype=jnp.float32
    )


def _sums_of_logits(logits_TX, probs_TE, mask_T) -> dict[str, Any]:
    """What every kind of router has."""
    is_token_T1 = mask_T[:, None]
    logits_TX = jnp.where(is_token_T1, logits_TX, 0.0)
    probs_TE = jnp.where(is_token_T1, probs_TE, 0.0)
    lse_T = jnp.where(mask_T, jax.nn.logsumexp(logits_TX, axis=-1), 0.0)
    return {
        "num_tokens": mask_T.sum(dtype=jnp.float32),
        "probs_E": probs_TE.sum(axis=0),
        "z": jnp.sum(lse_T**2),
        "entropy": -jnp.sum(probs_TE * jnp.log(jnp.where(probs_TE > 0, probs_TE, 1.0))),
        "top_prob": probs_TE.max(axis=-1).sum(),
        "logit_square": jnp.sum(logits_TX**2) * (probs_TE.shape[-1] / logits_TX.shape[-1]),
        "logit_max": jnp.abs(jax.lax.stop_gradient(logits_TX)).max(),
    }
