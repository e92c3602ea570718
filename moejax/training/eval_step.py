"""One evaluation step: the sums of a batch, and what its tokens visited."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.data.batches import Batch
from moejax.moe.overrides import AS_TRAINED, RoutingOverrides
from moejax.moe.router.by_token import coactivation, experts_by_token
from moejax.sharding import replicated
from moejax.training.losses import BatchSums, forward, sum_losses
from moejax.training.state import TrainSetup

PROBE_TOKENS = 512
"""Of a row, whose routing is kept at every evaluation, to see how much of it changes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalOutput:
    """What evaluating a batch gives.

    Attributes:
      sums: over its targets and tokens.
      coactivation_NEE: tokens that visit both experts of a pair, int32; None for a dense model.
      probe_NTK: the experts of the first `PROBE_TOKENS` tokens of its first row, as
        `experts_by_token` gives them; None for a dense model.
      nats_by_domain_G2: cross-entropy and number of the targets of each domain, float32; None
        without domains.
    """

    sums: BatchSums
    coactivation_NEE: jax.Array | None = None
    probe_NTK: jax.Array | None = None
    nats_by_domain_G2: jax.Array | None = None


def make_eval_step(setup: TrainSetup, num_domains: int = 0) -> Callable[..., EvalOutput]:
    """Compiles, on first call, `(params, router_state, batch) -> EvalOutput`.

    It is dropless by default, and without noise. The step also takes `overrides=`, how it routes
    otherwise than as trained.

    Args:
      setup: the run's fixed part.
      num_domains: above 0, the step takes a fourth argument: the domain of each target, int32 [B,
        L], -1 for none.
    """
    return jax.jit(eval_step_of(setup, num_domains), out_shardings=replicated(setup.mesh))


def eval_step_of(setup: TrainSetup, num_domains: int = 0) -> Callable[..., EvalOutput]:
    """Returns the function that `make_eval_step` compiles."""
    num_choices = setup.config.moe.num_choices

    def eval_step(
        params: nnx.State,
        router_state: nnx.State,
        batch: Batch,
        *domains_BL: jax.Array,
        overrides: RoutingOverrides = AS_TRAINED,
    ) -> EvalOutput:
        model = nnx.merge(setup.graphdef, params, router_state)
        losses, routing = forward(model, batch, None, None, trace=True, overrides=overrides)
        by_domain_G2 = None
        if num_domains:
            by_domain_G2 = _sum_by_domain(losses.nats_BL, batch, domains_BL[0], num_domains)
        sums_only = tuple(
            dataclasses.replace(stats, quantile_margins_TE=None, routing=None) for stats in routing
        )
        sums = sum_losses(losses, batch, sums_only)
        if not routing:
            return EvalOutput(sums, nats_by_domain_G2=by_domain_G2)
        experts_NTK = experts_by_token([stats.routing for stats in routing], num_choices)
        return EvalOutput(
            sums=sums,
            coactivation_NEE=coactivation(experts_NTK, num_choices),
            probe_NTK=experts_NTK[:, : min(batch.tokens_BL.shape[1], PROBE_TOKENS)],
            nats_by_domain_G2=by_domain_G2,
        )

    return eval_step


def _sum_by_domain(
    nats_BL: jax.Array, batch: Batch, domains_BL: jax.Array, num_domains: int
) -> jax.Array:
    """Returns the cross-entropy and the number of the targets of each domain."""
    domains_11G = jnp.arange(num_domains)[None, None]
    is_in_domain_BLG = domains_BL[..., None] == domains_11G
    is_counted_BLG = is_in_domain_BLG & batch.loss_mask_BL[..., None]
    counted_nats_BLG = jnp.where(is_counted_BLG, nats_BL[..., None], 0.0)
    nats_G = counted_nats_BLG.sum(axis=(0, 1))
    num_targets_G = is_counted_BLG.sum(axis=(0, 1), dtype=jnp.float32)
    return jnp.stack([nats_G, num_targets_G], axis=1)
