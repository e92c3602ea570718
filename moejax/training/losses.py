"""Sums over the targets of a batch, and the losses that follow from them.

The forward pass returns sums over tokens (`BatchSums`). Every loss is a pure function of the sums
of the whole global batch, so that it is the same for any mesh and any gradient accumulation.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.config import LOSS_SPECS, Config, Knobs
from moejax.data.batches import Batch
from moejax.kernels.cross_entropy import TokenLosses
from moejax.moe.balancing.losses import AuxiliaryLoss, auxiliary_losses
from moejax.moe.balancing.stats import RoutingStats, add_stats
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchSums:
    """Sums over the real targets of a batch; they add up over microbatches.

    Attributes:
      nats: cross-entropy of the language model, float32.
      log_z_squares: squared log-sum-exps of the logits, float32.
      num_targets: predicted tokens, float32.
      routing: `RoutingStats` of each group of equal MoE layers, stacked by layer; empty for a
        dense model.
    """

    nats: jax.Array
    log_z_squares: jax.Array
    num_targets: jax.Array
    routing: tuple[RoutingStats, ...]


def forward_sums(
    model,
    batch: Batch,
    knobs: Knobs | None = None,
    keys_B: jax.Array | None = None,
    *,
    trace: bool = False,
) -> BatchSums:
    """Runs the model on packed rows and sums up its losses and routing.

    Args:
      model: a `Decoder`.
      batch: packed rows `[B, L]`.
      knobs: traced scalars of training; None is evaluation: dropless unless configured otherwise,
        and without noise.
      keys_B: a key per row, from which training draws.
      trace: keep token-level routing in the sums of routing.
    """
    losses, routing = forward(model, batch, knobs, keys_B, trace=trace)
    return sum_losses(losses, batch, routing)


def sum_losses(losses: TokenLosses, batch: Batch, routing: tuple[RoutingStats, ...]) -> BatchSums:
    """Returns the sums over the targets of a batch, from losses that are 0 elsewhere."""
    return BatchSums(
        nats=losses.nats_BL.sum(),
        log_z_squares=jnp.square(losses.log_z_BL).sum(),
        num_targets=count_targets(batch),
        routing=routing,
    )


def forward(
    model,
    batch: Batch,
    knobs: Knobs | None,
    keys_B: jax.Array | None,
    *,
    trace: bool,
    overrides: RoutingOverrides = AS_TRAINED,
) -> tuple[TokenLosses, tuple[RoutingStats, ...]]:
    """Returns the losses of each target, 0 where there is none, and the routing.

    See `forward_sums` and `Decoder` for the arguments.
    """
    hidden_BLD, routing = model(
        batch.tokens_BL,
        batch.segments_BL,
        batch.positions_BL,
        knobs=knobs,
        keys_B=keys_B,
        trace=trace,
        overrides=overrides,
    )
    losses = model.cross_entropy(hidden_BLD, batch.targets_BL)
    masked = [jnp.where(batch.loss_mask_BL, loss_BL, 0.0) for loss_BL in losses]
    return TokenLosses(*masked), routing


def add_sums(first: BatchSums, second: BatchSums) -> BatchSums:
    """Returns the sums of two batches together."""
    pairs = zip(first.routing, second.routing, strict=True)
    return BatchSums(
        nats=first.nats + second.nats,
        log_z_squares=first.log_z_squares + second.log_z_squares,
        num_targets=first.num_targets + second.num_targets,
        routing=tuple(add_stats(*pair) for pair in pairs),
    )


def count_targets(batch: Batch) -> jax.Array:
    """Returns the number of predicted tokens of a batch, float32."""
    return batch.loss_mask_BL.sum(dtype=jnp.float32)


def losses(sums: BatchSums, knobs: Knobs, config: Config) -> dict[str, jax.Array]:
    """Returns the language-model loss, the auxiliary losses and their total.

    Returns:
      `loss/lm` is the mean cross-entropy in nats, `loss/logit_z` the mean squared log-sum-exp of
      the logits, which enters by `train.logit_z_weight` (the z-loss of PaLM, Chowdhery et al.
      2022). `loss/balance`, `loss/z` and others are means over the MoE layers that have them,
      unweighted, `loss/attention_balance` and so on over the routers of attention;
      `loss/balance_weighted` and so on their contributions to `loss/total`:
      weight times the sum over layers, as in the published systems, where each layer adds its own
      term, and that of its attention times `attention.router_loss_factor`.

    Raises:
      ValueError: while tracing, if the sums are not those of as many layers as the configuration
        has MoE layers: a layer's losses would be silently absent.
    """
    num_reported = sum(stats.num_tokens.size for stats in sums.routing)
    if num_reported != config.num_moe_layers:
        raise ValueError(
            f"{num_reported} layers reported routing, and the model has {config.num_moe_layers} "
            "MoE layers"
        )
    num_targets = jnp.maximum(sums.num_targets, 1.0)
    found = {
        "loss/lm": sums.nats / num_targets,
        "loss/logit_z": sums.log_z_squares / num_targets,
    }
    weighted = knobs.logit_z_weight * found["loss/logit_z"]
    found["loss/logit_z_weighted"] = weighted
    total = found["loss/lm"] + weighted
    groups = zip(sums.routing, config.moe_groups, strict=True)
    losses_of_groups = [auxiliary_losses(stats, moe) for stats, moe in groups]
    losses_of_attention = _losses_of_attention(sums.routing, config)
    for name in LOSS_SPECS:
        parts = [group[name] for group in losses_of_groups if name in group]
        if parts:
            terms = _sum_of_terms(parts)
            found[f"loss/{name}"] = _mean_value(parts)
            of_attention = [group[name] for group in losses_of_attention if name in group]
            if of_attention:
                terms += config.attention.router_loss_factor * _sum_of_terms(of_attention)
                found[f"loss/attention_{name}"] = _mean_value(of_attention)
            weighted = getattr(knobs, f"{name}_weight") * terms
            found[f"loss/{name}_weighted"] = weighted
            total += weighted
    return found | {"loss/total": total}


def _losses_of_attention(
    routing: Sequence[RoutingStats], config: Config
) -> list[dict[str, AuxiliaryLoss]]:
    """Returns the losses of the routers of attention by group of layers; none without any."""
    found = []
    for stats in routing:
        if stats.attention is not None:
            found.append(auxiliary_losses(stats.attention, config.attention_router))
    return found


def _mean_value(parts: list[AuxiliaryLoss]) -> jax.Array:
    """Returns the mean over the layers that have the loss."""
    values_N = jnp.concatenate([part.value_N for part in parts])
    return values_N.mean()


def _sum_of_terms(parts: list[AuxiliaryLoss]) -> jax.Array:
    total = jnp.float32(0)
    for part in parts:
        total += part.term_N.sum()
    return total
